// How a GPU runs linear.
#include "cuda/linear_float.h"
#include "ops/checks.h"
#include "ops/cuda_matmul.h"
#include "ops/device.h"
#include "ops/linear.h"

namespace qkernels {

void run_linear(const LinearArgs& args) {
  if (args.rows == 0 || args.n == 0) return;
  // Kernels count along a packed row in 32 bits.
  if (args.shape.bytes > INT32_MAX) {
    fail("linear", "a packed row has ", args.shape.bytes, " bytes, more than the ", INT32_MAX,
         " that CUDA kernels take; split in_features=", args.shape.k, " and add the results");
  }
  if (args.activation != Activation::float_) return run_linear_int8(args);
  const bool hopper = cuda::has_sm90a();
  if (cuda::by_matmul(args, hopper)) return linear_by_matmul(args);
  const cuda::FloatWorkspace needed = cuda::linear_float_workspace(args, hopper);
  LinearArgs a = args;
  std::optional<Tensor> panel, partial;
  if (needed.panel_bytes > 0) {
    panel = workspace_on_device(needed.panel_bytes);
    a.panel = panel->mutable_data_ptr<uint8_t>();
  }
  float* sums = nullptr;
  if (needed.sums > 0) {
    partial = workspace_on_device(needed.sums * static_cast<int64_t>(sizeof(float)));
    sums = reinterpret_cast<float*>(partial->mutable_data_ptr<uint8_t>());
  }
  cuda::linear_float(a, sums, current_stream());
}

void run_linears(std::vector<LinearArgs> products) {
  for (const LinearArgs& each : products) run_linear(each);
}

}  // namespace qkernels
