// How kernels are launched, by the CUDA runtime or on the emulator, and what a device has.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

#ifndef QKERNELS_HOST
#include <cuda_runtime.h>
#endif

// What a kernel calls.
#define QK_DEVICE __device__ __forceinline__

namespace qkernels::cuda {

// Of the current device.
int multiprocessors();

// Blocks that cover `count` with `each`; grid.x goes to 2^31 - 1, y and z to 65535.
inline unsigned blocks_for(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

// How a kernel is launched beside its grid.
struct LaunchOptions {
  unsigned cluster = 1;  // blocks along x that run together, from sm_90 on
  // The kernel may begin while the one before it in the stream still runs, and calls
  // wait_for_previous() in each thread before it reads or writes what that one writes or reads.
  bool overlaps = false;
};

// Whether kernels of the current device can begin before others have ended.
bool device_overlaps();

// Runs kernel(args...) with `shared_bytes` of shared memory. An empty grid is nothing to do.
template <class... Params, class... Args>
void launch_with(LaunchOptions options, void (*kernel)(Params...), dim3 grid, dim3 block,
                 int64_t shared_bytes, Stream stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef QKERNELS_HOST
  static_cast<void>(stream);
  host::run_clusters(grid, block, shared_bytes, options.cluster,
                     [&] { kernel(static_cast<Params>(args)...); });
  if (options.overlaps) host::check_waited();
#else
  cudaError_t error = cudaSuccess;
  // More than what every kernel may have must be asked for, on each device.
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (options.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = options.cluster;
      attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
      ++count;
    }
    if (options.overlaps && device_overlaps()) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count].val.programmaticStreamSerializationAllowed = 1;
      ++count;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("qkernels: a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
#endif
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes, Stream stream,
            const Args&... args) {
  launch_with({}, kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace qkernels::cuda
