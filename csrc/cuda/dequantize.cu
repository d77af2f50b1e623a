// dequantize. A thread takes eight codes of one group where rows and groups consist of eights,
// otherwise one code, or the two of a byte.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

struct Group {
  float scale;
  int zero;
};

template <Format kFormat>
QK_DEVICE Group group_at(const DequantizeArgs& a, int64_t row, int64_t group) {
  const int64_t at = a.shared_scale ? 0 : row * a.groups + group;
  int zero = symmetric_zero(kFormat);
  if (a.zero_point != nullptr) zero = given_zero_point<kFormat>(a.zero_point, at);
  return {load_float(a.scale, a.scale_type, at), zero};
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const DequantizeArgs a, int64_t units, int64_t row_units) {
  constexpr int kUnit = unit_of(kFormat, kVectors);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = divide(unit, row_units), begin = (unit - row * row_units) * kUnit;

  int codes[kUnit];
  const uint8_t* from = static_cast<const uint8_t*>(a.data) + row * a.row_bytes;
  load_codes<kFormat>(codes, from + begin * info(kFormat).bits / 8);
  int64_t group = divide(begin, a.group_size);
  Group g = group_at<kFormat>(a, row, group);
  float y[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (!kVectors && begin + i < a.cols && begin + i == (group + 1) * a.group_size) {
      g = group_at<kFormat>(a, row, ++group);
    }
    y[i] = decode(codes[i], kFormat, g.scale, g.zero);
  }
  if constexpr (kVectors) {
    store_eight<kType>(a.y, row * a.cols + begin, y);
  } else {
    for (int i = 0; i < kUnit && begin + i < a.cols; ++i) {
      store_element<kType>(a.y, row * a.cols + begin + i, y[i]);
    }
  }
}

}  // namespace

void dequantize(const DequantizeArgs& a, int64_t rows, Stream stream) {
  const bool vectors = vectors_fit(a.data, a) && vectors_fit(a.y, a);
  const int unit = unit_of(a.format, vectors);
  const int64_t row_units = (a.cols + unit - 1) / unit;
  const int64_t units = rows * row_units;
  const dim3 grid(blocks_for(units, kThreads));
  for_format(a.format, [&](auto format) {
    for_float(a.y_type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      const auto kernel = vectors ? dequantize_kernel<kFormat, kType, true>
                                  : dequantize_kernel<kFormat, kType, false>;
      launch(kernel, grid, kThreads, 0, stream, a, units, row_units);
    });
  });
}

}  // namespace qkernels::cuda
