// How a GPU runs fake quantization.
#include "ops/cuda_api.h"
#include "ops/fake_quantize.h"

namespace qkernels {

void run_fake_quantize(const Cut& cut, const FakeQuantizeArgs& args) {
  const Tensor workspace = workspace_on_device(cuda::fake_quantize_workspace(args, cut.rows));
  cuda::fake_quantize(args, cut.rows, workspace.mutable_data_ptr(), current_stream());
}

void run_fake_backward(const Cut& cut, const FakeBackwardArgs& args) {
  cuda::fake_quantize_backward(args, cut.rows, current_stream());
}

void run_ordered_sum(const float* values, int64_t count, float* sum) {
  cuda::ordered_sum(values, count, sum, current_stream());
}

}  // namespace qkernels
