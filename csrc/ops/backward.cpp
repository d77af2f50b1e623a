// linear_backward_input: checks and allocation, for the CPU and for CUDA.
#include "ops/backward.h"

#include "ops/checks.h"

namespace qkernels {
namespace {

Tensor linear_backward_input(const Tensor& grad_any, const Tensor& packed_any, int64_t layout_id,
                             int64_t in_features, int64_t out_features, int64_t group_size) {
  const DeviceGuard guard(grad_any);
  const char* op = "linear_backward_input";
  const DType type = check_float(op, "grad", grad_any);
  check_sizes(op, in_features, out_features, group_size);
  BackwardArgs a{};
  a.layout = check_layout(op, layout_id);
  a.shape = block_shape(a.layout, in_features, group_size);
  Shape shape = shape_of(grad_any);
  if (shape.empty() || shape.back() != out_features) {
    fail(op, "grad must have shape (..., ", out_features, "), got ", shape_text(grad_any));
  }
  const Tensor packed = check_packed(op, packed_any, a.shape, out_features);
  const Tensor grad = dense(grad_any);
  a.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) a.rows *= shape[i];
  shape.back() = in_features;
  Tensor dx = empty_on_device(shape, scalar_type(type));
  a.dy = grad.const_data_ptr();
  a.n = out_features;
  a.packed = packed.const_data_ptr<uint8_t>();
  a.dx = dx.mutable_data_ptr();
  a.type = type;
  if (a.rows != 0 && in_features != 0) run_backward(a);
  return dx;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) { m.impl("linear_backward_input", TORCH_BOX(&qkernels::linear_backward_input)); }
