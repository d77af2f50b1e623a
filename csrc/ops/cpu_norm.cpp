// add_norm: checks, allocation and threads, for the CPU. On CUDA it is torch's own
// (qkernels/ops_transformer.py).
#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/transformer.h"

namespace qkernels {
namespace {

// Elements per thread below which starting another costs more than it gains.
constexpr int64_t kNormGrain = 16 * 1024;

// Weight or bias, dense.
std::optional<Tensor> check_factor(const char* op, const char* name, const Tensor& x,
                                   const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  check_device(op, name, *t);
  if (t->scalar_type() != ScalarType::Float && t->scalar_type() != x.scalar_type()) {
    fail(op, name, " must be float32 or have the dtype of x (", dtype_text(x.scalar_type()),
         "), got ", dtype_text(t->scalar_type()), "; convert it with .float()");
  }
  check_shape(op, name, *t, {x.size(x.dim() - 1)});
  return dense(*t);
}

}  // namespace

std::tuple<Tensor, Tensor> add_norm(const Tensor& x_any, const std::optional<Tensor>& residual_any,
                                    const std::optional<Tensor>& weight_any,
                                    const std::optional<Tensor>& bias_any, double eps, bool rms,
                                    bool keep_sum) {
  const char* op = "add_norm";
  NormArgs a{};
  a.type = check_float(op, "x", x_any);
  if (x_any.dim() == 0) {
    fail(op, "x must have at least one dimension, got a scalar; pass x of shape (..., features)");
  }
  if (residual_any) {
    check_dtype(op, "residual", *residual_any, x_any.scalar_type());
    check_shape(op, "residual", *residual_any, shape_of(x_any));
  }
  const auto weight = check_factor(op, "weight", x_any, weight_any);
  const auto bias = check_factor(op, "bias", x_any, bias_any);
  if (weight && bias && weight->scalar_type() != bias->scalar_type()) {
    fail(op, "bias must have the dtype of weight (", dtype_text(weight->scalar_type()), "), got ",
         dtype_text(bias->scalar_type()), "; convert one of them");
  }
  if (!(eps >= 0)) fail(op, "eps must be 0 or more, got ", eps);

  const Tensor x = dense(x_any);
  std::optional<Tensor> residual;
  if (residual_any) residual = dense(*residual_any);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());
  Tensor sum = empty_cpu(keep_sum ? shape_of(x) : Shape{0}, x.scalar_type());
  if (y.numel() == 0) return {y, sum};
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  if (residual) a.residual = residual->const_data_ptr();
  if (keep_sum) a.sum = sum.mutable_data_ptr();
  if (weight) a.weight = weight->const_data_ptr();
  if (bias) a.bias = bias->const_data_ptr();
  const auto& factor = weight ? weight : bias;
  a.weight_type = factor && factor->scalar_type() != ScalarType::Float ? a.type : DType::f32;
  a.cols = x.size(x.dim() - 1);
  a.rows = x.numel() / a.cols;
  a.eps = static_cast<float>(eps);
  a.rms = rms;
  const Kernels& table = kernels();
  parallel(a.rows, grain_for(kNormGrain, a.cols),
           [&](int64_t begin, int64_t end) { table.add_norm(a, begin, end); });
  return {y, sum};
}

}  // namespace qkernels

QK_OPS(m) { m.impl("add_norm", TORCH_BOX(&qkernels::add_norm)); }
