// How a GPU runs linear_backward_input.
#include "ops/backward.h"
#include "ops/cuda_api.h"

namespace qkernels {

void run_backward(const BackwardArgs& a) { cuda::linear_backward_input(a, current_stream()); }

}  // namespace qkernels
