// Where codes of x lie between `prepare` and the kernels that multiply them.
//
//   rows   [rows][panel_pitch]: for mma.sync, whose threads read eight codes each
//   tiles  [rows / 128][k / 128] pieces of 128 rows x 128 bytes, 16 KiB each, for warpgroup_mma
//          (matrix_in_shared), so that one copy of consecutive bytes brings a piece to shared
//          memory. Of a thread's eight codes the first four belong to the first 16 k of a product
//          and the others to the last 16, as the packed weight has them.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/tile.h"

namespace qkernels::cuda {

struct Panel {
  uint8_t* at;
  int64_t pitch;  // of rows; of tiles, bytes of 128 rows
  bool tiled;

  // The 32-bit word `half` of eight codes. Those of the other half are 16 bytes on, or 16 back.
  QK_DEVICE uint8_t* word(int64_t row, int64_t eight, int half) const {
    if (!tiled) return at + row * pitch + eight * 8 + half * 4;
    const int r = static_cast<int>(row % kPanelRows), in_row = static_cast<int>(eight % 16);
    const int sixteen = (in_row / 4 * 2 + half) ^ (r & 7);
    return at + row / kPanelRows * pitch + eight / 16 * kPieceBytes + r * kPieceK + sixteen * 16 +
           in_row % 4 * 4;
  }

  QK_DEVICE void store(int64_t row, int64_t eight, uint2 codes) const {
    if (!tiled) return store_64(word(row, eight, 0), codes);
    *reinterpret_cast<uint32_t*>(word(row, eight, 0)) = codes.x;
    *reinterpret_cast<uint32_t*>(word(row, eight, 1)) = codes.y;
  }

  // The four eights of a chunk.
  QK_DEVICE void store_chunk(int64_t row, uint32_t chunk, const uint2 (&e)[4]) const {
    if (!tiled) {
      uint8_t* const to = at + row * pitch + int64_t{chunk} * kCudaChunk;
      store_128(to, make_uint4(e[0].x, e[0].y, e[1].x, e[1].y));
      store_128(to + 16, make_uint4(e[2].x, e[2].y, e[3].x, e[3].y));
      return;
    }
    store_128(word(row, chunk * 4, 0), make_uint4(e[0].x, e[1].x, e[2].x, e[3].x));
    store_128(word(row, chunk * 4, 1), make_uint4(e[0].y, e[1].y, e[2].y, e[3].y));
  }
};

inline Panel panel_of(const LinearArgs& a, bool tiled) {
  return {a.panel, tiled ? tiled_pitch(a.shape) : panel_pitch(a.shape), tiled};
}

}  // namespace qkernels::cuda
