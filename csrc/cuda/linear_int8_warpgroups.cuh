// Of linear by products of warpgroups: what a block keeps in shared memory, and the way from a
// tile's exact sums to y.
//
// Shared memory: stages of [tokens | weights], the tokens as `matrix_in_shared` wants them, the
// weights as they are packed; then barriers, what results need of outputs and tokens, and for each
// warpgroup results on their way to other threads.
#pragma once

#include "cuda/int8.cuh"
#include "cuda/warpgroups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 3 * kWarpgroup, kMultiplying = 2 * kWarpgroup;
constexpr int kFetching = kWarpgroup - kWarp;
constexpr int kFeatures = 128;            // of a tile
constexpr int kPrefetchBytes = 8 * 1024;  // of 16 outputs' weights
// Results of 16 bits leave so many tokens at a time, others kWordColumns.
constexpr int kRoundTokens = 64;

// What results need of an output.
struct OutputTerms {
  float scale, weight_sum, bias;
  int32_t zero;  // zero_factor
};

template <class T>
struct SharedMemory {
  static_assert(T::kFeatures == kFeatures);
  static constexpr int kStage = T::kTokenBytes + T::kWeightBytes;
  static constexpr int kBarriers = T::kStages * kStage;
  static constexpr int kOutputTerms = kBarriers + 8 * (2 * T::kStages + 4);
  static constexpr int kTokenTerms = kOutputTerms + kFeatures * 16;
  static constexpr int kResults = kTokenTerms + T::kTokens * static_cast<int>(sizeof(TokenCodes));
  static_assert(kOutputTerms % 16 == 0 && kResults % 16 == 0);
  static constexpr int kResultBytes = kWordColumns * kWordPitch * 4;
  static_assert(kRoundTokens * 128 <= kResultBytes);
  static constexpr int kBytes = kResults + 2 * kResultBytes;

  uint8_t* at;
  QK_DEVICE uint8_t* tokens(int stage) const { return at + stage * kStage; }
  QK_DEVICE uint8_t* weights(int stage) const { return tokens(stage) + T::kTokenBytes; }
  QK_DEVICE Barrier* filled(int stage) const {
    return reinterpret_cast<Barrier*>(at + kBarriers) + stage;
  }
  QK_DEVICE Barrier* emptied(int stage) const { return filled(T::kStages + stage); }
  QK_DEVICE Barrier* terms_filled() const { return filled(2 * T::kStages); }
  QK_DEVICE Barrier* terms_emptied() const { return filled(2 * T::kStages + 1); }
  QK_DEVICE Barrier* parts_filled() const { return filled(2 * T::kStages + 2); }
  QK_DEVICE OutputTerms* outputs() const {
    return reinterpret_cast<OutputTerms*>(at + kOutputTerms);
  }
  // Of each token its scale, then of each its zero point, then the sum of its codes.
  QK_DEVICE float* scales() const { return reinterpret_cast<float*>(at + kTokenTerms); }
  QK_DEVICE float* zeros() const { return scales() + T::kTokens; }
  QK_DEVICE int32_t* code_sums() const { return reinterpret_cast<int32_t*>(zeros() + T::kTokens); }
  QK_DEVICE uint8_t* results(int warpgroup) const {
    return at + kResults + warpgroup * kResultBytes;
  }
};

template <class T>
using WarpgroupSums = int32_t[T::kTokens / 2];

// ---- Results ------------------------------------------------------------------------------------

// What a warpgroup stores: outputs from `feature` on, and of the tokens from `token` on those
// between `begin` and `end`.
struct Stored {
  int64_t feature, token;
  int begin, end;

  QK_DEVICE bool meets(int first, int count) const { return first < end && first + count > begin; }
};

// Results of 16 bits, behind them nothing or ReLU. They are made where the sums are; matrices of 8
// x 8 turn on their way to shared memory, from which a thread takes eight outputs of a token. Those
// 16 bytes c of token r lie at 128 r + 16 (c ^ r % 8). `kPlain`: no code has a zero point.
template <class T, bool kPlain>
QK_DEVICE void store_pairs(const LinearArgs& a, const WarpgroupSums<T>& sums,
                           const SharedMemory<T>& shared, const Stored& stored) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const bool zeros = !kPlain && a.activation == Activation::int8_asymmetric;
  uint8_t* const piece = shared.results(warpgroup);
  OutputTerms outputs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    outputs[i] = shared.outputs()[warpgroup * 64 + warp * 16 + lane / 4 + i * 8];
  }
  // Of matrices whose addresses this lane gives.
  const int row = lane / 16 * 8 + lane % 8, column = warp * 2 + lane / 8 % 2;
  uint8_t* const matrix = piece + row * 128 + (column ^ row % 8) * 16;
#pragma unroll
  for (int first = 0; first < T::kTokens; first += kRoundTokens) {
    if (!stored.meets(first, kRoundTokens)) continue;
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int sixteen = 0; sixteen < kRoundTokens; sixteen += 16) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int eight = first + sixteen + i / 4 * 8, e = i % 4;
        const int token = eight + lane % 4 * 2 + e % 2;
        const OutputTerms& o = outputs[e / 2];
        TokenCodes codes{shared.scales()[token], 0.0f, 0};
        if (!kPlain) codes.zero = shared.zeros()[token], codes.sum = shared.code_sums()[token];
        const int32_t sum = sums[eight / 2 + e];
        const float value =
            kPlain ? static_cast<float>(sum) : group_value<Format::int8>(sum, codes.sum, o.zero);
        y[i] = result(scaled_sum(value, o.scale), codes, zeros, o.weight_sum, o.bias);
      }
      if (a.epilogue == Epilogue::relu) apply_epilogue(y, Epilogue::relu);
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = a.y_type == DType::bf16 ? pack_bf16(y[2 * i], y[2 * i + 1])
                                           : pack_f16(y[2 * i], y[2 * i + 1]);
      }
      stmatrix_x4_trans(matrix + sixteen * 128, pairs);
    }
    sync_some(1 + warpgroup, kWarpgroup);
    // Eight outputs of so many tokens.
    constexpr int kRows = kRoundTokens / (kWarpgroup / 8);
    const uint8_t* const eight = piece + thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16;
    const int64_t feature = stored.feature + thread % 8 * 8;
    const int at = first + thread / 8;
    uint16_t* const to = static_cast<uint16_t*>(a.y) + (stored.token + at) * a.n + feature;
    if (a.n % 8 == 0) {
      uint4 v[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) v[i] = load_shared_128(eight + i * (kWarpgroup / 8) * 128);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = at + i * (kWarpgroup / 8);
        if (row < stored.begin || row >= stored.end || feature >= a.n) continue;
        store_128(to + i * (kWarpgroup / 8) * a.n, v[i]);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        const int row = at + i * (kWarpgroup / 8);
        if (row < stored.begin || row >= stored.end) continue;
        const uint16_t* const values =
            reinterpret_cast<const uint16_t*>(eight + i * (kWarpgroup / 8) * 128);
        const int count = static_cast<int>(min(a.n - feature, int64_t{8}));
#pragma unroll 1
        for (int j = 0; j < count; ++j) to[i * (kWarpgroup / 8) * a.n + j] = values[j];
      }
    }
  }
}

// Any results: the sums themselves go to shared memory, and a thread finishes four consecutive
// outputs of a token, the same ones each time.
template <class T>
QK_DEVICE void store_words(const LinearArgs& a, const WarpgroupSums<T>& sums,
                           const SharedMemory<T>& shared, const Stored& stored) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  uint32_t* const piece = reinterpret_cast<uint32_t*>(shared.results(warpgroup));
  RowOutputs<Format::int8, 4> outputs;
  outputs.all.feature = stored.feature + thread % 16 * 4;
  outputs.all.count = static_cast<int>(max(int64_t{0}, min(a.n - outputs.all.feature, int64_t{4})));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const OutputTerms o = shared.outputs()[warpgroup * 64 + thread % 16 * 4 + i];
    outputs.scale[i] = o.scale, outputs.zero[i] = o.zero;
    outputs.all.weight_sum[i] = o.weight_sum, outputs.all.bias[i] = o.bias;
  }
#pragma unroll 1
  for (int first = 0; first < T::kTokens; first += kWordColumns) {
    if (!stored.meets(first, kWordColumns)) continue;
    sync_some(1 + warpgroup, kWarpgroup);
    // Registers have no index: each round has its own stores.
#pragma unroll
    for (int r = 0; r < T::kTokens; r += kWordColumns) {
      if (r != first) continue;
      put_words(piece, sums, r / 2, thread);
    }
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int at = thread / 16; at < kWordColumns; at += kWarpgroup / 16) {
      const int token = first + at;
      if (token < stored.begin || token >= stored.end) continue;
      const uint4 v = load_shared_128(piece + at * kWordPitch + thread % 16 * 4);
      const uint32_t exact[4] = {v.x, v.y, v.z, v.w};
      const TokenCodes codes{shared.scales()[token], shared.zeros()[token],
                             shared.code_sums()[token]};
      finish_exact<Format::int8, 4>(a, stored.token + token, codes, outputs, exact);
    }
  }
}

}  // namespace
}  // namespace qkernels::cuda
