// The kernels of linear_float.cuh and linear_float_gemv.cuh for x in bfloat16.
#include "cuda/linear_float_gemv.cuh"

namespace qkernels::cuda {

void linear_bf16(Format format, const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  launch_format<DType::bf16>(format, plan, a, stream);
}

}  // namespace qkernels::cuda
