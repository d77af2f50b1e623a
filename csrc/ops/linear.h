// The matrix product as other ops use it.
#pragma once

#include "core/params.h"
#include "ops/torch_api.h"

namespace qkernels {

// The ops `linear` and `linear_shared`.
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
              const std::optional<Tensor>& x_premul, const std::optional<Tensor>& k_perm,
              int64_t layout, int64_t in_features, int64_t out_features, int64_t group_size,
              int64_t activation, int64_t epilogue);
std::vector<Tensor> linear_shared(const Tensor& x, const std::vector<Tensor>& packed,
                                  const std::vector<std::optional<Tensor>>& bias, int64_t layout,
                                  int64_t in_features, const std::vector<int64_t>& out_features,
                                  int64_t group_size, int64_t activation,
                                  const std::vector<int64_t>& epilogue);

// Allocates the workspace and computes y: on a CPU on torch's threads, on a GPU in the order of the
// current stream. Everything in the arguments is set but the workspace.
void run_linear(const LinearArgs& whole);

// The same for several products of one x, which differ in packed, n, bias, epilogue and y alone. A
// CPU prepares x once and starts its threads once.
void run_linears(std::vector<LinearArgs> products);

// The part of it for int8 activations, on a GPU.
void run_linear_int8(const LinearArgs& args);

// Packs b, int8 [k, n], as a weight of int8 [n, k] without scales.
void run_pack_columns(const Tensor& b, const BlockShape& shape, uint8_t* packed);

}  // namespace qkernels
