// linear and its gradient by torch's matmul, of the weight dequantized. cuda/linear_float.h says
// when; csrc/ops/cuda_matmul.cpp, how.
#pragma once

#include "core/params.h"

namespace qkernels {

void linear_by_matmul(const LinearArgs& a);
void backward_by_matmul(const BackwardArgs& a);

}  // namespace qkernels
