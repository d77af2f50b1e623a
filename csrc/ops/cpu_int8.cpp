// What happens to int8 codes between convolutions, on the CPU: pooling, add, concat, lookup.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/geometry.h"

namespace qkernels {
namespace {

// Codes per thread below which starting another costs more than it gains: read by windows, and
// written.
constexpr int64_t kPoolGrain = 256 * 1024;
constexpr int64_t kAddGrain = 64 * 1024;
constexpr int64_t kLookupGrain = 128 * 1024;

// Codes of a window whose sum fits int32 for certain.
constexpr int64_t kLongestMean = INT32_MAX / 255;

int zero_or(const char* op, const char* name, const std::optional<Tensor>& t) {
  return t ? read_zero_point(op, name, *t) : 0;
}

// The result is codes with y_scale, floats of `dtype` without.
struct Result {
  ScalarType type = ScalarType::Char;
  DType kernel_type = DType::i8;
  float scale = 1.0f;
  int zero = 0;
};
Result check_result(const char* op, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& zero_point, std::optional<ScalarType> dtype) {
  Result y;
  if (!scale) {
    if (zero_point) fail(op, "y_zero_point needs y_scale");
    y.type = dtype.value_or(ScalarType::Float);
    y.kernel_type = check_float_type(op, "dtype", y.type);
    return y;
  }
  if (dtype && *dtype != ScalarType::Char) {
    fail(op, "y_scale gives int8 codes but dtype is ", dtype_text(*dtype), "; leave dtype out");
  }
  y.scale = read_scale(op, "y_scale", *scale);
  y.zero = zero_or(op, "y_zero_point", zero_point);
  return y;
}

// ---- Pooling ------------------------------------------------------------------------------------

int64_t check_image(const char* op, const Tensor& x, PoolArgs* a) {
  check_dtype(op, "x", x, ScalarType::Char);
  const int64_t dims = x.dim() - 2;
  if (dims < 1 || dims > 3) {
    fail(op, "x must have shape (batch, channels, 1 to 3 spatial dimensions), got ", shape_text(x),
         "; give a single image a batch dimension with x.unsqueeze(0)");
  }
  a->batch = x.size(0);
  a->channels = x.size(1);
  for (int64_t i = 0; i < 3; ++i) a->in[i] = i < 3 - dims ? 1 : x.size(i + dims - 1);
  return dims;
}

// Windows that slide over x; they begin in x or in front of it, never behind.
void set_windows(const char* op, const Tensor& x, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, bool ceil_mode, PoolArgs* a) {
  const int64_t dims = check_image(op, x, a);
  const auto kernels = spatial(op, "kernel_size", kernel, dims, 1, kLongest);
  const auto strides = spatial(op, "stride", stride, dims, 1, kLongest);
  const auto before = spatial(op, "padding", padding, dims, 0, kLongest, 0);
  const auto dilations = spatial(op, "dilation", dilation, dims, 1, kLongest);
  for (int64_t i = 0; i < 3; ++i) {
    a->kernel[i] = kernels[i];
    a->stride[i] = strides[i];
    a->before[i] = before[i];
    a->dilation[i] = dilations[i];
    if (before[i] > kernels[i] / 2) {
      fail(op, "padding must be at most half of kernel_size, got padding ", text_of(padding),
           " for kernel_size ", text_of(kernel));
    }
    const int64_t extent = dilations[i] * (kernels[i] - 1) + 1;
    const int64_t room = a->in[i] + 2 * before[i] - extent + (ceil_mode ? strides[i] - 1 : 0);
    a->out[i] = room < 0 ? 0 : room / strides[i] + 1;
    if (ceil_mode && (a->out[i] - 1) * strides[i] >= a->in[i] + before[i]) --a->out[i];
    if (a->in[i] < 1 || a->out[i] < 1) {
      fail(op, "the result would be empty: x ", shape_text(x), " with kernel_size ",
           text_of(kernel), ", padding ", text_of(padding), " and dilation ", text_of(dilation),
           " leaves no place for the kernel");
    }
  }
}

using PoolKernel = void (*)(const PoolArgs&, int64_t, int64_t);

// Allocates y and runs the kernel; `taps` of x make an element of y.
Tensor run_pool(const char* op, PoolKernel kernel, const Tensor& x_any, const Result& result,
                double taps, PoolArgs* a) {
  double elements = static_cast<double>(a->batch) * static_cast<double>(a->channels);
  for (const int64_t size : a->out) elements *= static_cast<double>(size);
  if (elements > kMostElements) {
    fail(op, "the result would have ", elements, " elements, more than fit into memory");
  }
  a->channels_last = is_channels_last(x_any);
  const Tensor x = a->channels_last ? x_any : dense(x_any);
  Shape shape{a->batch, a->channels};
  for (int64_t i = 5 - x.dim(); i < 3; ++i) shape.push_back(a->out[i]);
  Tensor y = empty_in_order(shape, result.type, a->channels_last);
  if (y.numel() == 0) return y;
  a->x = x.const_data_ptr<int8_t>();
  a->y = y.mutable_data_ptr();
  a->y_type = result.kernel_type;
  const int64_t line = a->out[2] * (a->channels_last ? a->channels : 1);
  const int64_t work = static_cast<int64_t>(std::min<double>(taps, kPoolGrain));
  parallel(a->lines(), grain_for(kPoolGrain, line * work),
           [&](int64_t begin, int64_t end) { kernel(*a, begin, end); });
  return y;
}

Tensor max_pool(const Tensor& x, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool ceil_mode) {
  const char* op = "max_pool";
  PoolArgs a{};
  set_windows(op, x, kernel_size, stride, padding, dilation, ceil_mode, &a);
  double taps = 1;
  for (int64_t i = 0; i < 3; ++i) taps *= static_cast<double>(std::min(a.kernel[i], a.in[i]));
  return run_pool(op, kernels().max_pool, x, Result{}, taps, &a);
}

// Means of x: codes with y_scale, floats without.
Tensor run_means(const char* op, const Tensor& x, const Tensor& x_scale,
                 const std::optional<Tensor>& x_zero_point, const Result& result, PoolArgs* a) {
  double most = 1;  // codes of a window
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t widest = a->adaptive ? (a->in[i] + a->out[i] - 1) / a->out[i] + 1 : a->kernel[i];
    most *= static_cast<double>(std::min(widest, a->in[i]));
  }
  if (most > static_cast<double>(kLongestMean)) {
    fail(op, "an int32 sum over ", most, " codes can overflow (the limit is ", kLongestMean,
         "); pool in two steps");
  }
  a->scale = static_cast<double>(read_scale(op, "x_scale", x_scale)) / result.scale;
  a->x_zero = zero_or(op, "x_zero_point", x_zero_point);
  a->y_zero = result.zero;
  return run_pool(op, kernels().avg_pool, x, result, most, a);
}

Tensor avg_pool(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero_point,
                const std::optional<Tensor>& y_scale, const std::optional<Tensor>& y_zero_point,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override, std::optional<ScalarType> dtype) {
  const char* op = "avg_pool";
  PoolArgs a{};
  set_windows(op, x, kernel_size, stride, padding, std::vector<int64_t>(kernel_size.size(), 1),
              ceil_mode, &a);
  if (divisor_override && (*divisor_override < 1 || *divisor_override > INT32_MAX)) {
    fail(op, "divisor_override must be from 1 to ", INT32_MAX, ", got ", *divisor_override);
  }
  a.divisor = divisor_override.value_or(0);
  a.count_padding = count_include_pad;
  const Result result = check_result(op, y_scale, y_zero_point, dtype);
  return run_means(op, x, x_scale, x_zero_point, result, &a);
}

Tensor adaptive_avg_pool(const Tensor& x, const Tensor& x_scale,
                         const std::optional<Tensor>& x_zero_point,
                         const std::optional<Tensor>& y_scale,
                         const std::optional<Tensor>& y_zero_point,
                         const std::vector<int64_t>& output_size, std::optional<ScalarType> dtype) {
  const char* op = "adaptive_avg_pool";
  PoolArgs a{};
  const int64_t dims = check_image(op, x, &a);
  const auto out = spatial(op, "output_size", output_size, dims, 1, kLongest);
  std::copy(out.begin(), out.end(), a.out);
  for (const int64_t size : a.in) {
    if (size < 1) {
      fail(op, "x ", shape_text(x),
           " has a spatial dimension of size 0, of which there is no mean");
    }
  }
  a.adaptive = true;
  const Result result = check_result(op, y_scale, y_zero_point, dtype);
  return run_means(op, x, x_scale, x_zero_point, result, &a);
}

// ---- Element by element -------------------------------------------------------------------------

Tensor add(const Tensor& a_any, const Tensor& b_any, const Tensor& a_scale,
           const std::optional<Tensor>& a_zero_point, const Tensor& b_scale,
           const std::optional<Tensor>& b_zero_point, const std::optional<Tensor>& y_scale,
           const std::optional<Tensor>& y_zero_point, int64_t epilogue,
           std::optional<ScalarType> dtype) {
  const char* op = "add";
  check_dtype(op, "a", a_any, ScalarType::Char);
  check_dtype(op, "b", b_any, ScalarType::Char);
  if (shape_of(a_any) != shape_of(b_any)) {
    fail(op, "a and b must have the same shape, got ", shape_text(a_any), " and ",
         shape_text(b_any), "; expand the smaller one");
  }
  AddArgs args{};
  args.a_scale = read_scale(op, "a_scale", a_scale);
  args.a_zero = zero_or(op, "a_zero_point", a_zero_point);
  args.b_scale = read_scale(op, "b_scale", b_scale);
  args.b_zero = zero_or(op, "b_zero_point", b_zero_point);
  args.epilogue = check_epilogue(op, epilogue);
  const Result result = check_result(op, y_scale, y_zero_point, dtype);
  args.y_type = result.kernel_type;
  args.y_inverse = 1.0f / result.scale;
  args.y_zero = result.zero;

  const bool last = is_channels_last(a_any);
  const Tensor a = in_order(a_any, last), b = in_order(b_any, last);
  Tensor y = empty_in_order(shape_of(a), result.type, last);
  args.a = a.const_data_ptr<int8_t>();
  args.b = b.const_data_ptr<int8_t>();
  args.y = y.mutable_data_ptr();
  const Kernels& table = kernels();
  parallel(y.numel(), kAddGrain, [&](int64_t begin, int64_t end) { table.add(args, begin, end); });
  return y;
}

Tensor lookup(const Tensor& x_any, const Tensor& codes_any) {
  const char* op = "lookup";
  check_dtype(op, "x", x_any, ScalarType::Char);
  check_dtype(op, "table", codes_any, ScalarType::Char);
  check_shape(op, "table", codes_any, {256});
  const bool last = is_channels_last(x_any);
  const Tensor x = in_order(x_any, last), codes = dense(codes_any);
  Tensor y = empty_in_order(shape_of(x), ScalarType::Char, last);
  const LookupArgs a{x.const_data_ptr<int8_t>(), y.mutable_data_ptr<int8_t>(),
                     codes.const_data_ptr<int8_t>()};
  const Kernels& table = kernels();
  parallel(y.numel(), kLookupGrain,
           [&](int64_t begin, int64_t end) { table.lookup(a, begin, end); });
  return y;
}

// ---- Concat -------------------------------------------------------------------------------------

// A tensor of the list as rows of `cols` codes.
struct Piece {
  Tensor x;
  int64_t cols;
  bool copied;  // its codes mean the same in y
  int8_t table[256];
};

// Codes of one scale and zero point as codes of another.
void fill_table(float scale, int zero, float y_scale, int y_zero, int8_t* table) {
  const Affine affine{y_scale, 1.0f / y_scale, y_zero};
  for (int code = -128; code < 128; ++code) {
    const float value = decode(code, Format::int8, scale, zero);
    table[code + 128] = static_cast<int8_t>(encode_integer(value, affine, -128, 127));
  }
}

int64_t check_concat(const char* op, const std::vector<Tensor>& xs, int64_t dim) {
  if (xs.empty()) fail(op, "xs must hold at least one tensor, got none");
  const int64_t dims = xs[0].dim();
  if (dims == 0) fail(op, "xs must have at least one dimension, got scalars");
  if (dim < -dims || dim >= dims) {
    fail(op, "dim must be from ", -dims, " to ", dims - 1, ", got ", dim);
  }
  dim = dim < 0 ? dim + dims : dim;
  Shape shape = shape_of(xs[0]);
  shape[dim] = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const std::string name = "xs[" + std::to_string(i) + "]";
    check_dtype(op, name.c_str(), xs[i], ScalarType::Char);
    Shape other = shape_of(xs[i]);
    if (static_cast<int64_t>(other.size()) == dims) other[dim] = 0;
    if (other != shape) {
      fail(op, name, " must have the shape of xs[0], ", shape_text(xs[0]), ", but for dimension ",
           dim, ", got ", shape_text(xs[i]));
    }
  }
  return dim;
}

Tensor concat(const std::vector<Tensor>& xs, const Tensor& scales_any,
              const std::optional<Tensor>& zero_points_any, const Tensor& y_scale_any,
              const std::optional<Tensor>& y_zero_point, int64_t dim) {
  const char* op = "concat";
  dim = check_concat(op, xs, dim);
  const int64_t count = static_cast<int64_t>(xs.size());
  check_dtype(op, "scales", scales_any, ScalarType::Float);
  check_shape(op, "scales", scales_any, {count});
  const Tensor scales = dense(scales_any);
  std::optional<Tensor> zero_points;
  if (zero_points_any) {
    check_dtype(op, "zero_points", *zero_points_any, ScalarType::Char);
    check_shape(op, "zero_points", *zero_points_any, {count});
    zero_points = dense(*zero_points_any);
  }
  const float y_scale = read_scale(op, "y_scale", y_scale_any);
  const int y_zero = zero_or(op, "y_zero_point", y_zero_point);

  const bool last = is_channels_last(xs[0]);
  Shape shape = shape_of(xs[0]);
  // Dimensions that lie outside of `dim` in memory make rows, those inside of it make them longer.
  int64_t rows = 1, inner = 1;
  const auto place = [&](int64_t d) { return last ? (d == 1 ? xs[0].dim() : d) : d; };
  for (int64_t d = 0; d < xs[0].dim(); ++d) {
    if (place(d) < place(dim)) rows *= shape[d];
    if (place(d) > place(dim)) inner *= shape[d];
  }
  shape[dim] = 0;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = scales.const_data_ptr<float>()[i];
    if (!(scale >= kSmallestScale && scale < INFINITY)) {
      fail(op, "scales must be positive, finite, normal numbers, got ", scale, " at ", i,
           "; calibrate again");
    }
    const int zero = zero_points ? zero_points->const_data_ptr<int8_t>()[i] : 0;
    pieces.push_back(
        {in_order(xs[i], last), xs[i].size(dim) * inner, scale == y_scale && zero == y_zero, {}});
    fill_table(scale, zero, y_scale, y_zero, pieces.back().table);
    shape[dim] += xs[i].size(dim);
  }
  Tensor y = empty_in_order(shape, ScalarType::Char, last);
  if (y.numel() == 0) return y;
  const int64_t width = shape[dim] * inner;
  const Kernels& table = kernels();
  parallel(rows, grain_for(kLookupGrain, width), [&](int64_t begin, int64_t end) {
    int8_t* out = y.mutable_data_ptr<int8_t>() + begin * width;
    for (const Piece& piece : pieces) {
      LookupArgs a{piece.x.const_data_ptr<int8_t>() + begin * piece.cols, out, piece.table};
      for (int64_t row = begin; row < end; ++row, a.x += piece.cols, a.y += width) {
        if (piece.copied) {
          std::copy_n(a.x, piece.cols, a.y);
        } else {
          table.lookup(a, 0, piece.cols);
        }
      }
      out += piece.cols;
    }
  });
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&qkernels::max_pool));
  m.impl("avg_pool", TORCH_BOX(&qkernels::avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&qkernels::adaptive_avg_pool));
  m.impl("add", TORCH_BOX(&qkernels::add));
  m.impl("concat", TORCH_BOX(&qkernels::concat));
  m.impl("lookup", TORCH_BOX(&qkernels::lookup));
}
