// linear with int8 activations: which kernel runs for which shape. Plain C++, so that `explain` can
// ask.
#pragma once

#include <string>

#include "cuda/linear_int8_grouped.h"
#include "cuda/tile.h"

namespace qkernels::cuda {

// Reading the weight limits the time of so few tokens, and a tile would leave most of its width
// unused.
inline constexpr int64_t kSkinny = 16;
// Of so many, if the tiles would not fill the device either.
inline constexpr int64_t kMostSkinny = 32;

// What of a GPU decides.
struct Gpu {
  int64_t multiprocessors;
  bool sm90a;  // its instructions may be used
};

struct Int8Plan {
  enum Kind { skinny, small, large, warpgroups, grouped_warpgroups } kind;
  int parts;       // blocks that share a tile's sums, of rows that are one group
  int stages;      // of such a part, by mma.sync
  int tokens = 0;  // of a tile of warpgroups

  bool tiled() const { return kind >= warpgroups; }  // the panel's order, see panel.cuh
};

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

template <class Tiles>
bool takes_large(const LinearArgs& a, int64_t multiprocessors) {
  return a.rows > Tiles::Small::kTokens &&
         product_cycles<typename Tiles::Large>(a.n, a.rows, 1, multiprocessors) <=
             product_cycles<typename Tiles::Small>(a.n, a.rows, 1, multiprocessors);
}

// Of int8 weights whose rows are one group each. 2048 rows of 8192 x 8192 took 219 us on an H200,
// by mma.sync 380.
inline bool takes_warpgroups(const LinearArgs& a, const Gpu& gpu) {
  return gpu.sm90a && a.layout.format == Format::int8 && a.shape.groups == 1 && a.shape.k > 0;
}

inline Int8Plan int8_plan(const LinearArgs& a, const Gpu& gpu) {
  const int64_t multiprocessors = gpu.multiprocessors;
  const int stages = static_cast<int>(panel_pitch(a.shape) / kStageK);
  using Small = RowTiles::Small;  // of groups too, in size
  const int64_t tiles = round_up(a.n, Small::kFeatures) / Small::kFeatures *
                        (round_up(a.rows, Small::kTokens) / Small::kTokens);
  Int8Plan plan{Int8Plan::small, 1, stages};
  if (a.rows > kSkinny && takes_warpgroups(a, gpu)) {
    const WarpgroupPlan best = warpgroup_plan(a.shape, a.n, a.rows, multiprocessors);
    return {Int8Plan::warpgroups, best.parts, 0, best.tokens};
  }
  if (takes_grouped_warpgroups(a, gpu.sm90a)) {
    plan.kind = Int8Plan::grouped_warpgroups;
    plan.tokens = grouped_warpgroup_tokens(a, multiprocessors);
  } else if (a.rows <= kSkinny || (a.rows <= kMostSkinny && tiles < multiprocessors)) {
    plan.kind = Int8Plan::skinny;
  } else if (a.shape.groups == 1 ? takes_large<RowTiles>(a, multiprocessors)
                                 : takes_large<GroupedTiles>(a, multiprocessors)) {
    plan.kind = Int8Plan::large;
  } else if (a.shape.groups == 1) {
    // Two blocks on each multiprocessor, but a part that is worth its start.
    constexpr int64_t kLeast = 8;  // stages
    const int64_t parts = std::min(2 * multiprocessors / tiles, stages / kLeast);
    plan.parts = static_cast<int>(std::max(parts, int64_t{1}));
    plan.stages = (stages + plan.parts - 1) / plan.parts;
    plan.parts = stages == 0 ? 1 : (stages + plan.stages - 1) / plan.stages;
  }
  return plan;
}

// What `explain` calls it.
inline std::string linear_int8_name(const LinearArgs& a, const Gpu& gpu) {
  const Int8Plan plan = int8_plan(a, gpu);
  switch (plan.kind) {
    case Int8Plan::skinny:
      return "cuda skinny int8 mma";
    case Int8Plan::small:
      return "cuda int8 mma 64x64";
    case Int8Plan::warpgroups:
      return "cuda int8 wgmma 128x" + std::to_string(plan.tokens) +
             (plan.parts > 1 ? " split k" : "");
    case Int8Plan::grouped_warpgroups:
      return "cuda int8 wgmma grouped " + std::string(plan.tokens == 128 ? "128x" : "64x") +
             std::to_string(plan.tokens);
    default:
      return "cuda int8 mma 128x128";
  }
}

}  // namespace qkernels::cuda
