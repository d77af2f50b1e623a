// The kernels of linear with int8 activations, and how one is chosen. All give the same bits: sums
// within a group are exact, and groups are added up in one order.
#pragma once

#include "cuda/int8_gemm.cuh"

namespace qkernels::cuda {

// 64 x 64 a warp: each operand that comes from shared memory meets as many of the other as
// registers allow.
struct RowTiles {
  using Large = Tile<128, 128, 64, 64, 4, 2>;
  using Small = Tile<64, 64, 32, 32, 5, 2>;
};

// A warp has floats beside its exact sums, so it takes half as many tokens.
struct GroupedTiles {
  using Large = Tile<128, 128, 64, 32, 4, 1>;
  using Small = Tile<64, 64, 32, 32, 4, 2>;
};

struct Int8Plan {
  enum Kind { skinny, small, large } kind;
  int parts;   // blocks that share a tile's sums, of rows that are one group
  int stages;  // of such a part
};

void prepare_int8(const LinearArgs& a, Stream stream);

// Up to 32 tokens.
void linear_int8_skinny(const LinearArgs& a, Stream stream);

// Any number of tokens. `partial` is plan.parts times [rows, n rounded up to 4] if there are
// several parts.
void linear_int8_row(const LinearArgs& a, const Int8Plan& plan, int32_t* partial, Stream stream);
void linear_int8_grouped(const LinearArgs& a, bool large, Stream stream);

}  // namespace qkernels::cuda
