// The ops on floats between the layers of a transformer, for the CPU.
#pragma once

#include <tuple>

#include "ops/torch_api.h"

namespace qkernels {

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask, int64_t heads, double scale, bool causal);

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                    const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, double eps, bool rms,
                                    bool keep_sum);

}  // namespace qkernels
