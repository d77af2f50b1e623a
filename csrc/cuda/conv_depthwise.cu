// conv with int8 activations and an output for each channel.
#include "cuda/conv_int8.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 128, kSlots = kThreads / 4;
constexpr int kEach = 2;  // pixels of a thread

// 16 channels of kSlots * kEach pixels: a thread has four channels of kEach pixels, whose codes are
// a word each.
__global__ void __launch_bounds__(kThreads)
    depthwise_kernel(const ConvArgs a, const ConvPiece* pieces, bool borders) {
  const uint8_t* const packed = a.packed + blockIdx.y * a.shape.bytes;
  const int taps = static_cast<int>(a.taps());
  int8_t* const weights = shared_memory<int8_t>();  // [taps][16]
  for (int i = threadIdx.x; i < taps * kLanes; i += kThreads) {
    weights[i] =
        static_cast<int8_t>(packed[cuda_code_offset(Format::int8, i / kLanes, i % kLanes)]);
  }
  __syncthreads();
  const int64_t pixels = a.batch * a.pixels();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kSlots * kEach) + threadIdx.x / 4;
  const int first = threadIdx.x % 4 * 4;
  const int64_t channel = blockIdx.y * int64_t{kLanes} + first;
  const uint8_t* corners[kEach];
  uint32_t inside[kEach];
#pragma unroll
  for (int p = 0; p < kEach; ++p) {
    const ConvWindow window = window_of(a, min(begin + p * kSlots, pixels - 1), borders);
    corners[p] = a.image + window.corner + channel;
    inside[p] = window.taps;
  }
  int32_t sums[kEach][4] = {}, weight_sums[4] = {};
  for (int tap = 0; tap < taps; ++tap) {
    const int32_t offset = pieces[tap].offset;
    uint32_t codes[kEach];
#pragma unroll
    for (int p = 0; p < kEach; ++p) {
      codes[p] = (inside[p] >> tap % 32 & 1) != 0 ? load_32(corners[p] + offset) : 0;
    }
    const uint32_t w = *reinterpret_cast<const uint32_t*>(weights + tap * kLanes + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t weight = static_cast<int8_t>(w >> 8 * i);
      weight_sums[i] += weight;
#pragma unroll
      for (int p = 0; p < kEach; ++p) sums[p][i] += static_cast<int8_t>(codes[p] >> 8 * i) * weight;
    }
  }

  ConvOutputs outputs{static_cast<int>(min(a.out_channels - channel, int64_t{4})), {}, {}, {}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= outputs.count) continue;
    const ConvOutput output =
        load_conv_output(a, blockIdx.y, first + i, channel + i, weight_sums[i]);
    outputs.scale[i] = output.scale, outputs.bias[i] = output.bias;
    outputs.weight_sum[i] = output.weight_sum;
  }
  if (outputs.count <= 0) return;
  const ConvResults results = load_conv_results(a);
#pragma unroll
  for (int p = 0; p < kEach; ++p) {
    const int64_t pixel = begin + p * kSlots;
    if (pixel >= pixels) return;
    const int64_t n = divide(pixel, a.pixels());
    const int64_t at = place_in_y(a, pixel, n, channel);
    uint32_t words[4];
    std::memcpy(words, sums[p], sizeof(words));
    finish_conv(a, results, outputs, a.codes[n].scale, a.codes[n].zero, at,
                load_residual(a, results, at, outputs.count), words);
  }
}

}  // namespace

void conv_depthwise(const ConvArgs& a, const ConvTables& tables, bool borders, Stream stream) {
  const dim3 grid(blocks_for(a.batch * a.pixels(), kSlots * kEach),
                  static_cast<unsigned>(a.blocks()));
  launch(depthwise_kernel, grid, kThreads, a.taps() * kLanes, stream, a,
         static_cast<const ConvPiece*>(tables.pieces), borders);
}

}  // namespace qkernels::cuda
