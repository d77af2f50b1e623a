// How a GPU runs conv: by its own kernels with int8 activations, otherwise by torch's convolution
// of the weight dequantized.
#include <algorithm>

#include "ops/aten.h"
#include "ops/conv.h"
#include "ops/geometry.h"

namespace qkernels {

void run_conv_int8(const ConvArgs& a, const Layout&) {
  // Places in an image and the tiles of a call are counted in 32 bits.
  const int64_t pixels = a.batch * a.pixels();
  if (std::max({a.image_codes(), pixels, a.batch * 32}) > INT32_MAX || a.groups > 65535) {
    fail("conv", "x is too large for one call on a GPU, with ", a.image_codes(),
         " codes in an image and ", pixels, " pixels of results; split the batch");
  }
  const Tensor workspace = workspace_on_device(cuda::conv_int8_workspace(a));
  cuda::conv_int8(a, workspace.mutable_data_ptr(), current_stream());
}

namespace {

// [first, second, spatial dimensions from `from` on], of three.
Shape image_shape(int64_t first, int64_t second, const int64_t (&spatial)[3], int from) {
  Shape shape{first, second};
  shape.insert(shape.end(), spatial + from, spatial + 3);
  return shape;
}

// Strides of [first, channels, spatial...] whose channels are innermost, `pixel` elements for each
// place.
Shape channels_last_strides(const Shape& shape, int64_t pixel) {
  Shape strides(shape.size(), 1);
  int64_t stride = pixel;
  for (size_t i = shape.size(); i-- > 2;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  strides[0] = stride;
  return strides;
}

// Zeros between the elements of x: what torch calls transposed. With a stride of 1 it is a plain
// convolution, of the weight as it is stored.
bool is_transposed(const ConvArgs& a) { return std::max({a.step[0], a.step[1], a.step[2]}) > 1; }

// The weight as torch has it: [out_channels, group_channels, kernel], of a transposed convolution
// [channels, group_outputs, kernel] with its taps in reverse. The numbers are of the packed matrix,
// and must outlive the result.
Tensor float_weight(const ConvArgs& a, const ConvPacking& packing, const Tensor& numbers,
                    int from) {
  const ScalarType type = scalar_type(a.x_type);
  const int64_t channels = a.channels / a.groups, outputs = a.group_outputs();
  const Shape plain = image_shape(a.out_channels, channels, a.kernel, from);
  const Shape strides = channels_last_strides(plain, packing.channels);
  const void* data = numbers.const_data_ptr();
  if (!is_transposed(a)) return view_on_device(data, plain, strides, type);
  Shape apart{a.groups, channels, outputs};
  Shape by{outputs * packing.columns, 1, packing.columns};
  Shape together{a.channels, outputs}, spatial;
  for (size_t i = 2; i < plain.size(); ++i) {
    spatial.push_back(static_cast<int64_t>(apart.size()));
    apart.push_back(plain[i]);
    by.push_back(strides[i]);
    together.push_back(plain[i]);
  }
  return torch::stable::reshape(flip(view_on_device(data, apart, by, type), spatial), together);
}

// The last dimension first, as `pad` takes them: what to add in front and behind.
using Amounts = std::vector<int64_t>;

// x . weight at the places that the arguments ask for. Torch pads both sides alike; where that
// does not do, zeros are added to x (or taken off), or to the result of a transposed convolution.
Tensor convolve(const ConvArgs& a, const Tensor& x, const Tensor& weight, int from) {
  ConvolutionGeometry g{{}, {}, {}, {}, is_transposed(a), a.groups};
  Amounts amounts;
  bool plain = true;
  for (int i = from; i < 3; ++i) {
    const int64_t reach = a.dilation[i] * (a.kernel[i] - 1);
    g.dilation.push_back(a.dilation[i]);
    if (g.transposed) {
      const int64_t before = reach - a.before[i], whole = (a.in[i] - 1) * a.step[i] + reach + 1;
      const int64_t more = a.out[i] - (whole - 2 * before);  // output_padding
      g.stride.push_back(a.step[i]);
      g.padding.push_back(before);
      g.output_padding.push_back(more);
      plain &= before >= 0 && more >= 0 && more < std::max(a.step[i], a.dilation[i]);
      amounts.insert(amounts.begin(), {-before, a.out[i] - whole + before});
    } else {
      const int64_t before = a.before[i];
      const int64_t reached = (a.out[i] - 1) * a.stride[i] + reach + 1;
      const int64_t room = a.in[i] + 2 * before - reach - 1;
      g.stride.push_back(a.stride[i]);
      g.padding.push_back(before);
      g.output_padding.push_back(0);
      plain &= before >= 0 && room >= 0 && room / a.stride[i] + 1 == a.out[i];
      amounts.insert(amounts.begin(), {before, reached - a.in[i] - before});
    }
  }
  if (plain) return convolution(x, weight, g);
  std::fill(g.padding.begin(), g.padding.end(), 0);
  std::fill(g.output_padding.begin(), g.output_padding.end(), 0);
  if (g.transposed) return torch::stable::pad(convolution(x, weight, g), amounts);
  return convolution(torch::stable::pad(x, amounts), weight, g);
}

}  // namespace

void run_conv_float(const ConvArgs& a, const ConvWeight& w) {
  const ConvPacking& p = w.packing;
  const ScalarType type = scalar_type(a.x_type);
  const Tensor numbers = empty_on_device({a.out_channels, p.columns}, type);
  cuda::dequantize_packed({a.packed, w.layout, w.shape, p.groups, p.rows, 0, p.columns,
                           numbers.mutable_data_ptr(), a.x_type},
                          current_stream());
  // Dimensions that x lacks are left out, as far as torch lets them; its lines are images of one.
  const int from = a.in[0] == 1 && a.kernel[0] == 1 && a.before[0] == 0 && a.out[0] == 1 ? 1 : 0;
  const Shape shape = image_shape(a.batch, a.channels, a.in, from);
  const Tensor x = a.x_channels_last
                       ? view_on_device(a.x, shape, channels_last_strides(shape, a.channels), type)
                       : view_on_device(a.x, shape, type);
  const Tensor sums =
      in_order(convolve(a, x, float_weight(a, p, numbers, from), from), a.y_channels_last);
  cuda::finish(
      {sums.const_data_ptr(), a.y, a.y_type, a.batch * a.out_channels * a.pixels(), a.out_channels,
       a.y_channels_last ? 1 : a.pixels(), a.bias, a.bias_type, a.epilogue},
      current_stream());
}

}  // namespace qkernels
