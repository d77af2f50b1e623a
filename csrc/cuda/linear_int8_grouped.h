// Tiles of warpgroups for int8 activations and weights in groups, and which one a shape takes. Plain
// C++, so that `explain` can ask.
#pragma once

#include <algorithm>

#include "core/params.h"
#include "cuda/tile.h"

namespace qkernels::cuda {

// A warpgroup multiplies 64 outputs, a packed row each warp, with kTokens. kTogether blocks that run
// together, side by side in outputs, share their tokens.
template <int kConsumers_, int kTokens_, int kTogether_, int kCycles_>
struct GroupedWarpgroupTile {
  static constexpr int kConsumers = kConsumers_, kTokens = kTokens_, kTogether = kTogether_;
  static constexpr int kBlockFeatures = kConsumers * 64;
  static constexpr int kFeatures = kBlockFeatures * kTogether;
  static constexpr int kThreads = (kConsumers + 1) * 4 * kWarp;  // the last warpgroup copies
  static constexpr int kTokenBytes = kTokens * kPieceK;
  static constexpr bool kTwice = kTokens <= 64;  // registers have room for exact sums twice
  // Of a multiprocessor, for kPieceK with one group, as counted and not yet measured.
  static constexpr int kCycles = kCycles_;
};

// Of a cluster of four, each of which reads its own part of the weight: a few tokens need all
// multiprocessors for that.
struct GroupedWarpgroupTiles {
  using Large = GroupedWarpgroupTile<2, 128, 2, 640>;
  using Small = GroupedWarpgroupTile<1, 64, 2, 240>;
};

// So many tokens' sums of codes a group has, where the panel is tiled: copies want 16 bytes.
QK_HD inline int64_t code_sum_pitch(int64_t rows) { return round_up(rows, 4); }

// Blocks that run at once, in clusters. The multiprocessors are in parts of 16 or 18, and a cluster
// is in one of them.
template <class T>
int64_t clusters_at_once(int64_t multiprocessors) {
  const int64_t used = T::kTogether > 2 ? multiprocessors / 16 * 16 : multiprocessors;
  return std::max(used / T::kTogether, int64_t{1});
}

template <class T>
int64_t grouped_warpgroup_cycles(const LinearArgs& a, int64_t multiprocessors) {
  const int64_t tiles =
      round_up(a.n, T::kFeatures) / T::kFeatures * (round_up(a.rows, T::kTokens) / T::kTokens);
  const int64_t clusters = clusters_at_once<T>(multiprocessors);
  return round_up(tiles, clusters) / clusters * T::kCycles;
}

// Weights in groups, and int4. Up to so many tokens the skinny kernel is taken.
inline constexpr int64_t kMostSkinnyGrouped = 8;
inline bool takes_grouped_warpgroups(const LinearArgs& a, bool sm90a) {
  return sm90a && a.rows > kMostSkinnyGrouped &&
         (a.layout.format == Format::int4 || a.shape.groups > 1);
}

inline bool takes_large_warpgroups(const LinearArgs& a, int64_t multiprocessors) {
  return grouped_warpgroup_cycles<GroupedWarpgroupTiles::Large>(a, multiprocessors) <
         grouped_warpgroup_cycles<GroupedWarpgroupTiles::Small>(a, multiprocessors);
}

}  // namespace qkernels::cuda
