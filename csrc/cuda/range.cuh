// The range of what a block of threads has seen.
#pragma once

#include "cuda/ptx.cuh"

namespace qkernels::cuda {

// Shared memory of block_range and block_max for the largest block.
inline constexpr int64_t kRangeBytes = 1024 / kWarp * 3 * 4;

// The largest value of the whole block.
QK_DEVICE uint32_t block_max(uint32_t value) {
  uint32_t* parts = shared_memory<uint32_t>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  value = warp_max(value);
  if (lane == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_max(lane < static_cast<int>(blockDim.x) / kWarp ? parts[lane] : 0);
}

// The range of the whole block. Its ends are 0 or of one sign, so their bits compare as integers.
QK_DEVICE Range block_range(Range r) {
  const uint32_t low = warp_max(bit_cast<uint32_t>(r.min) & 0x7fffffff);
  const uint32_t high = warp_max(bit_cast<uint32_t>(r.max) & 0x7fffffff);
  const uint32_t magnitude = warp_max(r.magnitude);
  uint32_t* parts = shared_memory<uint32_t>();  // [warps][3]
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
    uint32_t* part = parts + threadIdx.x / kWarp * 3;
    part[0] = low, part[1] = high, part[2] = magnitude;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t all[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) all[i] = warp_max(lane < warps ? parts[lane * 3 + i] : 0);
  return {-bit_cast<float>(all[0]), bit_cast<float>(all[1]), all[2]};
}

}  // namespace qkernels::cuda
