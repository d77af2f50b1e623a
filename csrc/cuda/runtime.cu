// What the current device is and has.
#include "cuda/runtime.cuh"

namespace qkernels::cuda {

#ifdef QKERNELS_HOST

int multiprocessors() { return host::multiprocessors(); }
bool has_sm90a() { return host::sm90(); }

#else

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
    throw std::runtime_error("qkernels: the CUDA device does not answer");
  }
  return value;
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

bool device_overlaps() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

bool has_sm90a() {
#ifdef QKERNELS_SM90A
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

#endif

}  // namespace qkernels::cuda
