// What happens to int8 codes between convolutions (pooling, add, concat, lookup): checks and
// allocation, for the CPU and for CUDA.
#include "ops/int8.h"

#include <algorithm>

#include "ops/geometry.h"

namespace qkernels {
namespace {

// Codes of a window whose sum fits int32 for certain.
constexpr int64_t kLongestMean = INT32_MAX / 255;

// The result is codes with y_scale, floats of `dtype` without.
struct Result {
  ScalarType type = ScalarType::Char;
  DType kernel_type = DType::i8;
  GivenCodes codes;
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
  read_codes(op, "y", *scale, zero_point, &y.codes);
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

// Allocates y and runs the kernel; `taps` of x make an element of y.
Tensor call_pool(const char* op, bool means, const Tensor& x_any, const Result& result, double taps,
                 PoolArgs* a) {
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
  means ? run_avg_pool(*a, taps) : run_max_pool(*a, taps);
  return y;
}

Tensor max_pool(const Tensor& x, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool ceil_mode) {
  const DeviceGuard guard(x);
  const char* op = "max_pool";
  PoolArgs a{};
  set_windows(op, x, kernel_size, stride, padding, dilation, ceil_mode, &a);
  double taps = 1;
  for (int64_t i = 0; i < 3; ++i) taps *= static_cast<double>(std::min(a.kernel[i], a.in[i]));
  return call_pool(op, false, x, Result{}, taps, &a);
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
  read_codes(op, "x", x_scale, x_zero_point, &a->x_codes);
  a->y_codes = result.codes;
  return call_pool(op, true, x, result, most, a);
}

Tensor avg_pool(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero_point,
                const std::optional<Tensor>& y_scale, const std::optional<Tensor>& y_zero_point,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override, std::optional<ScalarType> dtype) {
  const DeviceGuard guard(x);
  const char* op = "avg_pool";
  PoolArgs a{};
  set_windows(op, x, kernel_size, stride, padding, std::vector<int64_t>(kernel_size.size(), 1),
              ceil_mode, &a);
  double extent = 1;  // of a window with its borders
  for (int64_t i = 0; i < 3; ++i) {
    extent *= static_cast<double>(std::min(a.kernel[i], a.in[i] + 2 * a.before[i]));
  }
  if (extent > kMostElements) {
    fail(op, "a window would have ", extent, " elements with its borders, which is too many to ",
         "count; pool in two steps");
  }
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
  const DeviceGuard guard(x);
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
  const DeviceGuard guard(a_any);
  const char* op = "add";
  check_dtype(op, "a", a_any, ScalarType::Char);
  check_dtype(op, "b", b_any, ScalarType::Char);
  if (shape_of(a_any) != shape_of(b_any)) {
    fail(op, "a and b must have the same shape, got ", shape_text(a_any), " and ",
         shape_text(b_any), "; expand the smaller one");
  }
  AddArgs args{};
  read_codes(op, "a", a_scale, a_zero_point, &args.a_codes);
  read_codes(op, "b", b_scale, b_zero_point, &args.b_codes);
  args.epilogue = check_epilogue(op, epilogue);
  const Result result = check_result(op, y_scale, y_zero_point, dtype);
  args.y_type = result.kernel_type;
  args.y_codes = result.codes;

  const bool last = is_channels_last(a_any);
  const Tensor a = in_order(a_any, last), b = in_order(b_any, last);
  Tensor y = empty_in_order(shape_of(a), result.type, last);
  args.a = a.const_data_ptr<int8_t>();
  args.b = b.const_data_ptr<int8_t>();
  args.y = y.mutable_data_ptr();
  run_add(args, y.numel());
  return y;
}

Tensor lookup(const Tensor& x_any, const Tensor& codes_any) {
  const DeviceGuard guard(x_any);
  const char* op = "lookup";
  check_dtype(op, "x", x_any, ScalarType::Char);
  check_dtype(op, "table", codes_any, ScalarType::Char);
  check_shape(op, "table", codes_any, {256});
  const bool last = is_channels_last(x_any);
  const Tensor x = in_order(x_any, last), codes = dense(codes_any);
  Tensor y = empty_in_order(shape_of(x), ScalarType::Char, last);
  const LookupArgs a{x.const_data_ptr<int8_t>(), y.mutable_data_ptr<int8_t>(),
                     codes.const_data_ptr<int8_t>()};
  run_lookup(a, y.numel());
  return y;
}

// ---- Concat -------------------------------------------------------------------------------------

int64_t check_concat(const char* op, const std::vector<Tensor>& xs, int64_t dim) {
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
  if (xs.empty()) fail(op, "xs must hold at least one tensor, got none");
  const DeviceGuard guard(xs[0]);
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
  GivenCodes y_codes;
  read_codes(op, "y", y_scale_any, y_zero_point, &y_codes);

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
  std::vector<ConcatArgs> pieces;
  std::vector<Tensor> kept;
  for (int64_t i = 0; i < count; ++i) {
    ConcatArgs piece{};
    piece.y_codes = y_codes;
    const float* scale = scales.const_data_ptr<float>() + i;
    const int8_t* zero = zero_points ? zero_points->const_data_ptr<int8_t>() + i : nullptr;
    if constexpr (kReadable) {
      if (!(*scale >= kSmallestScale && *scale < INFINITY)) {
        fail(op, "scales must be positive, finite, normal numbers, got ", *scale, " at ", i,
             "; calibrate again");
      }
      piece.x_codes.scale = *scale;
      piece.x_codes.zero = zero == nullptr ? 0 : *zero;
    } else {
      piece.x_codes.device_scale = scale;
      piece.x_codes.device_zero = zero;
    }
    kept.push_back(in_order(xs[i], last));
    piece.x = kept.back().const_data_ptr<int8_t>();
    piece.rows = rows;
    piece.cols = xs[i].size(dim) * inner;
    pieces.push_back(piece);
    shape[dim] += xs[i].size(dim);
  }
  Tensor y = empty_in_order(shape, ScalarType::Char, last);
  if (y.numel() == 0) return y;
  int8_t* out = y.mutable_data_ptr<int8_t>();
  for (ConcatArgs& piece : pieces) {
    piece.y = out;
    piece.pitch = shape[dim] * inner;
    out += piece.cols;
  }
  run_concat(pieces);
  return y;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("max_pool", TORCH_BOX(&qkernels::max_pool));
  m.impl("avg_pool", TORCH_BOX(&qkernels::avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&qkernels::adaptive_avg_pool));
  m.impl("add", TORCH_BOX(&qkernels::add));
  m.impl("concat", TORCH_BOX(&qkernels::concat));
  m.impl("lookup", TORCH_BOX(&qkernels::lookup));
}
