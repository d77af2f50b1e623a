// quantize_with: codes for given scales. A thread makes eight codes of one group where rows and
// groups consist of eights, so that 16-bit x is read and 8-bit codes are written in whole vectors;
// otherwise one code, or the two of a byte.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <Format kFormat>
QK_DEVICE Affine affine_at(const QuantizeArgs& a, int64_t row, int64_t group) {
  const int64_t at = a.shared_scale ? 0 : row * a.groups + group;
  const float scale = load_float(a.scale, a.scale_type, at);
  int zero = symmetric_zero(kFormat);
  if (!a.symmetric) zero = load_zero_point(a.zero_point, kFormat, at);
  if (kFormat == Format::int4) zero &= 15;  // nobody has looked at the values
  return {scale, 1.0f / scale, zero};
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    quantize_with_kernel(const QuantizeArgs a, int64_t units, int64_t row_units) {
  constexpr int kUnit = unit_of(kFormat, kVectors);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = unit / row_units, begin = unit % row_units * kUnit;

  float x[kUnit];
  if constexpr (kVectors) {
    load_eight<kType>(x, a.x, row * a.cols + begin);
  } else {
    for (int i = 0; i < kUnit; ++i) {
      x[i] = begin + i < a.cols ? load_element<kType>(a.x, row * a.cols + begin + i) : 0.0f;
    }
  }
  int64_t group = begin / a.group_size;
  Affine affine = affine_at<kFormat>(a, row, group);
  int codes[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    codes[i] = 0;
    if (begin + i >= a.cols) continue;
    if (!kVectors && begin + i == (group + 1) * a.group_size) {
      affine = affine_at<kFormat>(a, row, ++group);
    }
    codes[i] = encode(x[i], kFormat, affine, a.symmetric);
  }
  uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
  store_codes<kFormat>(out + begin * info(kFormat).bits / 8, codes);
}

}  // namespace

void quantize_with(const QuantizeArgs& a, int64_t rows, Stream stream) {
  const bool vectors = vectors_fit(a.x, a) && vectors_fit(a.data, a);
  const int unit = unit_of(a.format, vectors);
  const int64_t row_units = (a.cols + unit - 1) / unit;
  const int64_t units = rows * row_units;
  const dim3 grid(blocks_for(units, kThreads));
  for_format(a.format, [&](auto format) {
    for_float(a.x_type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      const auto kernel = vectors ? quantize_with_kernel<kFormat, kType, true>
                                  : quantize_with_kernel<kFormat, kType, false>;
      launch(kernel, grid, kThreads, 0, stream, a, units, row_units);
    });
  });
}

}  // namespace qkernels::cuda
