// dequantize_packed: a packed weight as the matrix of floats that it stands for, in one pass. A
// thread reads 16 bytes, which its warp's neighbours continue, and writes eight numbers to a row of
// the matrix for each eight codes in them; four threads side by side write to the same row.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/packed.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitVectors = kCudaUnit / 16;

// The vectors of a packed row that hold the columns.
struct Span {
  int64_t first, count;
};

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    dequantize_packed_kernel(const DequantizePackedArgs a, Span span, int64_t vectors) {
  constexpr int kEights = 16 / kEightBytes<kFormat>, kWords = 4 / kEights;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const BlockShape& s = a.shape;
  const int64_t block = divide(i, span.count), vector = span.first + i - block * span.count;
  const int64_t blocks = (a.n + kLanes - 1) / kLanes, matrix = divide(block, blocks);
  const uint8_t* row = a.packed + block * s.bytes;
  const uint4 v = load_128(row + vector * 16);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const EightPlace place = eight_in_memory<kFormat>(vector * kEights + j);
    const int64_t n = (block - matrix * blocks) * kLanes + place.lane;
    const int64_t group = min(divide(place.kp, s.group_padded), s.groups - 1);
    const int64_t offset = place.kp - s.padded_begin(group);
    const int64_t left = s.group_length(group) - offset;
    if (n >= a.n || left <= 0) continue;  // what fills up blocks and groups
    EightCodes codes;
    codes.words[0] = kWords == 2 ? words[j * kWords] : swap_nibbles(swap_bytes(words[j * kWords]));
    codes.words[1] = kWords == 2 ? words[j * kWords + 1] : 0;
    const float scale = packed_scale(row, a.layout, s, group, place.lane);
    const int zero = packed_zero<kFormat>(row, a.layout, s, group, place.lane);
    float y[kEight];
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      y[e] = decode(code_of<kFormat>(codes, e), kFormat, scale, zero);
    }
    const int64_t k = s.group_begin(group) + offset, width = a.k_end - a.k_begin;
    const int64_t at = (matrix * a.n + n) * width + k - a.k_begin;
    if constexpr (kVectors) {
      if (k >= a.k_begin && k < a.k_end) store_eight<kType>(a.y, at, y);
    } else {
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        if (e < left && k + e >= a.k_begin && k + e < a.k_end) {
          store_element<kType>(a.y, at + e, y[e]);
        }
      }
    }
  }
}

Span span_of(const DequantizePackedArgs& a) {
  const BlockShape& s = a.shape;
  const int64_t unit = kUnitVectors * 16 * 8 / (kLanes * info(a.layout.format).bits);  // of k
  const auto padded = [&](int64_t k) {
    const int64_t group = k / s.group_size;
    return s.padded_begin(group) + k - s.group_begin(group);
  };
  const int64_t first = padded(a.k_begin) / unit, last = padded(a.k_end - 1) / unit;
  return {first * kUnitVectors, (last - first + 1) * kUnitVectors};
}

}  // namespace

void dequantize_packed(const DequantizePackedArgs& a, Stream stream) {
  if (a.matrices == 0 || a.n == 0 || a.k_begin == a.k_end) return;
  const Span span = span_of(a);
  const int64_t vectors = a.matrices * ((a.n + kLanes - 1) / kLanes) * span.count;
  const bool eights = reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && a.k_begin % kEight == 0 &&
                      a.k_end % kEight == 0 && a.shape.k % kEight == 0 &&
                      (a.shape.groups == 1 || a.shape.group_size % kEight == 0);
  for_packed(a.layout.format, [&](auto format) {
    for_float(a.y_type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      const auto kernel = eights ? dequantize_packed_kernel<kFormat, kType, true>
                                 : dequantize_packed_kernel<kFormat, kType, false>;
      launch(kernel, dim3(blocks_for(vectors, kThreads)), kThreads, 0, stream, a, span, vectors);
    });
  });
}

}  // namespace qkernels::cuda
