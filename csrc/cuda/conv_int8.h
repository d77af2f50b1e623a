// conv with int8 activations: which kernel runs for which shape. Plain C++, so that `explain` can
// ask.
#pragma once

#include <string>

#include "cuda/tile.h"

namespace qkernels::cuda {

// A tile of kConsumers warpgroups, each of which multiplies 64 outputs with kColumns pixels:
// kAcross of them side by side in outputs, the others in pixels. A multiprocessor has kBlocks at a
// time: while one stores its results, the other one multiplies.
template <int kConsumers_, int kProducers_, int kAcross_, int kColumns_, int kStages_, int kBlocks_>
struct ConvWarpgroupTile {
  static constexpr int kConsumers = kConsumers_, kProducers = kProducers_;  // warpgroups
  static constexpr int kAcross = kAcross_, kColumns = kColumns_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;  // stages of kPieceK
  static constexpr int kFeatures = 64 * kAcross, kPixels = kColumns * (kConsumers / kAcross);
  // Producers that gather a stage together, so many pixels each; else they take turns.
  static constexpr int kStageProducers = kPixels > 128 ? kProducers : 1;
  static constexpr int kOwnPixels = kPixels / kStageProducers;
  static constexpr int kThreads = (kConsumers + kProducers) * 4 * kWarp;
  static constexpr int kPixelBytes = kPixels * kPieceK, kWeightBytes = kFeatures * kPieceK;
  // Of a multiprocessor for a stage. Shared memory limits it, at 128 bytes a cycle: each warpgroup
  // reads its pixels and weights, pixels are read through L1 and written, weights are written.
  static constexpr int kCycles =
      (kConsumers * (kColumns + 64) + 2 * kPixels + kFeatures) * kPieceK / 128;
  // For its results, about 16 instructions each, 128 a cycle. Other blocks hide them.
  static constexpr int kResultCycles = kFeatures * kPixels / 8 / kBlocks;
};

struct ConvTiles {
  using Narrow = ConvWarpgroupTile<1, 1, 1, 128, 3, 2>;
  using Short = ConvWarpgroupTile<2, 2, 2, 96, 4, 1>;
  using Middle = ConvWarpgroupTile<2, 2, 2, 128, 4, 1>;
  using Long = ConvWarpgroupTile<2, 2, 2, 192, 4, 1>;
};

// Pieces of 32 k, each of which belongs to one tap, are looked up in a table of so many.
inline constexpr int kMostConvChunks = 512;

inline bool conv_takes_warpgroups(bool depthwise, int64_t groups, int64_t group_channels,
                                  int64_t taps, bool sm90a) {
  return sm90a && !depthwise && groups == 1 && group_channels % kCudaChunk == 0 &&
         taps * group_channels / kCudaChunk <= kMostConvChunks;
}

template <class T>
int64_t conv_cycles(int64_t features, int64_t pixels, int64_t k, int64_t multiprocessors) {
  const int64_t tiles =
      round_up(features, T::kFeatures) / T::kFeatures * (round_up(pixels, T::kPixels) / T::kPixels);
  const int64_t blocks = multiprocessors * T::kBlocks;
  return round_up(tiles, blocks) / blocks * T::kBlocks *
         (round_up(k, kPieceK) / kPieceK * T::kCycles + T::kResultCycles);
}

// What `explain` calls it.
inline std::string conv_int8_name(bool depthwise, int64_t groups, int64_t group_channels,
                                  int64_t taps, bool sm90a) {
  if (depthwise) return "cuda depthwise int8";
  return conv_takes_warpgroups(depthwise, groups, group_channels, taps, sm90a)
             ? "cuda implicit gemm int8 wgmma"
             : "cuda implicit gemm int8 mma";
}

}  // namespace qkernels::cuda
