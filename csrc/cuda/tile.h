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

// ---- Warpgroups ---------------------------------------------------------------------------------

// Blocks of a cluster: side by side in outputs they share their tokens, or each takes a part of k.
// Of clusters of four an H200 runs 30 at once, twelve multiprocessors less than it has.
inline constexpr int kTogether = 2;

// A tile of two warpgroups, 64 outputs each, a quarter of them for each warp.
template <int kTokens_>
struct WarpgroupTile {
  static constexpr int kFeatures = 128, kTokens = kTokens_;
  static constexpr int kTokenBytes = kTokens * kPieceK, kWeightBytes = kFeatures * kPieceK;
  // Copies under way: many more than the 30 KiB of each multiprocessor that the memory's rate
  // needs at a latency of a microsecond.
  static constexpr int kStages = 192 * 1024 / (kTokenBytes + kWeightBytes);  // of kPieceK
  // Of a multiprocessor for a stage, by what limits it: products, 4096 a cycle, or copies, 30
  // bytes a cycle from the L2 cache.
  static constexpr int kProductCycles = kFeatures * kTokens * kPieceK / 4096;
  static constexpr int cycles(int sides) {
    return std::max(kProductCycles, (kWeightBytes + kTokenBytes / sides) / 30);
  }
  // Until the first stage is there, and from the last one to results; and for giving sums to other
  // blocks, 32 bytes a cycle.
  static constexpr int kEndCycles = 2000 + 8 * kTokens;
  static constexpr int kPartCycles = 1000 + kFeatures * kTokens * 4 / 32;
};

struct WarpgroupTiles {
  using Large = WarpgroupTile<256>;
  using Medium = WarpgroupTile<128>;
  using Small = WarpgroupTile<64>;
};

// Which tile, and how many blocks share the sums of one, a part of k each.
struct WarpgroupPlan {
  int tokens = 0, parts = 0;
  int64_t cycles = 0;
};

// Clusters that run at the same time, one block on a multiprocessor.
inline int64_t clusters_at_once(int64_t multiprocessors) {
  return std::max(multiprocessors / kTogether, int64_t{1});
}

template <class T>
void take_faster(WarpgroupPlan* best, const BlockShape& shape, int64_t features, int64_t tokens,
                 int64_t multiprocessors) {
  const int64_t stages = round_up(shape.k_padded, kPieceK) / kPieceK;
  // What memory needs for the weight: 3.9 TB/s.
  const int64_t least = features * shape.k_padded / (17 * multiprocessors);
  const int64_t at_once = clusters_at_once(multiprocessors);
  for (int parts = 1; parts <= kTogether; ++parts) {
    // Of tokens that are not shared one copy brings a panel's piece at most.
    if (parts > stages || (parts > 1 && T::kTokens > kPanelRows)) break;
    const int sides = kTogether / parts;
    const int64_t tiles = round_up(features, sides * T::kFeatures) / (sides * T::kFeatures) *
                          (round_up(tokens, T::kTokens) / T::kTokens);
    const int64_t one = (stages + parts - 1) / parts * T::cycles(sides) + T::kEndCycles +
                        (parts > 1 ? T::kPartCycles : 0);
    const int64_t cycles = std::max(least, round_up(tiles, at_once) / at_once * one);
    if (best->tokens == 0 || cycles < best->cycles) *best = {T::kTokens, parts, cycles};
  }
}

inline WarpgroupPlan warpgroup_plan(const BlockShape& shape, int64_t features, int64_t tokens,
                                    int64_t multiprocessors) {
  WarpgroupPlan best;
  take_faster<WarpgroupTiles::Small>(&best, shape, features, tokens, multiprocessors);
  take_faster<WarpgroupTiles::Medium>(&best, shape, features, tokens, multiprocessors);
  take_faster<WarpgroupTiles::Large>(&best, shape, features, tokens, multiprocessors);
  return best;
}

}  // namespace qkernels::cuda
