// What the kernels of conv share: the image that they read, and the way from exact sums to y.
#pragma once

#include "cuda/ptx.cuh"

namespace qkernels::cuda {

// Memory of a call on the device, besides ConvArgs::image and codes.
struct ConvTables {
  // For every piece of a packed row's k (16 or 4 codes; depthwise: for every tap) where in the image
  // it is, counted in codes from a pixel's corner; -1 in the padding.
  int32_t* pieces;
  int32_t* weight_sums;  // [blocks][16]: of the weight's codes, where images have zero points
};

// y's element of output `o` and pixel `pixel`, counted over all images. `sum` is the exact sum of the
// products of codes; what the zero point adds to it is taken off.
QK_DEVICE void finish_conv(const ConvArgs& a, int64_t pixel, int64_t o, int32_t sum,
                           const uint8_t* packed, int lane, int32_t weight_sum) {
  const int64_t n = pixel / a.pixels();
  const ImageCodes& codes = a.codes[n];
  sum -= codes.zero * weight_sum;
  const float scale = load_float(packed + a.shape.scales, a.scale_type, lane);
  const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, o);
  float y = std::fma(codes.scale, static_cast<float>(sum) * scale, bias);
  const int64_t at = a.y_channels_last
                         ? pixel * a.out_channels + o
                         : (n * a.out_channels + o) * a.pixels() + (pixel - n * a.pixels());
  if (a.residual != nullptr) {
    if (a.residual_type == DType::i8) {
      const int zero = a.residual_codes.device_zero == nullptr ? 0 : *a.residual_codes.device_zero;
      y += decode(static_cast<const int8_t*>(a.residual)[at], Format::int8,
                  *a.residual_codes.device_scale, zero);
    } else {
      y += load_float(a.residual, a.residual_type, at);
    }
  }
  y = apply_epilogue(y, a.epilogue);
  if (a.y_type == DType::i8) {
    const int zero = a.y_codes.device_zero == nullptr ? 0 : *a.y_codes.device_zero;
    const Affine affine{1.0f, 1.0f / *a.y_codes.device_scale, zero};
    static_cast<int8_t*>(a.y)[at] = static_cast<int8_t>(encode_integer(y, affine, -128, 127));
  } else {
    store_float(a.y, a.y_type, at, y);
  }
}

// Where the kernel's first tap is for a pixel of y, counted in codes from the first image on.
QK_DEVICE int64_t corner_of(const ConvArgs& a, int64_t pixel) {
  const int64_t n = pixel / a.pixels(), at = pixel - n * a.pixels();
  const int64_t line = at / a.out[2];
  const int64_t x = at - line * a.out[2], z = line / a.out[1], y = line - z * a.out[1];
  const int64_t corner =
      (z * a.stride[0] * a.grid[1] + y * a.stride[1]) * a.grid[2] + x * a.stride[2];
  return n * a.image_codes() + corner * a.pixel_codes();
}

// Where a tap of the kernel is in the image, counted in codes from a pixel's corner.
QK_DEVICE int64_t tap_offset(const ConvArgs& a, int64_t tap) {
  const int64_t line = tap / a.kernel[2];
  const int64_t x = tap - line * a.kernel[2], z = line / a.kernel[1], y = line - z * a.kernel[1];
  return ((z * a.dilation[0] * a.grid[1] + y * a.dilation[1]) * a.grid[2] + x * a.dilation[2]) *
         a.pixel_codes();
}

// Blocks that share the search for an image's range.
inline constexpr int kRangeParts = 32;

// Fills the tables and `codes`, and the image unless it is x itself. `ranges` has room for kRangeParts
// of each image.
void conv_prepare(const ConvArgs& a, const ConvTables& tables, Range* ranges, ImageCodes* codes,
                  uint8_t* image, int piece, Stream stream);
void conv_tiles(const ConvArgs& a, const ConvTables& tables, int piece, Stream stream);
void conv_depthwise(const ConvArgs& a, const ConvTables& tables, Stream stream);

}  // namespace qkernels::cuda
