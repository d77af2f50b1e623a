// int_mm: checks and allocation, for the CPU and for CUDA.
#include "ops/checks.h"
#include "ops/linear.h"

namespace qkernels {
namespace {

Tensor int_mm(const Tensor& a_any, const Tensor& b) {
  const DeviceGuard guard(a_any);
  const char* op = "int_mm";
  check_dtype(op, "a", a_any, ScalarType::Char);
  check_dtype(op, "b", b, ScalarType::Char);
  if (a_any.dim() != 2 || b.dim() != 2 || a_any.size(1) != b.size(0)) {
    fail(op, "a and b must have shapes (M, K) and (K, N), got ", shape_text(a_any), " and ",
         shape_text(b));
  }
  const int64_t k = b.size(0), n = b.size(1);
  const int64_t limit = max_accumulation(Format::int8, true);
  if (k > limit) {
    fail(op, "an int32 sum over K=", k, " products can overflow (the limit is ", limit,
         "); split K and add in int64");
  }
  const Tensor x = dense(a_any);
  Tensor y = empty_on_device({a_any.size(0), n}, ScalarType::Int);
  LinearArgs a{};
  a.x = x.const_data_ptr();
  a.x_type = DType::i8;
  a.rows = a_any.size(0);
  a.n = n;
  a.layout = {Format::int8, DType::f32, true, kDeviceFamily, layout_version(Format::int8, true)};
  a.shape = block_shape(a.layout, k, -1);
  a.activation = Activation::int8_symmetric;
  a.y = y.mutable_data_ptr();
  a.y_type = DType::i32;

  const Tensor packed =
      empty_on_device({(n + kLanes - 1) / kLanes, a.shape.bytes}, ScalarType::Byte);
  uint8_t* rows = packed.mutable_data_ptr<uint8_t>();
  run_pack_columns(b, a.shape, rows);
  a.packed = rows;
  run_linear(a);
  return y;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) { m.impl("int_mm", TORCH_BOX(&qkernels::int_mm)); }
