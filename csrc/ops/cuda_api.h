// ops/device.h for CUDA. With QKERNELS_HOST the CPU stands for the GPU: the tests build the same
// glue and kernels for it, as torch.ops.qkernels_host.
#pragma once

#include <string>

#include "cuda/launch.h"
#include "ops/torch_api.h"

#ifndef QKERNELS_HOST
#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda; torch's header declares it only where the CUDA toolkit's version is known.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace qkernels {

inline constexpr int kDeviceFamily = kDeviceCuda;
inline constexpr const char* kDeviceName = "GPU";
inline constexpr const char* kMoveToDevice = ".cuda()";
inline constexpr bool kReadable = false;

#ifdef QKERNELS_HOST

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

inline Tensor empty_on_device(const Shape& shape, const Shape& strides, ScalarType type) {
  return empty_cpu(shape, strides, type);
}

inline cuda::Stream current_stream() { return nullptr; }

inline torch::stable::Device this_device() { return torch::headeronly::DeviceType::CPU; }

#else

// The GPU of the op that this thread is in, -1 outside of one.
inline int32_t& current_device() {
  thread_local int32_t index = -1;
  return index;
}

// Makes the tensor's GPU the current one, for launches and allocations.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) : outer_(current_device()) {
    // A CPU tensor among CUDA tensors is for the checks to refuse.
    if (!t.is_cuda()) return;
    current_device() = t.get_device_index();
    guard_.emplace(current_device());
  }
  ~DeviceGuard() { current_device() = outer_; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int32_t outer_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// All tensors of an op are on one GPU.
inline bool on_device(const Tensor& t) {
  return t.is_cuda() && (current_device() < 0 || t.get_device_index() == current_device());
}

inline Tensor empty_on_device(const Shape& shape, const Shape& strides, ScalarType type) {
  return empty_strided(shape, strides, type, aoti_torch_device_type_cuda(), current_device());
}

inline cuda::Stream current_stream() {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(current_device(), &stream));
  return stream;
}

inline torch::stable::Device this_device() {
  return {torch::headeronly::DeviceType::CUDA,
          static_cast<torch::stable::DeviceIndex>(current_device())};
}

#endif

inline Tensor empty_on_device(const Shape& shape, ScalarType type) {
  return empty_on_device(shape, dense_strides(shape), type);
}

// Device memory of a call, from torch's allocator: captured graphs may hold it.
inline Tensor workspace_on_device(int64_t bytes) {
  return empty_on_device({bytes}, ScalarType::Byte);
}

// Memory of the device as torch's ops take it. They only read what was const.
inline Tensor view_on_device(const void* data, const Shape& shape, const Shape& strides,
                             ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), shape, strides, this_device(), type);
}
inline Tensor view_on_device(const void* data, const Shape& shape, ScalarType type) {
  return view_on_device(data, shape, dense_strides(shape), type);
}

}  // namespace qkernels

#ifdef QKERNELS_HOST
#define QK_OPS(m) STABLE_TORCH_LIBRARY_IMPL(qkernels_host, CPU, m)
#define QK_SCHEMAS(m) STABLE_TORCH_LIBRARY(qkernels_host, m)
#else
#define QK_OPS(m) STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m)
#endif
