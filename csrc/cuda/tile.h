// The tiles of int8 products, and how long they take. Plain C++, so that `explain` can ask.
#pragma once

#include <algorithm>

#include "core/params.h"

namespace qkernels::cuda {

// A product advances by so many k at a time, and rows of the panel are padded to it.
inline constexpr int kStageK = 2 * kCudaChunk;

QK_HD inline int64_t panel_pitch(const BlockShape& s) { return round_up(s.k_padded, kStageK); }

// The same for warpgroups: pieces of the panel, see panel.cuh.
inline constexpr int kPieceK = 128, kPanelRows = 128, kPieceBytes = kPanelRows * kPieceK;

inline constexpr int kRowPieceBytes = kPieceK * kLanes;  // of 16 outputs' int8 weights

QK_HD inline int64_t tiled_pitch(const BlockShape& s) {
  return round_up(s.k_padded, kPieceK) * kPanelRows;
}

template <int kFeatures_, int kTokens_, int kWarpFeatures, int kWarpTokens, int kStages_,
          int kBlocks_>
struct Tile {
  static constexpr int kFeatures = kFeatures_, kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, for the compiler
  static constexpr int kAcross = kFeatures / kWarpFeatures;  // warps side by side
  static constexpr int kWarps = kAcross * (kTokens / kWarpTokens);
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarpFeatures / 16;  // m16 tiles of a warp
  static constexpr int kColumns = kWarpTokens / 8;  // n8 tiles of a warp
  static constexpr int kTokenBytes = kTokens * kStageK;
  // Of a multiprocessor for a stage, by what limits it: products of 6.4 cycles on a quarter of it,
  // or int8 operands that warps read from shared memory and copies write to it, 128 bytes a cycle.
  static constexpr int kProductCycles = kFeatures / 16 * (kTokens / 8) * 2 / 4 * 64 / 10;
  static constexpr int kSharedCycles =
      (kWarps * (kWarpFeatures + kWarpTokens) + kFeatures + kTokens) * kStageK / 128;
  static constexpr int kCycles = std::max(kProductCycles, kSharedCycles);
  // Results leave by shared memory, so many tokens at once.
  static constexpr int kRound = kTokens < 64 ? kTokens : 64;
  static constexpr int kRoundPitch = kFeatures + 4;  // words; see `exchange`
};

// Cycles per stage until a device has done `times` products with tiles T, each multiprocessor one
// tile after the other.
template <class T>
int64_t product_cycles(int64_t features, int64_t tokens, int64_t times, int64_t multiprocessors) {
  const int64_t tiles = round_up(features, T::kFeatures) / T::kFeatures *
                        (round_up(tokens, T::kTokens) / T::kTokens) * times;
  return round_up(tiles, multiprocessors) / multiprocessors * T::kCycles;
}

// A tile of two warpgroups: 128 outputs, a quarter of them for each warp of both. Two blocks that
// run together, side by side in outputs, share their tokens.
struct WarpgroupTile {
  static constexpr int kTokens = 256, kStages = 4;  // of kPieceK
  static constexpr int kBlockFeatures = 128, kTogether = 2;
  static constexpr int kFeatures = kBlockFeatures * kTogether;
  static constexpr int kThreads = 3 * 4 * kWarp;  // the third warpgroup copies
  static constexpr int kTokenBytes = kTokens * kPieceK;
  static constexpr int kWeightBytes = kBlockFeatures * kPieceK;
  // Of two multiprocessors, for kStageK. The products need 512; in these units an H200 was measured
  // at 800, with a memory barrier in the loop that is gone now. See docs/performance.md.
  static constexpr int kCycles = 800;
};

}  // namespace qkernels::cuda
