// fake_quantize, fake_quantize_with and their gradient on the CPU.
#include <cmath>

#include "ops/range.h"

namespace qkernels {
namespace {

// Groups that divide a row are rows of their own: one long row then feeds every thread.
template <class Args>
void split_groups(Cut* cut, Args* a) {
  if (cut->per_tensor || cut->groups <= 1 || cut->cols % cut->group_size != 0) return;
  if (cut->rows >= static_cast<int64_t>(torch::stable::get_num_threads())) return;
  cut->rows *= cut->groups;
  a->cols = cut->cols = cut->group_size;
  a->groups = cut->groups = 1;
}

template <class Args>
Args args_for(const Cut& cut, const Tensor& x, Format format) {
  Args a{};
  a.x = x.const_data_ptr();
  a.type = *float_dtype(x.scalar_type());
  a.cols = cut.cols;
  a.groups = cut.groups;
  a.group_size = cut.group_size;
  a.format = format;
  a.symmetric = true;
  a.shared_scale = cut.per_tensor;
  return a;
}

// A zero point that is being learned is a float; what counts is the code that it rounds to.
std::optional<Tensor> as_codes(const char* op, const std::optional<Tensor>& zero_point,
                               Format format) {
  if (!zero_point || zero_point->scalar_type() != ScalarType::Float) return zero_point;
  check_device(op, "zero_point", *zero_point);
  const FormatInfo& f = info(format);
  const Tensor from = dense(*zero_point);
  Tensor to = empty_cpu(shape_of(from), storage_type(format));
  const float* values = from.const_data_ptr<float>();
  for (int64_t i = 0; i < from.numel(); ++i) {
    if (std::isnan(values[i])) {
      fail(op, "zero_point holds NaN; training has diverged, so lower the learning rate or clip ",
           "the gradients");
    }
    store_zero_point(to.mutable_data_ptr(), format, i,
                     round_clamp(values[i], f.asymmetric_min, f.asymmetric_max));
  }
  return to;
}

// `given` must outlive the arguments.
template <class Args>
void set_given(const Given& given, Args* a) {
  a->scale = given.scale.const_data_ptr();
  a->scale_type = given.scale_type;
  a->symmetric = !given.zero_point;
  a->zero_point = a->symmetric ? nullptr : given.zero_point->const_data_ptr();
}

void run(Cut cut, FakeQuantizeArgs a) {
  split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.fake_quantize(a, begin, end); });
}

Tensor fake_quantize(const Tensor& x_any, int64_t format_code, std::optional<int64_t> group_size,
                     bool symmetric, std::optional<ScalarType> scale_dtype) {
  const char* op = "fake_quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  const DType type = check_float(op, "x", x_any);
  const DType scale_type =
      check_float_type(op, "scale_dtype", scale_dtype.value_or(ScalarType::Float));
  const Tensor x = dense(x_any);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());
  FakeQuantizeArgs a = args_for<FakeQuantizeArgs>(cut, x, format);
  a.y = y.mutable_data_ptr();
  a.scale_type = scale_type;
  a.symmetric = symmetric;
  float scale;
  int32_t zero_point[1];
  if (cut.per_tensor) {
    const Affine affine = choose_affine(range_of(x, type), format, symmetric, scale_type);
    scale = affine.scale;
    a.scale = &scale;
    a.scale_type = DType::f32;
    store_zero_point(zero_point, format, 0, affine.zero_point);
    a.zero_point = symmetric ? nullptr : zero_point;
  }
  run(cut, a);
  return y;
}

Tensor fake_quantize_with(const Tensor& x_any, const Tensor& scale,
                          const std::optional<Tensor>& zero_point, int64_t format_code,
                          std::optional<int64_t> group_size) {
  const char* op = "fake_quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x_any);
  const Tensor x = dense(x_any);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  const Given given = check_given(op, cut, format, scale, as_codes(op, zero_point, format));
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());
  FakeQuantizeArgs a = args_for<FakeQuantizeArgs>(cut, x, format);
  a.y = y.mutable_data_ptr();
  set_given(given, &a);
  run(cut, a);
  return y;
}

// Sums over the rows of a tensor that has one scale, in double and in order.
float total(const Tensor& by_row) {
  const float* values = by_row.const_data_ptr<float>();
  double sum = 0.0;
  for (int64_t i = 0; i < by_row.numel(); ++i) sum += static_cast<double>(values[i]);
  return static_cast<float>(sum);
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad_any,
                                                          const Tensor& x_any, const Tensor& scale,
                                                          const std::optional<Tensor>& zero_point,
                                                          int64_t format_code,
                                                          std::optional<int64_t> group_size) {
  const char* op = "fake_quantize_backward";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x_any);
  check_dtype(op, "grad", grad_any, x_any.scalar_type());
  check_shape(op, "grad", grad_any, shape_of(x_any));
  const Tensor x = dense(x_any), grad = dense(grad_any);
  Cut cut = cut_of(op, shape_of(x), format, group_size);
  const Given given = check_given(op, cut, format, scale, as_codes(op, zero_point, format));
  Tensor dx = empty_cpu(shape_of(x), x.scalar_type());
  FakeBackwardArgs a = args_for<FakeBackwardArgs>(cut, x, format);
  a.grad = grad.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  set_given(given, &a);

  const Shape zero_shape = a.symmetric ? Shape{0} : shape_of(*zero_point);
  Tensor scale_grad = empty_cpu(shape_of(scale), ScalarType::Float);
  Tensor zero_grad = empty_cpu(zero_shape, ScalarType::Float);
  const Shape by_row{cut.rows};
  Tensor scale_sums = cut.per_tensor ? empty_cpu(by_row, ScalarType::Float) : scale_grad;
  Tensor zero_sums =
      cut.per_tensor && !a.symmetric ? empty_cpu(by_row, ScalarType::Float) : zero_grad;
  a.scale_grad = scale_sums.mutable_data_ptr<float>();
  a.zero_grad = a.symmetric ? nullptr : zero_sums.mutable_data_ptr<float>();
  split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.fake_quantize_backward(a, begin, end); });
  if (cut.per_tensor) {
    *scale_grad.mutable_data_ptr<float>() = total(scale_sums);
    if (!a.symmetric) *zero_grad.mutable_data_ptr<float>() = total(zero_sums);
  }
  return {dx, scale_grad, zero_grad};
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&qkernels::fake_quantize));
  m.impl("fake_quantize_with", TORCH_BOX(&qkernels::fake_quantize_with));
  m.impl("fake_quantize_backward", TORCH_BOX(&qkernels::fake_quantize_backward));
}
