// What the kernels of conv share: the image that they read, and the way from exact sums to y.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/int8.cuh"

namespace qkernels::cuda {

// Codes that lie side by side in the image and in the packed weight (depthwise: a tap).
struct ConvPiece {
  int32_t offset;  // in codes from a pixel's corner; -1 in the weight's padding
  int32_t tap;     // modulo 32
};

// Memory of a call on the device, besides ConvArgs::image and codes.
struct ConvTables {
  ConvPiece* pieces;     // of 16 or 4 codes, of a packed row
  int32_t* weight_sums;  // [blocks][16]: of the weight's codes, where images have zero points
};

// ---- From pixels of y to the image --------------------------------------------------------------

// What a pixel of y is made of. The image is x itself where `before` says that zeros are missing in
// front of it; then taps may lie outside of it.
struct ConvWindow {
  int64_t corner;  // where the first tap is, in codes from the first image on
  uint32_t taps;   // bit i: tap i modulo 32 is inside of the image
};

// Bit i: tap i of a dimension, of which tap 0 is at `at`, is inside of the image.
QK_DEVICE uint32_t taps_inside(const ConvArgs& a, int dim, int at) {
  const int taps = static_cast<int>(a.kernel[dim]), step = static_cast<int>(a.dilation[dim]);
  const uint32_t extent = static_cast<uint32_t>(a.grid[dim]);
  uint32_t bits = 0;
  for (int i = 0; i < taps; ++i, at += step) {
    bits |= static_cast<uint32_t>(static_cast<uint32_t>(at) < extent) << i;
  }
  return bits;
}

// `borders`: whether taps may be outside; there are at most 32 of them then.
QK_DEVICE ConvWindow window_of(const ConvArgs& a, int64_t pixel, bool borders) {
  const int64_t line = divide(pixel, a.out[2]), plane = divide(line, a.out[1]);
  const int64_t n = divide(plane, a.out[0]);
  const int64_t z = (plane - n * a.out[0]) * a.stride[0] - a.before[0];
  const int64_t y = (line - plane * a.out[1]) * a.stride[1] - a.before[1];
  const int64_t x = (pixel - line * a.out[2]) * a.stride[2] - a.before[2];
  ConvWindow window{n * a.image_codes() + ((z * a.grid[1] + y) * a.grid[2] + x) * a.pixel_codes(),
                    ~0u};
  if (!borders) return window;
  const uint32_t planes = taps_inside(a, 0, static_cast<int>(z));
  const uint32_t lines = taps_inside(a, 1, static_cast<int>(y));
  const uint32_t row = taps_inside(a, 2, static_cast<int>(x));
  const int width = static_cast<int>(a.kernel[2]), height = static_cast<int>(a.kernel[1]);
  window.taps = 0;
  for (int i = 0; i < a.kernel[0]; ++i) {
    for (int j = 0; j < height; ++j) {
      if ((planes >> i & lines >> j & 1) != 0) window.taps |= row << (i * height + j) * width;
    }
  }
  return window;
}

// Where a tap of the kernel is in the image, counted in codes from a pixel's corner.
QK_DEVICE int64_t tap_offset(const ConvArgs& a, int64_t tap) {
  const int64_t line = tap / a.kernel[2];
  const int64_t x = tap - line * a.kernel[2], z = line / a.kernel[1], y = line - z * a.kernel[1];
  return ((z * a.dilation[0] * a.grid[1] + y * a.dilation[1]) * a.grid[2] + x * a.dilation[2]) *
         a.pixel_codes();
}

// ---- From sums to y -----------------------------------------------------------------------------

// Of four outputs side by side, for any pixel.
struct ConvOutputs {
  int count;  // of them that exist
  float scale[4], bias[4];
  int32_t weight_sum[4];  // 0 where images have no zero points
};

// How many of four outputs exist.
QK_DEVICE int count_of(int64_t left) {
  return static_cast<int>(max(int64_t{0}, min(left, int64_t{4})));
}

// From tables in shared memory, for four outputs of which `left` exist.
QK_DEVICE ConvOutputs load_conv_outputs(const float* scales, const float* biases,
                                        const int32_t* weight_sums, int64_t left) {
  ConvOutputs o{count_of(left), {}, {}, {}};
  const uint4 v[3] = {load_shared_128(scales), load_shared_128(biases),
                      load_shared_128(weight_sums)};
  std::memcpy(o.scale, &v[0], 16);
  std::memcpy(o.bias, &v[1], 16);
  std::memcpy(o.weight_sum, &v[2], 16);
  return o;
}

// Of output `lane` of a packed row, which is output `o` of y.
struct ConvOutput {
  float scale, bias;
  int32_t weight_sum;
};
QK_DEVICE ConvOutput load_conv_output(const ConvArgs& a, int64_t block, int lane, int64_t o,
                                      int32_t weight_sum) {
  return {load_float(a.packed + block * a.shape.bytes + a.shape.scales, a.scale_type, lane),
          a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, o), weight_sum};
}

// bytes_of without its table, which would be in local memory.
QK_DEVICE int element_bytes(DType type) {
  return type == DType::f32 ? 4 : type == DType::i8 ? 1 : 2;
}

// For all pixels and outputs.
struct ConvResults {
  float residual_scale;
  int residual_zero;
  Encoder encoder;  // of y
  int64_t step;     // from an output to the next, in elements of y
  bool vectors;     // four outputs lie side by side, and at a multiple of four elements
};

QK_DEVICE ConvResults load_conv_results(const ConvArgs& a) {
  ConvResults r{};
  if (a.residual != nullptr && a.residual_type == DType::i8) {
    const GivenCodes& c = a.residual_codes;
    r.residual_scale = *c.device_scale;
    r.residual_zero = c.device_zero == nullptr ? 0 : *c.device_zero;
  }
  if (a.y_type == DType::i8) {
    const GivenCodes& c = a.y_codes;
    const int zero = c.device_zero == nullptr ? 0 : *c.device_zero;
    r.encoder = make_encoder({1.0f, 1.0f / *c.device_scale, zero}, false);
  }
  r.step = a.y_channels_last ? 1 : a.pixels();
  const uintptr_t piece = 4 * static_cast<uintptr_t>(element_bytes(a.residual_type));
  r.vectors = a.y_channels_last && a.out_channels % 4 == 0 && a.group_outputs() % 4 == 0 &&
              reinterpret_cast<uintptr_t>(a.residual) % piece == 0;
  return r;
}

// Where y has output `o` of a pixel, counted over all images, of which image `n` has it.
QK_DEVICE int64_t place_in_y(const ConvArgs& a, int64_t pixel, int64_t n, int64_t o) {
  return a.y_channels_last ? pixel * a.out_channels + o
                           : (n * (a.out_channels - 1) + o) * a.pixels() + pixel;
}

// The residual's four elements at places `at`, `at` + step and so on, as they lie in memory.
QK_DEVICE uint4 load_residual(const ConvArgs& a, const ConvResults& r, int64_t at, int count) {
  if (a.residual == nullptr) return make_uint4(0, 0, 0, 0);
  const int bytes = element_bytes(a.residual_type);
  const uint8_t* const from = static_cast<const uint8_t*>(a.residual) + at * bytes;
  uint32_t words[4] = {};
  if (r.vectors && count == 4) {
    if (bytes == 4) return load_128(from);
    if (bytes == 2) {
      const uint2 v = load_64(from);
      return make_uint4(v.x, v.y, 0, 0);
    }
    return make_uint4(load_32(from), 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    const uint8_t* const element = from + i * r.step * bytes;
    if (bytes == 4) {
      words[i] = *reinterpret_cast<const uint32_t*>(element);
    } else if (bytes == 2) {
      const uint32_t bits = *reinterpret_cast<const uint16_t*>(element);
      words[i / 2] |= bits << i % 2 * 16;
    } else {
      words[0] |= static_cast<uint32_t>(*element) << i * 8;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

QK_DEVICE void add_residual(float (&y)[4], const ConvArgs& a, const ConvResults& r, uint4 v) {
  if (a.residual == nullptr) return;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t half = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    if (a.residual_type == DType::i8) {
      const int code = static_cast<int8_t>(words[0] >> i * 8);
      y[i] += decode(code, Format::int8, r.residual_scale, r.residual_zero);
    } else if (a.residual_type == DType::f32) {
      y[i] += bit_cast<float>(words[i]);
    } else {
      y[i] += a.residual_type == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
    }
  }
}

QK_DEVICE void store_conv(const ConvArgs& a, const ConvResults& r, int64_t at, int count,
                          const float (&y)[4]) {
  uint32_t words[4];
  const bool codes = a.y_type == DType::i8, floats = a.y_type == DType::f32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (codes) {
      const uint32_t code = encode_low_byte(r.encoder, y[i]);
      words[i] = y[i] * r.encoder.inverse != y[i] * r.encoder.inverse ? r.encoder.zero : code;
    } else if (floats) {
      words[i] = bit_cast<uint32_t>(y[i]);
    } else {
      words[i] = a.y_type == DType::bf16 ? float_to_bf16(y[i]) : float_to_f16(y[i]);
    }
  }
  if (r.vectors && count == 4) {
    if (codes) {
      static_cast<uint32_t*>(a.y)[at / 4] = low_bytes(words[0], words[1], words[2], words[3]);
    } else if (floats) {
      store_128(static_cast<uint32_t*>(a.y) + at,
                make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      store_64(static_cast<uint16_t*>(a.y) + at,
               make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    const int64_t to = at + i * r.step;
    if (codes) {
      static_cast<uint8_t*>(a.y)[to] = static_cast<uint8_t>(words[i]);
    } else if (floats) {
      static_cast<uint32_t*>(a.y)[to] = words[i];
    } else {
      static_cast<uint16_t*>(a.y)[to] = static_cast<uint16_t>(words[i]);
    }
  }
}

// y's elements of four outputs of a pixel of an image with `scale` and `zero`. `sums` are the exact
// sums of the products of codes; what the zero point adds to them is taken off.
QK_DEVICE void finish_conv(const ConvArgs& a, const ConvResults& r, const ConvOutputs& o,
                           float scale, int zero, int64_t at, uint4 residual,
                           const uint32_t (&sums)[4]) {
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t sum = static_cast<int32_t>(sums[i]) - zero * o.weight_sum[i];
    y[i] = std::fma(scale, static_cast<float>(sum) * o.scale[i], o.bias[i]);
  }
  add_residual(y, a, r, residual);
  apply_epilogue(y, a.epilogue);
  store_conv(a, r, at, o.count, y);
}

// ---- Kernels ------------------------------------------------------------------------------------

// Blocks that share the search for an image's range.
inline constexpr int kRangeParts = 32;

// Fills `codes`, the tables that there are, and the image unless it is null: x itself. `ranges` has
// room for kRangeParts of each image.
void conv_prepare(const ConvArgs& a, const ConvTables& tables, Range* ranges, ImageCodes* codes,
                  uint8_t* image, int piece, Stream stream);
// `borders`: taps may lie outside of the image, and count as 0 there.
void conv_tiles(const ConvArgs& a, const ConvTables& tables, int piece, bool borders,
                Stream stream);
void conv_depthwise(const ConvArgs& a, const ConvTables& tables, bool borders, Stream stream);
// Where conv_takes_warpgroups, and the image is less than 2^31 pieces of 32 codes. Without
// ConvArgs::codes all images have the scale and the zero point of x.
void conv_warpgroups(const ConvArgs& a, bool borders, Stream stream);

}  // namespace qkernels::cuda
