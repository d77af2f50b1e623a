// How a GPU runs the quantizers.
#include "ops/quantize.h"

namespace qkernels {

void run_quantize(const Cut& cut, const QuantizeArgs& args) {
  const Tensor workspace = workspace_on_device(cuda::quantize_workspace(args, cut.rows));
  cuda::quantize(args, cut.rows, workspace.mutable_data_ptr(), current_stream());
}

void run_quantize_with(const Cut& cut, const QuantizeArgs& args) {
  cuda::quantize_with(args, cut.rows, current_stream());
}

void run_dequantize(const Cut& cut, const DequantizeArgs& args) {
  cuda::dequantize(args, cut.rows, current_stream());
}

}  // namespace qkernels
