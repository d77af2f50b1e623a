// quantize_with: codes for given scales. A thread turns eight consecutive elements of a row into
// codes, so that 16-bit x is read and 8-bit codes are written in whole vectors.
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

// Codes as they lie in memory.
template <Format kFormat, bool kVectors>
QK_DEVICE void store_codes(uint8_t* row, int64_t begin, const int (&codes)[kEight], int count) {
  constexpr int kBits = info(kFormat).bits;
  uint32_t words[kBits / 4] = {};
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const uint32_t code = static_cast<uint32_t>(codes[i]) & ((1u << kBits) - 1);
    words[i * kBits / 32] |= code << i * kBits % 32;
  }
  uint8_t* to = row + begin * kBits / 8;
  if constexpr (kVectors && kBits == 16) {
    store_128(to, make_uint4(words[0], words[1], words[2], words[3]));
  } else if constexpr (kVectors && kBits == 8) {
    store_64(to, make_uint2(words[0], words[1]));
  } else if constexpr (kVectors) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else {
    const int bytes = (count * kBits + 7) / 8;
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      if (i < bytes) to[i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
    }
  }
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    quantize_with_kernel(const QuantizeArgs a, int64_t units, int64_t row_units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = unit / row_units, begin = unit % row_units * kEight;
  const int count = static_cast<int>(min(a.cols - begin, static_cast<int64_t>(kEight)));

  float x[kEight] = {};
  if constexpr (kVectors) {
    load_eight<kType>(x, a.x, row * a.cols + begin);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) x[i] = load_element<kType>(a.x, row * a.cols + begin + i);
    }
  }
  int64_t group = begin / a.group_size;
  int64_t left = (group + 1) * a.group_size - begin;  // of this group
  Affine affine = affine_at<kFormat>(a, row, group);
  int codes[kEight] = {};
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (left == 0 && i < count) {
      affine = affine_at<kFormat>(a, row, ++group);
      left = a.group_size;
    }
    --left;
    codes[i] = i < count ? encode(x[i], kFormat, affine, a.symmetric) : 0;
  }
  uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
  store_codes<kFormat, kVectors>(out, begin, codes, count);
}

}  // namespace

void quantize_with(const QuantizeArgs& a, int64_t rows, Stream stream) {
  const int64_t row_units = (a.cols + kEight - 1) / kEight;
  const int64_t units = rows * row_units;
  const dim3 grid(blocks_for(units, kThreads));
  const bool vectors = vectors_fit(a.x, a.cols) && vectors_fit(a.data, a.cols);
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
