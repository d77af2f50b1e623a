// How a device moves packed weights. The arguments are checked and complete.
#pragma once

#include "core/params.h"

namespace qkernels {

void run_pack(const PackArgs& args);
void run_unpack(const UnpackArgs& args);
// `count` indices.
void run_embedding(const EmbeddingArgs& args, int64_t count);

}  // namespace qkernels
