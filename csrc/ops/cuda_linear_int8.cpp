// How a GPU runs linear with int8 activations, and int_mm.
#include "ops/checks.h"
#include "ops/linear.h"

namespace qkernels {

void run_linear_int8(const LinearArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  if (a.rows > INT32_MAX || a.shape.k_padded > INT32_MAX) {
    fail("linear", "x has ", a.rows, " rows of ", a.shape.k,
         " features, but a GPU takes at most 2^31 - 1 of either; split x");
  }
  const Tensor workspace = workspace_on_device(cuda::linear_int8_workspace(a));
  cuda::linear_int8(a, workspace.mutable_data_ptr(), current_stream());
}

void run_pack_columns(const Tensor& b, const BlockShape& shape, uint8_t* packed) {
  if (b.size(1) == 0 || shape.k == 0) return;
  cuda::pack_int8_columns(b.const_data_ptr<int8_t>(), b.stride(0), b.stride(1), b.size(1), shape,
                          packed, current_stream());
}

}  // namespace qkernels
