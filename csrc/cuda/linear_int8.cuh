// The kernels of linear with int8 activations. All give the same bits: sums within a group are
// exact, and groups are added up in one order.
#pragma once

#include "cuda/linear_int8.h"
#include "cuda/ptx.cuh"

namespace qkernels::cuda {

// `tiled`: the panel's order, see panel.cuh.
void prepare_int8(const LinearArgs& a, bool tiled, Stream stream);

// Up to 32 tokens.
void linear_int8_skinny(const LinearArgs& a, Stream stream);

// Any number of tokens. `partial` is plan.parts times [rows, n rounded up to 4] if there are
// several parts.
void linear_int8_row(const LinearArgs& a, const Int8Plan& plan, int32_t* partial, Stream stream);
// On sm_90a, int8 weights whose rows are one group each; the panel is tiled.
void linear_int8_warpgroups(const LinearArgs& a, const Int8Plan& plan, Stream stream);
// On sm_90a, weights in groups and int4; the panel is tiled.
void linear_int8_grouped_warpgroups(const LinearArgs& a, int tokens, Stream stream);
void linear_int8_grouped(const LinearArgs& a, bool large, Stream stream);

}  // namespace qkernels::cuda
