// Rows of the scalar table that are in scalar_transformer.cpp.
#pragma once

#include "cpu/kernels.h"

namespace qkernels {
namespace scalar {

int64_t attention_tile(const AttentionArgs&);
int64_t attention_scratch(const AttentionArgs&);
void attention(const AttentionArgs&, int64_t begin, int64_t end, float* scratch);
void add_norm(const NormArgs&, int64_t begin, int64_t end);

}  // namespace scalar
}  // namespace qkernels
