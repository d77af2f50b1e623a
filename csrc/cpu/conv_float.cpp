// Convolutions whose activations stay floats: rows for `linear`, and the depthwise one.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace qkernels {
namespace {

// Where output pixel `i` begins.
struct Corner {
  int64_t image, pixel;
  int64_t grid[3];
};
Corner corner_of(const ConvArgs& a, int64_t i) {
  const int64_t pixel = i % a.pixels();
  return {i / a.pixels(),
          pixel,
          {pixel / (a.out[1] * a.out[2]) * a.stride[0], pixel / a.out[2] % a.out[1] * a.stride[1],
           pixel % a.out[2] * a.stride[2]}};
}

// Calls body(tap, pixel of x) for the taps of a corner; the pixel is -1 where there are zeros.
template <class Body>
void for_taps(const ConvArgs& a, const Corner& corner, const Body& body) {
  int64_t tap = 0;
  for (int64_t z = 0; z < a.kernel[0]; ++z) {
    const int64_t from_z = conv_source(a, 0, corner.grid[0] + z * a.dilation[0]);
    for (int64_t y = 0; y < a.kernel[1]; ++y) {
      const int64_t from_y = conv_source(a, 1, corner.grid[1] + y * a.dilation[1]);
      for (int64_t x = 0; x < a.kernel[2]; ++x, ++tap) {
        const int64_t from_x = conv_source(a, 2, corner.grid[2] + x * a.dilation[2]);
        const bool inside = from_z >= 0 && from_y >= 0 && from_x >= 0;
        body(tap, inside ? (from_z * a.in[1] + from_y) * a.in[2] + from_x : -1);
      }
    }
  }
}

template <class Element>
void gather(const ConvArgs& a, int64_t group, int64_t begin, int64_t end, Element* rows) {
  const int64_t channels = a.channels / a.groups, plane = a.in[0] * a.in[1] * a.in[2];
  const Element* x = static_cast<const Element*>(a.x);
  for (int64_t i = begin; i < end; ++i) {
    const Corner corner = corner_of(a, i);
    Element* row = rows + (i - begin) * a.taps() * a.group_channels;
    for_taps(a, corner, [&](int64_t tap, int64_t pixel) {
      Element* to = row + tap * a.group_channels;
      const int64_t there = pixel < 0 ? 0 : channels;
      std::memset(to + there, 0, static_cast<size_t>(a.group_channels - there) * sizeof(Element));
      if (pixel < 0) return;
      if (a.x_channels_last) {
        const int64_t at = (corner.image * plane + pixel) * a.channels + group * channels;
        std::memcpy(to, x + at, static_cast<size_t>(channels) * sizeof(Element));
      } else {
        const int64_t at = (corner.image * a.channels + group * channels) * plane + pixel;
        for (int64_t c = 0; c < channels; ++c) to[c] = x[at + c * plane];
      }
    });
  }
}

}  // namespace

void gather_pixels(const ConvArgs& a, int64_t group, int64_t begin, int64_t end, void* rows) {
  if (a.x_type == DType::f32) {
    gather(a, group, begin, end, static_cast<uint32_t*>(rows));
  } else {
    gather(a, group, begin, end, static_cast<uint16_t*>(rows));
  }
}

void depthwise_float(const ConvArgs& a, const float* weight, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 64;  // channels
  const int64_t plane = a.in[0] * a.in[1] * a.in[2];
  for (int64_t i = begin; i < end; ++i) {
    const Corner corner = corner_of(a, i);
    for (int64_t first = 0; first < a.channels; first += kPiece) {
      const int64_t count = a.channels - first < kPiece ? a.channels - first : kPiece;
      float sums[kPiece] = {};
      for_taps(a, corner, [&](int64_t tap, int64_t pixel) {
        if (pixel < 0) return;
        const int64_t at = a.x_channels_last ? (corner.image * plane + pixel) * a.channels + first
                                             : (corner.image * a.channels + first) * plane + pixel;
        const int64_t next = a.x_channels_last ? 1 : plane;
        for (int64_t c = 0; c < count; ++c) {
          sums[c] +=
              load_float(a.x, a.x_type, at + c * next) * weight[tap * a.channels + first + c];
        }
      });
      for (int64_t c = 0; c < count; ++c) {
        const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, first + c);
        const int64_t to = conv_output(a, corner.image, corner.pixel, first + c);
        store_float(a.y, a.y_type, to, apply_epilogue(sums[c] + bias, a.epilogue));
      }
    }
  }
}

}  // namespace qkernels
