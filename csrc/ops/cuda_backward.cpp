// How a GPU runs linear_backward_input.
#include "cuda/linear_float.h"
#include "ops/backward.h"
#include "ops/cuda_api.h"
#include "ops/cuda_matmul.h"

namespace qkernels {

void run_backward(const BackwardArgs& a) {
  if (cuda::by_matmul(a)) return backward_by_matmul(a);
  cuda::linear_backward_input(a, current_stream());
}

}  // namespace qkernels
