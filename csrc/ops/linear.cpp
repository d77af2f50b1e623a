// linear: checks and allocation, for the CPU and for CUDA.
#include "ops/linear.h"

#include "ops/checks.h"

namespace qkernels {
namespace {

// Static quantization parameters of x, or none.
void check_static(const char* op, const std::optional<Tensor>& x_scale,
                  const std::optional<Tensor>& x_zero_point, LinearArgs* a) {
  if (x_scale && a->activation == Activation::float_) {
    fail(op, "x_scale is given but activation=0 keeps the activations float; pass activation=1 or ",
         "leave x_scale out");
  }
  if (x_zero_point && (!x_scale || a->activation != Activation::int8_asymmetric)) {
    fail(op, "x_zero_point needs x_scale and activation=2 (asymmetric)");
  }
  if (!x_scale) return;
  a->is_static = true;
  if constexpr (kReadable) {
    a->static_scale = read_scale(op, "x_scale", *x_scale);
    if (x_zero_point) a->static_zero_point = read_zero_point(op, "x_zero_point", *x_zero_point);
  } else {
    check_single(op, "x_scale", *x_scale, ScalarType::Float);
    a->device_scale = x_scale->const_data_ptr<float>();
    if (x_zero_point) {
      check_single(op, "x_zero_point", *x_zero_point, ScalarType::Char);
      a->device_zero_point = x_zero_point->const_data_ptr<int8_t>();
    }
  }
}

void check_perm(const char* op, const Tensor& perm, int64_t k) {
  const int64_t* at = perm.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < k; ++i) {
    if (at[i] < 0 || at[i] >= k) {
      fail(op, "k_perm must hold indices from 0 to ", k - 1, ", got ", at[i], " at ", i);
    }
  }
}

Tensor linear(const Tensor& x_any, const Tensor& packed_any, const std::optional<Tensor>& bias_any,
              const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
              const std::optional<Tensor>& x_premul, const std::optional<Tensor>& k_perm,
              int64_t layout_id, int64_t in_features, int64_t out_features, int64_t group_size,
              int64_t activation, int64_t epilogue) {
  const DeviceGuard guard(x_any);
  const char* op = "linear";
  LinearArgs a{};
  a.x_type = check_float(op, "x", x_any);
  check_sizes(op, in_features, out_features, group_size);
  a.layout = check_layout(op, layout_id);
  a.shape = block_shape(a.layout, in_features, group_size);
  Shape y_shape = shape_of(x_any);
  if (y_shape.empty()) {
    fail(op, "x must have at least one dimension, got a scalar; pass x of shape (..., ",
         in_features, ")");
  }
  if (y_shape.back() != in_features) {
    fail(op, "x has ", y_shape.back(), " features but the weight has in_features=", in_features,
         "; pass x of shape (..., ", in_features, ")");
  }
  const Tensor packed = check_packed(op, packed_any, a.shape, out_features);
  a.activation = check_activation(op, a.layout, a.shape.group_size, activation);
  check_static(op, x_scale, x_zero_point, &a);
  a.epilogue = check_epilogue(op, epilogue);

  std::optional<Tensor> bias, premul, perm;
  if (bias_any) {
    a.bias_type = check_float(op, "bias", *bias_any);
    check_shape(op, "bias", *bias_any, {out_features});
    bias = dense(*bias_any);
    a.bias = bias->const_data_ptr();
  }
  if (x_premul) {
    check_dtype(op, "x_premul", *x_premul, ScalarType::Float);
    check_shape(op, "x_premul", *x_premul, {in_features});
    premul = dense(*x_premul);
    a.premul = premul->const_data_ptr<float>();
  }
  if (k_perm) {
    check_dtype(op, "k_perm", *k_perm, ScalarType::Long);
    check_shape(op, "k_perm", *k_perm, {in_features});
    perm = dense(*k_perm);
    if (kReadable) check_perm(op, *perm, in_features);
    a.perm = perm->const_data_ptr<int64_t>();
  }

  const Tensor x = dense(x_any);
  a.rows = 1;
  for (size_t i = 0; i + 1 < y_shape.size(); ++i) a.rows *= y_shape[i];
  y_shape.back() = out_features;
  Tensor y = empty_on_device(y_shape, scalar_type(a.x_type));
  a.x = x.const_data_ptr();
  a.n = out_features;
  a.packed = packed.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  a.y_type = a.x_type;
  run_linear(a);
  return y;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("linear", TORCH_BOX(&qkernels::linear));
  m.impl("linear_differentiable", TORCH_BOX(&qkernels::linear));
}
