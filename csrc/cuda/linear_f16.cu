// The kernels of linear_float.cuh and linear_float_gemv.cuh for x in float16.
#include "cuda/linear_float_gemv.cuh"

namespace qkernels::cuda {

void linear_f16(Format format, const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  launch_format<DType::f16>(format, plan, a, stream);
}

}  // namespace qkernels::cuda
