// linear with int8 activations on a GPU.
#include "ops/checks.h"
#include "ops/linear.h"

namespace qkernels {

void run_linear_int8(const LinearArgs&) {
  fail("linear", "int8 activations have no CUDA kernel yet; pass activation=0");
}

}  // namespace qkernels
