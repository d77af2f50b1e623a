// conv_prepare: scales and zero points of the images of x, and the images as int8 codes with the
// channels innermost and borders filled in.
#include "cuda/conv_int8.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/int8.cuh"
#include "cuda/range.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <DType kType>
__global__ void __launch_bounds__(kThreads) range_kernel(const ConvArgs a, Range* parts) {
  const int64_t elements = a.channels * a.in[0] * a.in[1] * a.in[2];
  const int64_t n = blockIdx.x / kRangeParts, part = blockIdx.x % kRangeParts;
  Range range;
  for (int64_t i = part * kThreads + threadIdx.x; i < elements;
       i += int64_t{kRangeParts} * kThreads) {
    extend(&range, load_element<kType>(a.x, n * elements + i));
  }
  range = block_range(range);
  if (threadIdx.x == 0) parts[blockIdx.x] = range;
}

QK_DEVICE ImageCodes image_codes(const ConvArgs& a, int64_t n, const Range* parts) {
  Range all;
  if (a.x_type != DType::i8) {
    for (int i = 0; i < kRangeParts; ++i) {
      const Range& part = parts[n * kRangeParts + i];
      all.min = min(all.min, part.min);
      all.max = max(all.max, part.max);
      all.magnitude = max(all.magnitude, part.magnitude);
    }
  }
  if (a.is_static) {
    const float scale = *a.x_codes.device_scale;
    const int zero = a.x_codes.device_zero == nullptr ? 0 : *a.x_codes.device_zero;
    return {all.finite() ? scale : NAN, 1.0f / scale, zero, false};
  }
  const Affine affine = choose_affine(all, Format::int8, a.symmetric, DType::f32);
  return {affine.scale, affine.inverse, affine.zero_point, all.finite()};
}

// A warp: the codes of image blockIdx.x, the weight sums of that packed row, a part of the pieces.
__global__ void __launch_bounds__(kWarp)
    setup_kernel(const ConvArgs a, const Range* parts, ImageCodes* codes, ConvTables tables,
                 int piece) {
  const int64_t block = blockIdx.x;
  const int lane = threadIdx.x;
  if (block < a.batch && lane == 0) codes[block] = image_codes(a, block, parts);
  if (block < a.blocks() && tables.weight_sums != nullptr) {
    const uint8_t* row = a.packed + block * a.shape.bytes;
    int32_t low = 0, high = 0;  // of features g and g + 8
    for (int64_t unit = 0; unit < a.shape.k_padded / kCudaChunk; ++unit) {
      const uint4 v = load_128(row + unit * kCudaUnit + lane * 16);
      low = dp4a(v.x, 0x01010101u, dp4a(v.y, 0x01010101u, low));
      high = dp4a(v.z, 0x01010101u, dp4a(v.w, 0x01010101u, high));
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      low += shuffle_xor(low, mask);
      high += shuffle_xor(high, mask);
    }
    if (lane % 4 == 0) {
      tables.weight_sums[block * kLanes + lane / 4] = low;
      tables.weight_sums[block * kLanes + lane / 4 + 8] = high;
    }
  }
  const int64_t count = a.depthwise ? a.taps() : panel_pitch(a.shape) / piece;
  for (int64_t i = block * kWarp + lane; i < count; i += int64_t{kWarp} * gridDim.x) {
    const int64_t tap = a.depthwise ? i : i * piece / a.group_channels;
    const int64_t c = a.depthwise ? 0 : i * piece % a.group_channels;
    tables.pieces[i] = tap < a.taps() ? static_cast<int32_t>(tap_offset(a, tap) + c) : -1;
  }
}

// Where position `at` of the grid's dimension `dim` comes from in x, or -1 where the grid is zero.
QK_DEVICE int64_t source_of(const ConvArgs& a, int dim, int64_t at) {
  const int64_t offset = at - a.before[dim];
  if (offset < 0 || offset % a.step[dim] != 0) return -1;
  const int64_t source = offset / a.step[dim];
  return source < a.in[dim] ? source : -1;
}

// Four codes of a pixel of the grid.
template <DType kType>
__global__ void __launch_bounds__(kThreads) image_kernel(const ConvArgs a, uint8_t* image) {
  const int64_t fours = a.pixel_codes() / 4, pixels = a.grid[0] * a.grid[1] * a.grid[2];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.batch * pixels * fours) return;
  const int64_t pixel = i / fours % pixels, n = i / fours / pixels, first = i % fours * 4;
  const ImageCodes& codes = a.codes[n];
  const Affine affine{codes.scale, codes.inverse, codes.zero};
  const int64_t z = source_of(a, 0, pixel / (a.grid[1] * a.grid[2]));
  const int64_t y = source_of(a, 1, pixel / a.grid[2] % a.grid[1]);
  const int64_t x = source_of(a, 2, pixel % a.grid[2]);
  const bool inside = z >= 0 && y >= 0 && x >= 0;
  const int64_t from = (z * a.in[1] + y) * a.in[2] + x, in = a.in[0] * a.in[1] * a.in[2];
  const int64_t group = a.channels / a.groups;  // channels of a group in x
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j) {
    int code = codes.zero;
    const int64_t at = first + j;
    const int64_t c = a.depthwise ? at : at / a.group_channels * group + at % a.group_channels;
    const bool channel = a.depthwise ? c < a.channels : at % a.group_channels < group;
    if (inside && channel) {
      const int64_t k =
          a.x_channels_last ? (n * in + from) * a.channels + c : (n * a.channels + c) * in + from;
      if constexpr (kType == DType::i8) {
        code = static_cast<const int8_t*>(a.x)[k];
      } else {
        code = encode(load_element<kType>(a.x, k), Format::int8, affine, a.symmetric);
      }
    }
    word |= static_cast<uint32_t>(code & 0xff) << j * 8;
  }
  reinterpret_cast<uint32_t*>(image)[i] = word;
}

}  // namespace

void conv_prepare(const ConvArgs& a, const ConvTables& tables, Range* ranges, ImageCodes* codes,
                  uint8_t* image, int piece, Stream stream) {
  if (a.x_type != DType::i8) {
    for_float(a.x_type, [&](auto type) {
      launch(range_kernel<decltype(type)::value>, static_cast<unsigned>(kRangeParts * a.batch),
             kThreads, kRangeBytes, stream, a, ranges);
    });
  }
  const dim3 grid(static_cast<unsigned>(max(a.batch, a.blocks())));
  launch(setup_kernel, grid, kWarp, 0, stream, a, ranges, codes, tables, piece);
  if (image == nullptr) return;
  const int64_t words = a.batch * a.image_codes() / 4;
  if (a.x_type == DType::i8) {
    launch(image_kernel<DType::i8>, blocks_for(words, kThreads), kThreads, 0, stream, a, image);
    return;
  }
  for_float(a.x_type, [&](auto type) {
    launch(image_kernel<decltype(type)::value>, blocks_for(words, kThreads), kThreads, 0, stream, a,
           image);
  });
}

}  // namespace qkernels::cuda
