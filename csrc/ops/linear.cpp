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

// All that follows from x and from the weight's format.
LinearArgs check_product(const char* op, const Tensor& x, int64_t layout_id, int64_t in_features,
                         int64_t out_features, int64_t group_size, int64_t activation) {
  LinearArgs a{};
  a.x_type = check_float(op, "x", x);
  check_sizes(op, in_features, out_features, group_size);
  a.layout = check_layout(op, layout_id);
  a.shape = block_shape(a.layout, in_features, group_size);
  if (x.dim() == 0) {
    fail(op, "x must have at least one dimension, got a scalar; pass x of shape (..., ",
         in_features, ")");
  }
  if (x.size(x.dim() - 1) != in_features) {
    fail(op, "x has ", x.size(x.dim() - 1),
         " features but the weight has in_features=", in_features, "; pass x of shape (..., ",
         in_features, ")");
  }
  a.activation = check_activation(op, a.layout, a.shape.group_size, activation);
  a.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.rows *= x.size(i);
  a.y_type = a.x_type;
  return a;
}

// A weight and its bias, as kernels read them.
struct Weight {
  Tensor packed;
  std::optional<Tensor> bias;
};
Weight check_weight(const char* op, const Tensor& packed, const std::optional<Tensor>& bias,
                    int64_t out_features, LinearArgs* a) {
  Weight weight{check_packed(op, packed, a->shape, out_features), std::nullopt};
  if (bias) {
    a->bias_type = check_float(op, "bias", *bias);
    check_shape(op, "bias", *bias, {out_features});
    weight.bias = dense(*bias);
    a->bias = weight.bias->const_data_ptr();
  }
  a->n = out_features;
  a->packed = weight.packed.const_data_ptr<uint8_t>();
  return weight;
}

Tensor empty_result(const Tensor& x, LinearArgs* a) {
  Shape shape = shape_of(x);
  shape.back() = a->n;
  Tensor y = empty_on_device(shape, scalar_type(a->y_type));
  a->y = y.mutable_data_ptr();
  return y;
}

}  // namespace

Tensor linear(const Tensor& x_any, const Tensor& packed, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
              const std::optional<Tensor>& x_premul, const std::optional<Tensor>& k_perm,
              int64_t layout_id, int64_t in_features, int64_t out_features, int64_t group_size,
              int64_t activation, int64_t epilogue) {
  const DeviceGuard guard(x_any);
  const char* op = "linear";
  LinearArgs a =
      check_product(op, x_any, layout_id, in_features, out_features, group_size, activation);
  const Weight weight = check_weight(op, packed, bias, out_features, &a);
  check_static(op, x_scale, x_zero_point, &a);
  a.epilogue = check_epilogue(op, epilogue);

  std::optional<Tensor> premul, perm;
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
  a.x = x.const_data_ptr();
  Tensor y = empty_result(x_any, &a);
  run_linear(a);
  return y;
}

std::vector<Tensor> linear_shared(const Tensor& x_any, const std::vector<Tensor>& packed,
                                  const std::vector<std::optional<Tensor>>& bias, int64_t layout_id,
                                  int64_t in_features, const std::vector<int64_t>& out_features,
                                  int64_t group_size, int64_t activation,
                                  const std::vector<int64_t>& epilogue) {
  const DeviceGuard guard(x_any);
  const char* op = "linear_shared";
  const size_t count = packed.size();
  if (count == 0 || bias.size() != count || out_features.size() != count ||
      epilogue.size() != count) {
    fail(op, "packed, bias, out_features and epilogue must have one item for each weight, got ",
         count, ", ", bias.size(), ", ", out_features.size(), " and ", epilogue.size());
  }
  std::vector<Weight> weights;
  std::vector<LinearArgs> products;
  for (size_t i = 0; i < count; ++i) {
    LinearArgs a =
        check_product(op, x_any, layout_id, in_features, out_features[i], group_size, activation);
    weights.push_back(check_weight(op, packed[i], bias[i], out_features[i], &a));
    a.epilogue = check_epilogue(op, epilogue[i]);
    products.push_back(a);
  }
  const Tensor x = dense(x_any);
  std::vector<Tensor> ys;
  for (LinearArgs& a : products) {
    a.x = x.const_data_ptr();
    ys.push_back(empty_result(x_any, &a));
  }
  run_linears(products);
  return ys;
}

}  // namespace qkernels

QK_OPS(m) {
  m.impl("linear", TORCH_BOX(&qkernels::linear));
  m.impl("linear_shared", TORCH_BOX(&qkernels::linear_shared));
  m.impl("linear_differentiable", TORCH_BOX(&qkernels::linear));
}
