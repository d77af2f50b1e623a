// embedding: rows of a packed weight, dequantized. A thread turns eight codes into floats, which it
// writes in whole vectors where rows and groups allow it.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/packed.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const EmbeddingArgs a, int64_t units, int64_t row_units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const BlockShape& s = a.shape;
  const int64_t i = divide(unit, row_units), kp = (unit - i * row_units) * kEight;
  const int64_t n = a.indices[i];
  device_assert(n >= 0 && n < a.n, "embedding: an index is out of range");
  const int64_t group = min(divide(kp, s.group_padded), s.groups - 1);
  const int64_t offset = kp - s.padded_begin(group);
  const int64_t left = s.group_length(group) - offset;
  if (left <= 0) return;  // what fills up a group
  const uint8_t* row = a.packed + n / kLanes * s.bytes;
  const int lane = static_cast<int>(n % kLanes);
  const EightCodes codes = load_packed<kFormat>(row, kp, lane);
  const float scale = packed_scale(row, a.layout, s, group, lane);
  const int zero = packed_zero<kFormat>(row, a.layout, s, group, lane);
  float y[kEight];
#pragma unroll
  for (int j = 0; j < kEight; ++j) y[j] = decode(code_of<kFormat>(codes, j), kFormat, scale, zero);
  const int64_t at = i * s.k + s.group_begin(group) + offset;
  if constexpr (kVectors) {
    store_eight<kType>(a.y, at, y);
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (j < left) store_element<kType>(a.y, at + j, y[j]);
    }
  }
}

}  // namespace

void embedding(const EmbeddingArgs& a, int64_t count, Stream stream) {
  const int64_t row_units = a.shape.k_padded / kEight, units = count * row_units;
  const bool vectors = reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && a.shape.k % kEight == 0 &&
                       a.shape.group_size % kEight == 0;
  for_packed(a.layout.format, [&](auto format) {
    for_float(a.y_type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      const auto kernel = vectors ? embedding_kernel<kFormat, kType, true>
                                  : embedding_kernel<kFormat, kType, false>;
      launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units, row_units);
    });
  });
}

}  // namespace qkernels::cuda
