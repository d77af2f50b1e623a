// linear with int8 activations: which kernel runs for which shape. Plain C++, so that `explain` can
// ask.
#pragma once

#include <algorithm>
#include <string>

#include "core/params.h"

namespace qkernels::cuda {

// A product advances by so many k at a time, and rows of the panel are padded to it.
inline constexpr int kStageK = 2 * kCudaChunk;

QK_HD inline int64_t panel_pitch(const BlockShape& s) { return round_up(s.k_padded, kStageK); }

// Reading the weight limits the time of so few tokens, and a tile would leave most of its width
// unused.
inline constexpr int64_t kSkinny = 16;
// Of so many, if the tiles would not fill the device either.
inline constexpr int64_t kMostSkinny = 32;

struct Int8Plan {
  enum Kind { skinny, small, large } kind;
  int parts;   // blocks that share a tile's sums, of rows that are one group
  int stages;  // of such a part
};

inline Int8Plan int8_plan(const LinearArgs& a, int64_t multiprocessors) {
  const int stages = static_cast<int>(panel_pitch(a.shape) / kStageK);
  const auto tiles = [&](int64_t edge) {
    return (a.n + edge - 1) / edge * ((a.rows + edge - 1) / edge);
  };
  Int8Plan plan{Int8Plan::small, 1, stages};
  if (a.rows <= kSkinny || (a.rows <= kMostSkinny && tiles(64) < multiprocessors)) {
    plan.kind = Int8Plan::skinny;
  } else if (a.rows > 64 && tiles(128) >= multiprocessors) {
    plan.kind = Int8Plan::large;
  } else if (a.shape.groups == 1) {
    // Two blocks on each multiprocessor, but a part that is worth its start.
    constexpr int64_t kLeast = 8;  // stages
    const int64_t parts = std::min(2 * multiprocessors / tiles(64), stages / kLeast);
    plan.parts = static_cast<int>(std::max(parts, int64_t{1}));
    plan.stages = (stages + plan.parts - 1) / plan.parts;
    plan.parts = stages == 0 ? 1 : (stages + plan.stages - 1) / plan.stages;
  }
  return plan;
}

// What `explain` calls it.
inline std::string linear_int8_name(const LinearArgs& a, int64_t multiprocessors) {
  switch (int8_plan(a, multiprocessors).kind) {
    case Int8Plan::skinny:
      return "cuda skinny int8 mma";
    case Int8Plan::small:
      return "cuda int8 mma 64x64";
    default:
      return "cuda int8 mma 128x128";
  }
}

}  // namespace qkernels::cuda
