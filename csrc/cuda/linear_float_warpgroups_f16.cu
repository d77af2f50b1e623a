// The kernels of linear_float_warpgroups.cuh for x in float16.
#include "cuda/linear_float_warpgroups.cuh"

namespace qkernels::cuda {

void linear_warpgroups_f16(Format format, const FloatPlan& plan, const FloatKernelArgs& a,
                           Stream stream) {
  launch_warpgroups_format<DType::f16>(format, plan, a, stream);
}

}  // namespace qkernels::cuda
