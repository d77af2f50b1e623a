// How a GPU runs what happens to int8 codes between convolutions.
#include "ops/cuda_api.h"
#include "ops/int8.h"

namespace qkernels {

void run_max_pool(const PoolArgs& a, double) { cuda::max_pool(a, current_stream()); }

void run_avg_pool(const PoolArgs& a, double) { cuda::avg_pool(a, current_stream()); }

void run_add(const AddArgs& a, int64_t count) { cuda::add(a, count, current_stream()); }

void run_lookup(const LookupArgs& a, int64_t count) { cuda::lookup(a, count, current_stream()); }

void run_concat(const std::vector<ConcatArgs>& pieces) {
  for (const ConcatArgs& piece : pieces) cuda::concat(piece, current_stream());
}

}  // namespace qkernels
