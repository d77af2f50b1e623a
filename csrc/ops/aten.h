// The few ops of torch that the glue of a GPU calls, by torch's dispatcher. How they compute is
// torch's affair, with torch's settings. None of the tensors that they get wants a gradient.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "ops/torch_api.h"

namespace qkernels {

template <class... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y = a . b
inline void mm_out(const Tensor& y, const Tensor& a, const Tensor& b) {
  call_aten("aten::mm", "out", a, b, y);
}

// y = x . weight^T + bias, all of one type.
inline void linear_out(const Tensor& y, const Tensor& x, const Tensor& weight,
                       const std::optional<Tensor>& bias) {
  call_aten("aten::linear", "out", x, weight, bias, y);
}

inline Tensor flip(const Tensor& x, const Shape& dims) {
  return call_aten("aten::flip", "", x, dims);
}

struct ConvolutionGeometry {
  Shape stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;
};

// Without a bias.
inline Tensor convolution(const Tensor& x, const Tensor& weight, const ConvolutionGeometry& g) {
  return call_aten("aten::convolution", "", x, weight, std::optional<Tensor>(), g.stride, g.padding,
                   g.dilation, g.transposed, g.output_padding, g.groups);
}

}  // namespace qkernels
