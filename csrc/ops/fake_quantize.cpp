// fake_quantize, fake_quantize_with and their gradient: checks and allocation, for the CPU and for
// CUDA.
#include "ops/fake_quantize.h"

#include <cmath>

namespace qkernels {
namespace {

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

// A zero point that is being learned is a float, in codes; what counts is the step next to it.
Tensor as_steps(const char* op, const Tensor& zero_point, Format format) {
  const Tensor from = dense(zero_point);
  Tensor to = empty_on_device(shape_of(from), storage_type(format));
  const float* values = from.const_data_ptr<float>();
  for (int64_t i = 0; i < from.numel(); ++i) {
    if (std::isnan(values[i])) {
      fail(op, "zero_point holds NaN; training has diverged, so lower the learning rate or clip ",
           "the gradients");
    }
    store_zero_point(to.mutable_data_ptr(), format, i, to_zero_point(values[i], format));
  }
  return to;
}

// The kernels of a GPU read floats themselves, and a NaN makes its group NaN.
Given check_fake(const char* op, const Cut& cut, Format format, const Tensor& scale,
                 const std::optional<Tensor>& zero_point) {
  const bool floats = zero_point && zero_point->numel() != 0 && info(format).has_zero_point &&
                      zero_point->scalar_type() == ScalarType::Float;
  if (!floats) return check_given(op, cut, format, scale, zero_point);
  check_device(op, "zero_point", *zero_point);
  if (kReadable) return check_given(op, cut, format, scale, as_steps(op, *zero_point, format));
  return check_given(op, cut, format, scale, zero_point, ScalarType::Float);
}

// `given` must outlive the arguments.
template <class Args>
void set_given(const Given& given, Args* a) {
  a->scale = given.scale.const_data_ptr();
  a->scale_type = given.scale_type;
  a->symmetric = !given.zero_point;
  a->zero_point = a->symmetric ? nullptr : given.zero_point->const_data_ptr();
  a->float_zeros = !a->symmetric && given.zero_point->scalar_type() == ScalarType::Float;
}

Tensor fake_quantize(const Tensor& x_any, int64_t format_code, std::optional<int64_t> group_size,
                     bool symmetric, std::optional<ScalarType> scale_dtype) {
  const DeviceGuard guard(x_any);
  const char* op = "fake_quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  check_float(op, "x", x_any);
  const DType scale_type =
      check_float_type(op, "scale_dtype", scale_dtype.value_or(ScalarType::Float));
  const Tensor x = dense(x_any);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor y = empty_on_device(shape_of(x), x.scalar_type());
  FakeQuantizeArgs a = args_for<FakeQuantizeArgs>(cut, x, format);
  a.y = y.mutable_data_ptr();
  a.scale_type = scale_type;
  a.symmetric = symmetric;
  if (y.numel() != 0) run_fake_quantize(cut, a);
  return y;
}

Tensor fake_quantize_with(const Tensor& x_any, const Tensor& scale,
                          const std::optional<Tensor>& zero_point, int64_t format_code,
                          std::optional<int64_t> group_size) {
  const DeviceGuard guard(x_any);
  const char* op = "fake_quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x_any);
  const Tensor x = dense(x_any);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  const Given given = check_fake(op, cut, format, scale, zero_point);
  Tensor y = empty_on_device(shape_of(x), x.scalar_type());
  FakeQuantizeArgs a = args_for<FakeQuantizeArgs>(cut, x, format);
  a.y = y.mutable_data_ptr();
  set_given(given, &a);
  if (y.numel() != 0) run_fake_quantize(cut, a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad_any,
                                                          const Tensor& x_any, const Tensor& scale,
                                                          const std::optional<Tensor>& zero_point,
                                                          int64_t format_code,
                                                          std::optional<int64_t> group_size) {
  const DeviceGuard guard(x_any);
  const char* op = "fake_quantize_backward";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x_any);
  check_dtype(op, "grad", grad_any, x_any.scalar_type());
  check_shape(op, "grad", grad_any, shape_of(x_any));
  const Tensor x = dense(x_any), grad = dense(grad_any);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  const Given given = check_fake(op, cut, format, scale, zero_point);
  Tensor dx = empty_on_device(shape_of(x), x.scalar_type());
  FakeBackwardArgs a = args_for<FakeBackwardArgs>(cut, x, format);
  a.grad = grad.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  set_given(given, &a);

  const Shape zero_shape = a.symmetric ? Shape{0} : shape_of(*zero_point);
  Tensor scale_grad = empty_on_device(shape_of(scale), ScalarType::Float);
  Tensor zero_grad = empty_on_device(zero_shape, ScalarType::Float);
  const Shape by_row{cut.rows};
  Tensor scale_sums = cut.per_tensor ? empty_on_device(by_row, ScalarType::Float) : scale_grad;
  Tensor zero_sums =
      cut.per_tensor && !a.symmetric ? empty_on_device(by_row, ScalarType::Float) : zero_grad;
  a.scale_grad = scale_sums.mutable_data_ptr<float>();
  a.zero_grad = a.symmetric ? nullptr : zero_sums.mutable_data_ptr<float>();
  run_fake_backward(cut, a);
  if (cut.per_tensor) {
    run_ordered_sum(a.scale_grad, cut.rows, scale_grad.mutable_data_ptr<float>());
    if (!a.symmetric) {
      run_ordered_sum(a.zero_grad, cut.rows, zero_grad.mutable_data_ptr<float>());
    }
  }
  return {dx, scale_grad, zero_grad};
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("fake_quantize", TORCH_BOX(&qkernels::fake_quantize));
  m.impl("fake_quantize_with", TORCH_BOX(&qkernels::fake_quantize_with));
  m.impl("fake_quantize_backward", TORCH_BOX(&qkernels::fake_quantize_backward));
}
