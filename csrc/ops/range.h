// The range of a whole tensor, found by all threads.
#pragma once

#include <mutex>

#include "cpu/kernels.h"
#include "ops/groups.h"

namespace qkernels {

inline Range range_of(const void* x, DType type, int64_t count) {
  const Kernels& table = kernels();
  Range total;
  std::mutex mutex;
  parallel(count, kGrain, [&](int64_t begin, int64_t end) {
    const Range part = table.range(x, type, begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    total.min = std::min(total.min, part.min);
    total.max = std::max(total.max, part.max);
    total.magnitude = std::max(total.magnitude, part.magnitude);
  });
  return total;
}

}  // namespace qkernels
