// Tiles of warpgroups for int8 activations and weights in groups, and which one a shape takes.
// Plain C++, so that `explain` can ask.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "core/params.h"
#include "cuda/tile.h"

namespace qkernels::cuda {

// A warpgroup multiplies 64 outputs, a packed row each warp, with kTokens. kTogether blocks that
// run together, side by side in outputs, share their tokens.
template <int kConsumers_, int kTokens_, int kTogether_, int kCycles_>
struct GroupedWarpgroupTile {
  static constexpr int kConsumers = kConsumers_, kTokens = kTokens_, kTogether = kTogether_;
  static constexpr int kBlockFeatures = kConsumers * 64;
  static constexpr int kFeatures = kBlockFeatures * kTogether;
  static constexpr int kThreads = (kConsumers + 1) * 4 * kWarp;  // the last warpgroup copies
  static constexpr int kTokenBytes = kTokens * kPieceK;
  static constexpr bool kTwice = kTokens <= 64;          // registers have room for exact sums twice
  static constexpr bool kGroupsAreRuns = kTokens == 32;  // no others
  // Of a multiprocessor, for kPieceK with one group, as counted and not yet measured.
  static constexpr int kCycles = kCycles_;
};

// A few tokens need all multiprocessors to read the weight. Clusters of more than two blocks would
// not all run at once: 30 of four did on 132 multiprocessors.
struct GroupedWarpgroupTiles {
  using Large = GroupedWarpgroupTile<2, 128, 2, 640>;
  using Small = GroupedWarpgroupTile<1, 64, 2, 375>;
  using Tiny = GroupedWarpgroupTile<1, 32, 2, 270>;
};

// So many tokens' sums of codes a group has, where the panel is tiled: copies want 16 bytes.
QK_HD inline int64_t code_sum_pitch(int64_t rows) { return round_up(rows, 4); }

template <class T>
int64_t grouped_warpgroup_cycles(const LinearArgs& a, int64_t multiprocessors) {
  const int64_t tiles =
      round_up(a.n, T::kFeatures) / T::kFeatures * (round_up(a.rows, T::kTokens) / T::kTokens);
  const int64_t clusters = std::max(multiprocessors / T::kTogether, int64_t{1});
  return round_up(tiles, clusters) / clusters * T::kCycles;
}

// On an H200 its tests pass, to the bit, but not under compute-sanitizer, whose racecheck reports
// races: until it is known whose fault that is, the kernel has to be asked for.
inline bool grouped_warpgroups_asked_for() {
  const char* const given = std::getenv("QKERNELS_GROUPED_WGMMA");
  return given != nullptr && *given == '1';
}

// Weights in groups, and int4. Up to so many tokens the skinny kernel is taken.
inline constexpr int64_t kMostSkinnyGrouped = 16;
inline bool takes_grouped_warpgroups(const LinearArgs& a, bool sm90a) {
  return sm90a && a.rows > kMostSkinnyGrouped &&
         (a.layout.format == Format::int4 || a.shape.groups > 1) && grouped_warpgroups_asked_for();
}

// A group is what products advance by: 32, 64 or 128 k.
inline bool groups_are_runs(const BlockShape& s) {
  return s.groups > 1 &&
         (s.group_padded == 32 || s.group_padded == 64 || s.group_padded == kPieceK);
}

// Tokens of the tile that a shape takes.
inline int grouped_warpgroup_tokens(const LinearArgs& a, int64_t multiprocessors) {
  using Tiles = GroupedWarpgroupTiles;
  int tokens = Tiles::Large::kTokens;
  int64_t least = grouped_warpgroup_cycles<Tiles::Large>(a, multiprocessors);
  const auto take = [&](int other, int64_t cycles) {
    if (cycles <= least) tokens = other, least = cycles;
  };
  take(Tiles::Small::kTokens, grouped_warpgroup_cycles<Tiles::Small>(a, multiprocessors));
  if (groups_are_runs(a.shape)) {
    take(Tiles::Tiny::kTokens, grouped_warpgroup_cycles<Tiles::Tiny>(a, multiprocessors));
  }
  return tokens;
}

}  // namespace qkernels::cuda
