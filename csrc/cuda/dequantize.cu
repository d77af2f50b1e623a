// dequantize. A thread turns eight consecutive codes of a row into floats.
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
  if (a.zero_point != nullptr) zero = load_zero_point(a.zero_point, kFormat, at);
  if (kFormat == Format::int4) zero &= 15;  // nobody has looked at the values
  return {load_float(a.scale, a.scale_type, at), zero};
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const DequantizeArgs a, int64_t units, int64_t row_units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = unit / row_units, begin = unit % row_units * kEight;
  const int count = static_cast<int>(min(a.cols - begin, static_cast<int64_t>(kEight)));
  constexpr int kBits = info(kFormat).bits;

  const uint8_t* from = static_cast<const uint8_t*>(a.data) + row * a.row_bytes + begin * kBits / 8;
  uint32_t words[kBits / 4] = {};
  if constexpr (kVectors && kBits == 16) {
    const uint4 v = load_128(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kVectors && kBits == 8) {
    const uint2 v = load_64(from);
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (kVectors) {
    words[0] = load_32(from);
  } else {
    const int bytes = (count * kBits + 7) / 8;
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      if (i < bytes) words[i / 4] |= static_cast<uint32_t>(from[i]) << i % 4 * 8;
    }
  }

  int64_t group = begin / a.group_size;
  int64_t left = (group + 1) * a.group_size - begin;  // of this group
  Group g = group_at<kFormat>(a, row, group);
  float y[kEight] = {};
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (left == 0 && i < count) {
      g = group_at<kFormat>(a, row, ++group);
      left = a.group_size;
    }
    --left;
    const uint32_t code = words[i * kBits / 32] >> i * kBits % 32 & ((1u << kBits) - 1);
    const int value = kFormat == Format::int8    ? static_cast<int8_t>(code)
                      : kFormat == Format::int16 ? static_cast<int16_t>(code)
                                                 : static_cast<int>(code);
    y[i] = decode(value, kFormat, g.scale, g.zero);
  }
  if constexpr (kVectors) {
    store_eight<kType>(a.y, row * a.cols + begin, y);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) store_element<kType>(a.y, row * a.cols + begin + i, y[i]);
    }
  }
}

}  // namespace

void dequantize(const DequantizeArgs& a, int64_t rows, Stream stream) {
  const int64_t row_units = (a.cols + kEight - 1) / kEight;
  const int64_t units = rows * row_units;
  const dim3 grid(blocks_for(units, kThreads));
  const bool vectors = vectors_fit(a.data, a.cols) && vectors_fit(a.y, a.cols);
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
