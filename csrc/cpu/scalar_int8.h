// Rows of the scalar table that are in scalar_int8.cpp.
#pragma once

#include "cpu/kernels.h"

namespace qkernels {
namespace scalar {

void max_pool(const PoolArgs&, int64_t begin, int64_t end);
void avg_pool(const PoolArgs&, int64_t begin, int64_t end);
void add(const AddArgs&, int64_t begin, int64_t end);
void lookup(const LookupArgs&, int64_t begin, int64_t end);

}  // namespace scalar
}  // namespace qkernels
