// The kernels of linear_float_warpgroups.cuh for x in bfloat16.
#include "cuda/linear_float_warpgroups.cuh"

namespace qkernels::cuda {

void linear_warpgroups_bf16(Format format, const FloatPlan& plan, const FloatKernelArgs& a,
                            Stream stream) {
  launch_warpgroups_format<DType::bf16>(format, plan, a, stream);
}

}  // namespace qkernels::cuda
