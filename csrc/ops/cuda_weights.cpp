// How a GPU moves packed weights.
#include "ops/cuda_api.h"
#include "ops/weights.h"

namespace qkernels {

void run_pack(const PackArgs& a) { cuda::pack(a, current_stream()); }

void run_unpack(const UnpackArgs& a) { cuda::unpack(a, current_stream()); }

void run_embedding(const EmbeddingArgs& a, int64_t count) {
  cuda::embedding(a, count, current_stream());
}

}  // namespace qkernels
