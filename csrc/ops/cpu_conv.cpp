// conv on the CPU: checks, and with int8 activations workspace and threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/conv.h"
#include "ops/geometry.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Elements of x per thread below which starting another costs more than it gains.
constexpr int64_t kImageGrain = 16 * 1024;

// Images are taken as many at a time as their workspace stays below this.
constexpr int64_t kImageCap = int64_t{3} << 20;

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

// ---- Integer path -------------------------------------------------------------------------------

// The range of each of `count` images from image `first` on.
void find_codes(const ConvArgs& a, int64_t first, int64_t count, bool is_static, ImageCodes fixed,
                ImageCodes* codes) {
  if (a.x_type == DType::i8) return std::fill(codes, codes + count, fixed);
  const Kernels& table = kernels();
  const int64_t elements = a.channels * a.in[0] * a.in[1] * a.in[2];
  const int64_t pieces = (elements + 8 * kImageGrain - 1) / (8 * kImageGrain);
  const int64_t piece = pieces == 0 ? 0 : (elements + pieces - 1) / pieces;
  std::vector<Range> ranges(count * pieces);
  parallel(count * pieces, grain_for(kImageGrain, piece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (first + i / pieces) * elements, from = i % pieces * piece;
      ranges[i] = table.range(a.x, a.x_type, at + std::min(from, elements),
                              at + std::min(from + piece, elements));
    }
  });
  for (int64_t n = 0; n < count; ++n) {
    Range all;
    for (int64_t i = n * pieces; i < (n + 1) * pieces; ++i) {
      all.min = std::min(all.min, ranges[i].min);
      all.max = std::max(all.max, ranges[i].max);
      all.magnitude = std::max(all.magnitude, ranges[i].magnitude);
    }
    if (is_static) {
      codes[n] = fixed;
      if (!all.finite()) codes[n].scale = NAN;
    } else {
      const Affine affine = choose_affine(all, Format::int8, a.symmetric, DType::f32);
      codes[n] = {affine.scale, affine.inverse, affine.zero_point, all.finite()};
    }
  }
}

// Whether x is the image that the kernel slides over: nothing to quantize, to move or to fill in.
bool is_image(const ConvArgs& a) {
  if (a.x_type != DType::i8 || !a.x_channels_last || a.channels != a.pixel_codes()) return false;
  if (a.depthwise || a.compact) return false;  // these may read past the last code
  for (int i = 0; i < 3; ++i) {
    if (a.step[i] != 1 || a.before[i] != 0 || a.grid[i] > a.in[i]) return false;
  }
  return kernels().conv_reads_codes(a);
}

void run_integer(const ConvArgs& whole, const Layout& layout, bool is_static,
                 const ImageCodes& fixed) {
  const Kernels& table = kernels();
  ConvArgs a = whole;
  a.compact = !a.depthwise && a.groups == 1 && a.channels > 0 && a.channels < 4 &&
              a.kernel[2] > 1 && a.dilation[2] == 1 && table.conv_reads_codes(a);
  const BlockShape compact =
      a.compact ? block_shape(layout, a.taps() / a.kernel[2] * a.row_codes(), -1) : a.shape;
  const bool no_copy = is_image(a);
  if (no_copy) std::copy(a.in, a.in + 3, a.grid);
  const int64_t image_bytes = a.image_codes() * table.conv_code_bytes(a);
  const int64_t chunk =
      no_copy ? a.batch
              : std::min(a.batch, std::max<int64_t>(1, kImageCap / std::max<int64_t>(1, image_bytes)));
  const int64_t space = no_copy ? 0 : chunk * image_bytes + std::max(kLine, a.pixel_codes());
  const int64_t weights = a.compact ? a.blocks() * compact.bytes : 0;
  Workspace workspace(Workspace::bytes<uint8_t>(space) + Workspace::bytes<uint8_t>(weights) +
                      Workspace::bytes<ImageCodes>(chunk));
  uint8_t* const image = workspace.take<uint8_t>(space);
  if (a.compact) {
    uint8_t* const packed = workspace.take<uint8_t>(weights);
    compact_blocks(a, compact, packed);
    a.packed = packed;
    a.shape = compact;
  }
  ImageCodes* codes = workspace.take<ImageCodes>(chunk);
  a.codes = codes;
  const int64_t x_image = a.channels * a.in[0] * a.in[1] * a.in[2] * bytes_of(a.x_type);
  const int64_t y_image = a.out_channels * a.pixels();
  for (int64_t first = 0; first < whole.batch; first += chunk) {
    a.batch = std::min(chunk, whole.batch - first);
    a.x = static_cast<const uint8_t*>(whole.x) + first * x_image;
    a.y = static_cast<uint8_t*>(whole.y) + first * y_image * bytes_of(a.y_type);
    if (a.residual != nullptr) {
      a.residual =
          static_cast<const uint8_t*>(whole.residual) + first * y_image * bytes_of(a.residual_type);
    }
    find_codes(a, 0, a.batch, is_static, fixed, codes);
    a.image = no_copy ? static_cast<const uint8_t*>(a.x) : image;
    if (!no_copy) {
      parallel(a.batch * a.grid[0] * a.grid[1], grain_for(kImageGrain, a.grid[2] * a.pixel_codes()),
               [&](int64_t begin, int64_t end) { table.conv_prepare(a, image, begin, end); });
    }
    // Each thread reads all of the smaller one of weight and image.
    const int64_t pixels = a.batch * a.pixels(), blocks = a.blocks();
    const int64_t products = kLanes * a.shape.k;
    if (blocks * a.shape.bytes > a.batch * image_bytes &&
        blocks >= torch::stable::get_num_threads()) {
      parallel(blocks, grain_for(kConvGrain, products * pixels),
               [&](int64_t begin, int64_t end) { table.conv(a, begin, end, 0, pixels); });
    } else {
      const int64_t steps = (pixels + kPixelStep - 1) / kPixelStep;
      parallel(steps, grain_for(kConvGrain, products * blocks * kPixelStep),
               [&](int64_t begin, int64_t end) {
                 table.conv(a, 0, blocks, begin * kPixelStep, std::min(pixels, end * kPixelStep));
               });
    }
  }
}

// ---- The op -------------------------------------------------------------------------------------

// Codes of x as they are given by scale and zero point; `fixed` is unused when nothing is given.
bool check_x_codes(const char* op, const Tensor& x, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& zero_point, Activation activation,
                   ImageCodes* fixed) {
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
  fixed->scale = read_scale(op, "x_scale", *scale);
  fixed->inverse = 1.0f / fixed->scale;
  fixed->zero = zero_point ? read_zero_point(op, "x_zero_point", *zero_point) : 0;
  return true;
}

Tensor conv(const Tensor& x_any, const Tensor& packed_any, const std::optional<Tensor>& bias_any,
            const std::optional<Tensor>& residual_any, const std::optional<Tensor>& x_scale,
            const std::optional<Tensor>& x_zero_point, const std::optional<Tensor>& residual_scale,
            const std::optional<Tensor>& residual_zero_point, const std::optional<Tensor>& y_scale,
            const std::optional<Tensor>& y_zero_point, int64_t layout_id, int64_t out_channels,
            int64_t groups, int64_t group_size, const std::vector<int64_t>& kernel_size,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool transposed, int64_t activation_code,
            int64_t epilogue, std::optional<ScalarType> dtype) {
  const char* op = "conv";
  ConvArgs a{};
  const bool is_codes = x_any.is_cpu() && x_any.scalar_type() == ScalarType::Char;
  a.x_type = is_codes ? DType::i8 : check_float(op, "x", x_any);
  set_geometry(op, x_any, {kernel_size, stride, padding, dilation, transposed}, out_channels,
               groups, &a);
  if (groups < 1 || a.channels % groups != 0) {
    fail(op, "x has ", a.channels, " channels, which groups=", groups, " does not divide");
  }
  const ConvWeight w =
      check_conv_weight(op, layout_id, a.taps(), a.channels / groups, groups, out_channels,
                        group_size);
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
  ImageCodes fixed{};
  const bool is_static = check_x_codes(op, x_any, x_scale, x_zero_point, activation, &fixed);

  ScalarType y_type = dtype ? *dtype : is_codes ? ScalarType::Float : x_any.scalar_type();
  if (y_scale) {
    if (!integer) fail(op, "y_scale needs int8 activations; pass activation=1 or 2");
    if (dtype && *dtype != ScalarType::Char) {
      fail(op, "y_scale gives int8 codes but dtype is ", dtype_text(*dtype), "; leave dtype out");
    }
    y_type = ScalarType::Char;
    a.y_type = DType::i8;
    a.y_inverse = 1.0f / read_scale(op, "y_scale", *y_scale);
    a.y_zero = y_zero_point ? read_zero_point(op, "y_zero_point", *y_zero_point) : 0;
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
    const bool coded = residual_any->is_cpu() && residual_any->scalar_type() == ScalarType::Char;
    if (coded != residual_scale.has_value()) {
      fail(op, "residual_scale goes with a residual of int8 codes, and only with that");
    }
    a.residual_type = coded ? DType::i8 : check_float(op, "residual", *residual_any);
    check_shape(op, "residual", *residual_any, shape);
    if (coded) {
      a.residual_scale = read_scale(op, "residual_scale", *residual_scale);
      a.residual_zero = residual_zero_point
                            ? read_zero_point(op, "residual_zero_point", *residual_zero_point)
                            : 0;
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
    run_integer(a, w.layout, is_static, fixed);
  } else {
    run_conv_float(a, w);
  }
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("conv", TORCH_BOX(&qkernels::conv));
  m.impl("conv_differentiable", TORCH_BOX(&qkernels::conv));
}
