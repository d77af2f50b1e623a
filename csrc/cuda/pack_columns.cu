// int_mm's second operand as a packed weight. A warp makes a unit, and a block those of eight packed
// rows at one place of k: where n is contiguous, they share what they read.
#include "cuda/ptx.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kWarps = 8;

struct Columns {
  const int8_t* b;
  int64_t k_stride, n_stride, n;
};

__global__ void __launch_bounds__(kWarps* kWarp)
    pack_columns_kernel(const Columns c, const BlockShape shape, uint8_t* packed) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row * kLanes >= c.n) return;
  const int64_t k = static_cast<int64_t>(blockIdx.y) * kCudaChunk + lane % 4 * 8;
  uint32_t words[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t n = row * kLanes + lane / 4 + half * 8;
    if (n >= c.n) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (k + i >= shape.k) continue;
      const uint8_t code =
          static_cast<uint8_t>(c.b[(k + i) * c.k_stride + n * c.n_stride]);
      words[half * 2 + i / 4] |= static_cast<uint32_t>(code) << i % 4 * 8;
    }
  }
  store_128(packed + row * shape.bytes + blockIdx.y * int64_t{kCudaUnit} + lane * 16,
            make_uint4(words[0], words[1], words[2], words[3]));
}

}  // namespace

void pack_int8_columns(const int8_t* b, int64_t k_stride, int64_t n_stride, int64_t n,
                       const BlockShape& shape, uint8_t* packed, Stream stream) {
  const dim3 grid(blocks_for(n, kLanes * kWarps),
                  static_cast<unsigned>(shape.k_padded / kCudaChunk));
  launch(pack_columns_kernel, grid, kWarps * kWarp, 0, stream, Columns{b, k_stride, n_stride, n},
         shape, packed);
}

}  // namespace qkernels::cuda
