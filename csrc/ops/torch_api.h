// The part of torch that the glue uses, through the stable ABI: one build serves every torch from
// 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/format.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // what torch before 2.13 has
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace qkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// A new tensor. The shim call skips the dispatcher, which costs a microsecond. What it says of an
// error is lost on the way (before torch 2.13), so a sentence is made here.
inline Tensor empty_strided(const Shape& shape, const Shape& strides, ScalarType type,
                            int32_t device_type, int32_t device) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
          device, &handle) != 0) {
    throw std::runtime_error("qkernels: torch could not allocate a tensor of shape " +
                             text_of(shape) + "; free memory, or compute fewer rows at a time");
  }
  return Tensor(handle);
}

inline Tensor empty_cpu(const Shape& shape, const Shape& strides, ScalarType type) {
  return empty_strided(shape, strides, type, aoti_torch_device_type_cpu(), 0);
}

inline Shape dense_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return strides;
}

inline Tensor empty_cpu(const Shape& shape, ScalarType type) {
  return empty_cpu(shape, dense_strides(shape), type);
}

// The ScalarType of a DType.
inline ScalarType scalar_type(DType type) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                  ScalarType::Char, ScalarType::Int};
  return types[static_cast<int>(type)];
}

// Runs f(begin, end) over [0, count) on torch's own threads, `grain` or more steps to a thread.
// What f throws is carried past torch's interface, where its message would be lost.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) {
    f(0, count);
  } else {
    std::exception_ptr error;
    std::mutex mutex;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      try {
        f(begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }
}

// The grain that gives every thread at least `work` units, of which a step has `step_work`.
inline int64_t grain_for(int64_t work, int64_t step_work) {
  return step_work <= 0 ? work : (work + step_work - 1) / step_work;
}

}  // namespace qkernels
