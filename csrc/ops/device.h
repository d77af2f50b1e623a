// The device of the library that a file is built into. Files of csrc/ops that name no device are
// built into `_C` for the CPU and into `_C_cuda`; what differs is here.
#pragma once

#ifdef QKERNELS_CUDA
#include "ops/cuda_api.h"
#else

#include "ops/torch_api.h"

namespace qkernels {

inline constexpr int kDeviceFamily = kDeviceX86;
inline constexpr const char* kDeviceName = "CPU";
inline constexpr const char* kMoveToDevice = ".cpu()";
// Whether the glue may read what tensors hold. On a GPU it would have to wait for the kernels that
// write it.
inline constexpr bool kReadable = true;

// Stays in scope during an op and names the tensor that says where it runs.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

inline Tensor empty_on_device(const Shape& shape, const Shape& strides, ScalarType type) {
  return empty_cpu(shape, strides, type);
}
inline Tensor empty_on_device(const Shape& shape, ScalarType type) {
  return empty_cpu(shape, type);
}

}  // namespace qkernels

// Registers kernels: QK_OPS(m) { m.impl("add", TORCH_BOX(&qkernels::add)); }
#define QK_OPS(m) STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m)
#define QK_SCHEMAS(m) STABLE_TORCH_LIBRARY(qkernels, m)

#endif
