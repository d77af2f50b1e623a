// The part of torch that the glue uses, through the stable ABI: one build serves every torch from
// 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
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

// A new CPU tensor. The shim call skips the dispatcher, which costs a microsecond.
inline Tensor empty_cpu(const Shape& shape, const Shape& strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
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

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The ScalarType of a DType.
inline ScalarType scalar_type(DType type) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                  ScalarType::Char, ScalarType::Int};
  return types[static_cast<int>(type)];
}

// Runs f(begin, end) over [0, count) on torch's own threads, `grain` or more steps to a thread. f
// must not throw: a message would be lost on the way.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) {
    f(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// The grain that gives every thread at least `work` units, of which a step has `step_work`.
inline int64_t grain_for(int64_t work, int64_t step_work) {
  return step_work <= 0 ? work : (work + step_work - 1) / step_work;
}

}  // namespace qkernels
