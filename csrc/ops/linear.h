// The matrix product as other ops use it.
#pragma once

#include "core/params.h"

namespace qkernels {

// Allocates the workspace and computes y on torch's threads. Everything in the arguments is set but
// the workspace.
void run_linear(const LinearArgs& whole);

}  // namespace qkernels
