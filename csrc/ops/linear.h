// The matrix product as other ops use it.
#pragma once

#include "core/params.h"
#include "ops/torch_api.h"

namespace qkernels {

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
