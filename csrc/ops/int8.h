// How a device runs what happens to int8 codes between convolutions. The arguments are checked and
// complete but for what a CPU makes of GivenCodes.
#pragma once

#include <vector>

#include "core/params.h"

namespace qkernels {

// `taps` of x make an element of y, which has some.
void run_max_pool(const PoolArgs& args, double taps);
void run_avg_pool(const PoolArgs& args, double taps);
void run_add(const AddArgs& args, int64_t count);
void run_lookup(const LookupArgs& args, int64_t count);
// Pieces of one y, in order, with the same rows and pitch.
void run_concat(const std::vector<ConcatArgs>& pieces);

}  // namespace qkernels
