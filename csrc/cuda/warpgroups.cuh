// What kernels with products of warpgroups share. Warpgroups that multiply, the consumers, read
// stages of k in a ring in shared memory, which others, the producers, keep filled by copies in the
// background. Each stage has two barriers: `filled` for the consumers, `emptied` for the producers.
#pragma once

#include "cuda/ptx_wgmma.cuh"
#include "cuda/tile.h"

namespace qkernels::cuda {

// Where a thread is in a ring, over all tiles of its block: the stage, and the parity of the phase
// of its `filled` that is waited for. That of `emptied` is the other one, so that nobody waits in
// the first round. (CUTLASS calls such a thing a PipelineState.)
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  QK_DEVICE void next(int stages) {  // that the ring has
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Calls body(first packed row, first token) for each tile of a block that is number `side` of
// `sides` side by side in a cluster of kTogether blocks. Those that run at the same time take 16
// tiles of tokens and then the next features, so that they share both operands in the L2 cache.
template <int kTogether, int kRows, int kTokens, class Body>
QK_DEVICE void each_in_bands(uint32_t features, uint32_t tokens, int sides, int side,
                             const Body& body) {
  constexpr uint32_t kBand = 16;
  const uint32_t per_band = kBand * features;
  for (uint32_t tile = blockIdx.x / kTogether; tile < features * tokens;
       tile += gridDim.x / kTogether) {
    const uint32_t band = tile / per_band, first = band * kBand;
    const uint32_t width = min(tokens - first, kBand), left = tile - band * per_band;
    const int64_t across = left / width;
    body((across * sides + side) * kRows, int64_t{first + left % width} * kTokens);
  }
}

// Where rows from `row` on, a multiple of eight, begin in a tiled panel.
QK_DEVICE const uint8_t* tiled_rows(const LinearArgs& a, int64_t row) {
  return a.panel + row / kPanelRows * tiled_pitch(a.shape) + row % kPanelRows * kPieceK;
}

// A warpgroup's results go by shared memory as words of 64 outputs, so many columns (tokens or
// pixels) at a time, kWordPitch apart: the four columns that a warp writes at once, eight words
// each, lie in different banks.
inline constexpr int kWordColumns = 32, kWordPitch = 64 + 4;

// Puts the sums of kWordColumns columns there, which thread `thread` of the warpgroup has from
// `first` on.
template <class Word, int kCount>
QK_DEVICE void put_words(uint32_t* words, const Word (&sums)[kCount], int first, int thread) {
  const int warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < kWordColumns / 2; ++i) {
    const int column = i / 4 * 8 + 2 * t + i % 2, output = warp * 16 + g + i / 2 % 2 * 8;
    words[column * kWordPitch + output] = bit_cast<uint32_t>(sums[first + i]);
  }
}

}  // namespace qkernels::cuda
