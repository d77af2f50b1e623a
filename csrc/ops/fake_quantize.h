// How a device runs fake quantization. `cut` and the arguments are checked and complete.
#pragma once

#include "ops/groups.h"

namespace qkernels {

// Where `scale` is null, scales are chosen; else they and `zero_point` are given.
void run_fake_quantize(const Cut& cut, const FakeQuantizeArgs& args);
void run_fake_backward(const Cut& cut, const FakeBackwardArgs& args);
// *sum = the sum of the values, in double and in order.
void run_ordered_sum(const float* values, int64_t count, float* sum);

}  // namespace qkernels
