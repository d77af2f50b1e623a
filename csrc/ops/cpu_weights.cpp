// How the CPU moves packed weights.
#include <sys/mman.h>

#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"
#include "ops/torch_api.h"
#include "ops/weights.h"

namespace qkernels {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // elements per thread

int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

// Pages of 2 MiB, as far as they lie within `bytes` from `at` on: a weight that comes from memory
// is read up to a fifth faster (docs/performance.md). NumPy asks for them in the same way. Whether
// the system has them does not matter to anything else, so its answers are not looked at.
void ask_for_huge_pages(void* at, int64_t bytes, int advice) {
  const char* given = std::getenv("QKERNELS_HUGE_PAGES");
  if (given != nullptr && std::string_view(given) == "0") return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(at);
  const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (from + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

void run_pack(const PackArgs& a) {
  const int64_t bytes = blocks_of(a.n) * a.shape.bytes;
  // New memory comes in such pages when it is written to first; what was used before is moved.
  ask_for_huge_pages(a.packed, bytes, MADV_HUGEPAGE);
  parallel(blocks_of(a.n), grain_for(kGrain, kLanes * a.shape.k),
           [&](int64_t begin, int64_t end) { pack_blocks(a, begin, end); });
  ask_for_huge_pages(a.packed, bytes, MADV_COLLAPSE);
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
