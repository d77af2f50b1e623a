// How a device runs linear_backward_input. The arguments are checked and complete; dx is not empty.
#pragma once

#include "core/params.h"

namespace qkernels {

void run_backward(const BackwardArgs& args);

}  // namespace qkernels
