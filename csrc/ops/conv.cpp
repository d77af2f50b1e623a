// conv: checks and allocation, for the CPU and for CUDA.
#include "ops/conv.h"

#include <algorithm>

#include "ops/geometry.h"

namespace qkernels {
namespace {

// ---- Geometry -----------------------------------------------------------------------------------

struct Geometry {
  std::vector<int64_t> kernel, stride, padding, dilation;
  bool transposed;
};

void set_geometry(const char* op, const Tensor& x, const Geometry& g, int64_t out_channels,
                  int64_t groups, ConvArgs* a) {
  const int64_t dims = x.dim() - 2;
  if (dims < 1 || dims > 3) {
    fail(op, "x must have shape (batch, channels, 1 to 3 spatial dimensions), got ", shape_text(x));
  }
  a->batch = x.size(0);
  a->channels = x.size(1);
  a->out_channels = out_channels;
  a->groups = groups;
  const auto kernel = spatial(op, "kernel_size", g.kernel, dims, 1, kConvTaps);
  const auto stride = spatial(op, "stride", g.stride, dims, 1, kLongest);
  const auto dilation = spatial(op, "dilation", g.dilation, dims, 1, kLongest);
  const int64_t given = static_cast<int64_t>(g.padding.size());
  if (given != dims && given != 2 * dims) {
    fail(op, "padding must have ", dims, " entries, or ", 2 * dims,
         " where the second half is behind x, got ", given);
  }
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t dim = i - (3 - dims);  // of x's spatial dimensions
    const int64_t before = dim < 0 ? 0 : g.padding[dim];
    const int64_t after = dim < 0 ? 0 : g.padding[given == dims ? dim : dims + dim];
    if (std::abs(before) > kLongest || std::abs(after) > kLongest) {
      fail(op, "padding must be from ", -kLongest, " to ", kLongest, ", got ", before, " and ",
           after);
    }
    a->in[i] = dim < 0 ? 1 : x.size(dim + 2);
    if (a->in[i] > INT64_MAX / 2 / kLongest) {  // expanded, or of no images
      fail(op, "x ", shape_text(x), " has a spatial dimension that is longer than memory");
    }
    a->kernel[i] = kernel[i];
    a->dilation[i] = dilation[i];
    const int64_t reach = dilation[i] * (kernel[i] - 1);
    if (g.transposed) {
      a->stride[i] = 1;
      a->step[i] = stride[i];
      a->before[i] = reach - before;
      a->out[i] = (a->in[i] - 1) * stride[i] - before - after + reach + 1;
    } else {
      a->stride[i] = stride[i];
      a->step[i] = 1;
      a->before[i] = before;
      const int64_t room = a->in[i] + before + after - reach - 1;
      a->out[i] = room < 0 ? 0 : room / stride[i] + 1;
    }
    if (a->in[i] < 1 || a->out[i] < 1) {
      fail(op, "the result would be empty: x ", shape_text(x), " with kernel_size ",
           text_of(g.kernel), ", padding ", text_of(g.padding), " and dilation ",
           text_of(g.dilation), " leaves no place for the kernel");
    }
    a->grid[i] = (a->out[i] - 1) * a->stride[i] + reach + 1;
  }
  double elements = static_cast<double>(std::max(a->channels, a->out_channels)) + kLanes;
  for (const int64_t size : a->grid) elements *= static_cast<double>(size);
  if (elements > kMostElements) {
    fail(op, "x with its padding would have ", elements, " elements, more than fit into memory");
  }
}

// ---- The op -------------------------------------------------------------------------------------

// Codes of x as they are given by scale and zero point, if they are.
bool check_x_codes(const char* op, const Tensor& x, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& zero_point, Activation activation, ConvArgs* a) {
  const bool is_codes = x.scalar_type() == ScalarType::Char;
  if (is_codes && (!scale || activation == Activation::float_)) {
    fail(op, "x holds int8 codes, which need x_scale and activation=1 (symmetric) or 2 ",
         "(asymmetric)");
  }
  if (scale && activation == Activation::float_) {
    fail(op, "x_scale is given but activation=0 keeps the activations float; pass activation=1 or ",
         "leave x_scale out");
  }
  if (zero_point && (!scale || activation != Activation::int8_asymmetric)) {
    fail(op, "x_zero_point needs x_scale and activation=2 (asymmetric)");
  }
  if (!scale) return false;
  read_codes(op, "x", *scale, zero_point, &a->x_codes);
  return true;
}

}  // namespace

Tensor conv(const Tensor& x_any, const Tensor& packed_any, const std::optional<Tensor>& bias_any,
            const std::optional<Tensor>& residual_any, const std::optional<Tensor>& x_scale,
            const std::optional<Tensor>& x_zero_point, const std::optional<Tensor>& residual_scale,
            const std::optional<Tensor>& residual_zero_point, const std::optional<Tensor>& y_scale,
            const std::optional<Tensor>& y_zero_point, int64_t layout_id, int64_t out_channels,
            int64_t groups, int64_t group_size, const std::vector<int64_t>& kernel_size,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool transposed, int64_t activation_code,
            int64_t epilogue, std::optional<ScalarType> dtype) {
  const DeviceGuard guard(x_any);
  const char* op = "conv";
  ConvArgs a{};
  const bool is_codes = on_device(x_any) && x_any.scalar_type() == ScalarType::Char;
  a.x_type = is_codes ? DType::i8 : check_float(op, "x", x_any);
  set_geometry(op, x_any, {kernel_size, stride, padding, dilation, transposed}, out_channels,
               groups, &a);
  if (groups < 1 || a.channels % groups != 0) {
    fail(op, "x has ", a.channels, " channels, which groups=", groups, " does not divide");
  }
  const ConvWeight w = check_conv_weight(op, layout_id, a.taps(), a.channels / groups, groups,
                                         out_channels, group_size);
  check_packed_shape(op, packed_any, w);
  a.depthwise = w.packing.depthwise;
  a.group_channels = w.packing.channels;
  a.shape = w.shape;
  a.scale_type = w.layout.scale;
  a.epilogue = check_epilogue(op, epilogue);

  // Products of codes that differ by up to 255 from their zero point.
  const Activation activation = check_activation(op, w.layout, 0, activation_code);
  const bool integer = activation != Activation::float_;
  const int64_t longest = max_accumulation(Format::int8, false);
  if (integer && (w.layout.format != Format::int8 || !w.layout.symmetric || group_size != -1)) {
    fail(op, "int8 activations need an int8 weight, symmetric, with a scale for each output ",
         "channel; pass activation=0 (float) for this weight");
  }
  if (integer && w.shape.k > longest) {
    fail(op, "an int32 sum over ", w.shape.k, " products can overflow (the limit is ", longest,
         "); keep the activations float");
  }
  a.symmetric = activation != Activation::int8_asymmetric;
  a.is_static = check_x_codes(op, x_any, x_scale, x_zero_point, activation, &a);

  ScalarType y_type = dtype ? *dtype : is_codes ? ScalarType::Float : x_any.scalar_type();
  if (y_scale) {
    if (!integer) fail(op, "y_scale needs int8 activations; pass activation=1 or 2");
    if (dtype && *dtype != ScalarType::Char) {
      fail(op, "y_scale gives int8 codes but dtype is ", dtype_text(*dtype), "; leave dtype out");
    }
    y_type = ScalarType::Char;
    a.y_type = DType::i8;
    read_codes(op, "y", *y_scale, y_zero_point, &a.y_codes);
    a.y_inverse = 1.0f / a.y_codes.scale;
    a.y_zero = a.y_codes.zero;
  } else {
    if (y_zero_point) fail(op, "y_zero_point needs y_scale");
    a.y_type = check_float_type(op, "dtype", y_type);
    if (!integer && a.y_type != a.x_type) {
      fail(op, "dtype must be that of x when the activations stay float");
    }
  }

  std::optional<Tensor> bias;
  if (bias_any) {
    a.bias_type = check_float(op, "bias", *bias_any);
    check_shape(op, "bias", *bias_any, {out_channels});
    bias = dense(*bias_any);
    a.bias = bias->const_data_ptr();
  }
  a.x_channels_last = is_channels_last(x_any);
  const Tensor x = a.x_channels_last ? x_any : dense(x_any);
  const Tensor packed = dense(packed_any);
  Shape shape{a.batch, out_channels};
  for (int64_t i = 5 - x.dim(); i < 3; ++i) shape.push_back(a.out[i]);
  a.y_channels_last = a.x_channels_last;
  Tensor y = empty_in_order(shape, y_type, a.y_channels_last);

  std::optional<Tensor> residual;
  if (residual_any) {
    if (!integer) fail(op, "residual needs int8 activations; add it to the result instead");
    const bool coded = on_device(*residual_any) && residual_any->scalar_type() == ScalarType::Char;
    if (coded != residual_scale.has_value()) {
      fail(op, "residual_scale goes with a residual of int8 codes, and only with that");
    }
    a.residual_type = coded ? DType::i8 : check_float(op, "residual", *residual_any);
    check_shape(op, "residual", *residual_any, shape);
    if (coded) {
      read_codes(op, "residual", *residual_scale, residual_zero_point, &a.residual_codes);
      a.residual_scale = a.residual_codes.scale;
      a.residual_zero = a.residual_codes.zero;
    }
    residual = in_order(*residual_any, a.y_channels_last);
    a.residual = residual->const_data_ptr();
  } else if (residual_scale || residual_zero_point) {
    fail(op, "residual_scale and residual_zero_point need residual");
  }

  if (y.numel() == 0) return y;
  a.x = x.const_data_ptr();
  a.packed = packed.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  if (integer) {
    run_conv_int8(a, w.layout);
  } else {
    run_conv_float(a, w);
  }
  return y;
}

}  // namespace qkernels

QK_OPS(m) {
  m.impl("conv", TORCH_BOX(&qkernels::conv));
  m.impl("conv_differentiable", TORCH_BOX(&qkernels::conv));
}
