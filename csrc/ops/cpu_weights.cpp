// How the CPU moves packed weights.
#include "cpu/kernels.h"
#include "ops/torch_api.h"
#include "ops/weights.h"

namespace qkernels {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // elements per thread

int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

}  // namespace

void run_pack(const PackArgs& a) {
  parallel(blocks_of(a.n), grain_for(kGrain, kLanes * a.shape.k),
           [&](int64_t begin, int64_t end) { pack_blocks(a, begin, end); });
}

void run_unpack(const UnpackArgs& a) {
  parallel(blocks_of(a.n), grain_for(kGrain, kLanes * a.shape.k),
           [&](int64_t begin, int64_t end) { unpack_blocks(a, begin, end); });
}

void run_embedding(const EmbeddingArgs& a, int64_t count) {
  const Kernels& table = kernels();
  parallel(count, grain_for(kGrain, a.shape.k),
           [&](int64_t begin, int64_t end) { table.embedding(a, begin, end); });
}

}  // namespace qkernels
