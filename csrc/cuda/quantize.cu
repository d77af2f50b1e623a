// quantize in one pass over memory where groups.cuh allows it, and quantize_with: codes for given
// scales. There a thread makes eight codes of one group where rows and groups consist of eights, so
// that 16-bit x is read and 8-bit codes are written in whole vectors; otherwise one code, or the
// two of a byte.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/groups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <Format kFormat, DType kElement>
struct QuantizeJob {
  static constexpr DType kType = kElement;
  static constexpr int kResident = 0;
  QuantizeArgs args;

  QK_DEVICE Affine settle(const Range& range, int64_t row, int64_t group, bool writes) const {
    const Affine affine = choose_affine(range, kFormat, args.symmetric, args.scale_type);
    if (writes) {
      const int64_t at = row * args.groups + group;
      store_float(args.scale, args.scale_type, at, affine.scale);
      if (!args.symmetric) store_zero_point(args.zero_point, kFormat, at, affine.zero_point);
    }
    return affine;
  }

  template <int kCount>
  QK_DEVICE void put(int64_t row, int64_t begin, const float (&x)[kCount],
                     const Affine& affine) const {
    int codes[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Of a group that has chosen its scale, all quotients are numbers, or none.
      codes[i] = kFormat == Format::nf4 ? encode_level(x[i] * affine.inverse)
                                        : encode_element<kFormat>(x[i], affine, args.symmetric);
    }
    if (kFormat == Format::nf4 && affine.inverse != affine.inverse) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) codes[i] = 7;
    }
    uint8_t* out = static_cast<uint8_t*>(args.data) + row * args.row_bytes;
    store_codes<kFormat>(out + begin * info(kFormat).bits / 8, codes);
  }
};

template <Format kFormat>
QK_DEVICE Affine affine_at(const QuantizeArgs& a, int64_t row, int64_t group) {
  const int64_t at = a.shared_scale ? 0 : row * a.groups + group;
  const float scale = load_float(a.scale, a.scale_type, at);
  int zero = symmetric_zero(kFormat);
  if (!a.symmetric) zero = given_zero_point<kFormat>(a.zero_point, at);
  return {scale, 1.0f / scale, zero};
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    quantize_with_kernel(const QuantizeArgs a, int64_t units, int64_t row_units) {
  constexpr int kUnit = unit_of(kFormat, kVectors);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = divide(unit, row_units), begin = (unit - row * row_units) * kUnit;

  float x[kUnit];
  if constexpr (kVectors) {
    load_eight<kType>(x, a.x, row * a.cols + begin);
  } else {
    for (int i = 0; i < kUnit; ++i) {
      x[i] = begin + i < a.cols ? load_element<kType>(a.x, row * a.cols + begin + i) : 0.0f;
    }
  }
  int64_t group = divide(begin, a.group_size);
  Affine affine = affine_at<kFormat>(a, row, group);
  int codes[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    codes[i] = 0;
    if (begin + i >= a.cols) continue;
    if (!kVectors && begin + i == (group + 1) * a.group_size) {
      affine = affine_at<kFormat>(a, row, ++group);
    }
    codes[i] = encode_element<kFormat>(x[i], affine, a.symmetric);
  }
  uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
  store_codes<kFormat>(out + begin * info(kFormat).bits / 8, codes);
}

QuantizeArgs split(const QuantizeArgs& whole, int64_t* rows) {
  QuantizeArgs a = whole;
  split_groups(&a, rows, info(a.format).bits);
  a.row_bytes = storage_bytes(a.format, a.cols);
  return a;
}

}  // namespace

int64_t quantize_workspace(const QuantizeArgs& whole, int64_t rows) {
  const QuantizeArgs a = split(whole, &rows);
  return one_pass(a, a.x_type, a.data) ? 0 : scales_workspace(scales_args(a, rows, a.x_type));
}

void quantize(const QuantizeArgs& whole, int64_t rows, void* workspace, Stream stream) {
  const QuantizeArgs a = split(whole, &rows);
  if (one_pass(a, a.x_type, a.data)) {
    for_format(a.format, [&](auto format) {
      for_float(a.x_type, [&](auto type) {
        const QuantizeJob<decltype(format)::value, decltype(type)::value> job{a};
        launch_groups(job, rows, stream);
      });
    });
    return;
  }
  ScalesArgs scales = scales_args(a, rows, a.x_type);
  scales.scale = a.scale;
  scales.zero_point = a.zero_point;
  choose_scales(scales, workspace, stream);
  quantize_with(a, rows, stream);
}

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
