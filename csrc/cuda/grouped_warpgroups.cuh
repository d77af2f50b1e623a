// What linear_int8_grouped_warpgroups.cu has in shared memory, and the copies that bring it there.
//
// Shared memory:
//   stages of [tokens | weights], the tokens as `matrix_in_shared` wants them, the weights as they
//     are packed
//   two pages, of kPageGroups groups each: [scales | zero points | sums of the tokens' codes]
//   facts: what the results need of each token and output
//   for each warpgroup sums on their way to other threads
//   barriers
#pragma once

#include "cuda/int8.cuh"
#include "cuda/linear_int8.cuh"
#include "cuda/warpgroups.cuh"

namespace qkernels::cuda {

inline constexpr int kPageGroups = 8, kPages = 2;
// Of the last warpgroup, for stages: one warp alone takes 600 cycles for the copies of a stage.
inline constexpr int kCopyingWarps = 3;

struct OutputFacts {
  float weight_sum, bias;
};

// kRun_: chunks that are multiplied before somebody asks whether a group ends. Groups are multiples
// of it. kWhole_: each is as long, and a tile's sums are multiplied in one piece, not two.
template <class T_, Format kFormat_, bool kZeros_, int kRun_, bool kWhole_>
struct Kernel {
  using T = T_;
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kRun = kRun_;
  static constexpr int kRuns = kPieceK / kCudaChunk / kRun;  // of a stage
  static constexpr bool kWhole = kWhole_;
  static constexpr int kPieces = kWhole ? 1 : 2, kTokens = T::kTokens / kPieces;
  static constexpr int kRows = T::kBlockFeatures / kLanes;  // packed ones
  static constexpr int kRowBytes = kRowPieceBytes * info(kFormat).bits / 8;
  static constexpr int kStageBytes = T::kTokenBytes + kRows * kRowBytes;
  static constexpr int kStages = 160 * 1024 / kStageBytes;
  // Of a page.
  static constexpr int kScaleBytes = kPageGroups * kLanes * 4;  // of a packed row
  static constexpr int kZeroBytes = kZeros ? kPageGroups * kLanes : 0;
  static constexpr int kSumBytes = kZeros ? T::kTokens * 4 : 0;  // of a group
  static constexpr int kPageBytes = kRows * (kScaleBytes + kZeroBytes) + kPageGroups * kSumBytes;
};

template <class K>
struct SharedMemory {
  using T = typename K::T;
  static constexpr int kPagesAt = K::kStages * K::kStageBytes;
  static constexpr int kTokenFacts = kPagesAt + kPages * K::kPageBytes;
  static constexpr int kOutputFacts =
      kTokenFacts + T::kTokens * static_cast<int>(sizeof(TokenCodes));
  static constexpr int kResults =
      kOutputFacts + T::kBlockFeatures * static_cast<int>(sizeof(OutputFacts));
  static constexpr int kResultBytes = kWordColumns * kWordPitch * 4;
  static constexpr int kBarriers = kResults + T::kConsumers * kResultBytes;
  static constexpr int kBytes = kBarriers + 8 * 2 * (K::kStages + kPages + 1);
  static_assert(kPagesAt % 16 == 0 && K::kPageBytes % 16 == 0 && kResults % 16 == 0);
  static_assert(kBytes <= 227 * 1024);

  uint8_t* at;
  QK_DEVICE uint8_t* tokens(int stage) const { return at + stage * K::kStageBytes; }
  QK_DEVICE uint8_t* weights(int stage) const { return tokens(stage) + T::kTokenBytes; }
  QK_DEVICE uint8_t* scales(int page) const { return at + kPagesAt + page * K::kPageBytes; }
  QK_DEVICE uint8_t* zeros(int page) const { return scales(page) + K::kRows * K::kScaleBytes; }
  QK_DEVICE uint8_t* code_sums(int page) const { return zeros(page) + K::kRows * K::kZeroBytes; }
  QK_DEVICE TokenCodes* token_facts() const {
    return reinterpret_cast<TokenCodes*>(at + kTokenFacts);
  }
  QK_DEVICE OutputFacts* output_facts() const {
    return reinterpret_cast<OutputFacts*>(at + kOutputFacts);
  }
  QK_DEVICE uint32_t* results(int warpgroup) const {
    return reinterpret_cast<uint32_t*>(at + kResults + warpgroup * kResultBytes);
  }
  // Of stages, then of pages, then of the facts.
  QK_DEVICE Barrier* filled(int i) const { return reinterpret_cast<Barrier*>(at + kBarriers) + i; }
  QK_DEVICE Barrier* emptied(int i) const { return filled(K::kStages + kPages + 1 + i); }
  static constexpr int kPage = K::kStages, kFacts = kPage + kPages;  // the first of them
};

struct Tiles {
  uint32_t features, tokens;  // clusters of tiles side by side, tiles of tokens
  int stages;                 // of a tile
};

template <class T, class Body>
QK_DEVICE void each_tile(const Tiles& tiles, int rank, const Body& body) {
  each_in_bands<T::kTogether, T::kBlockFeatures / kLanes, T::kTokens>(tiles.features, tiles.tokens,
                                                                      T::kTogether, rank, body);
}

// Packed rows of a block that exist.
template <class K>
QK_DEVICE int packed_rows(const LinearArgs& a, int64_t row) {
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  return static_cast<int>(max(int64_t{0}, min(blocks - row, int64_t{K::kRows})));
}

// ---- Copies -------------------------------------------------------------------------------------

// On by `count` stages, fewer than there are.
template <int kStages>
QK_DEVICE void skip(Turn& turn, int count) {
  turn.stage += count;
  if (turn.stage >= kStages) turn.stage -= kStages, turn.parity ^= 1;
}

// By kCopyingWarps warps, a stage each in turn. All lanes go along, so that the compiler sees that
// addresses are a warp's and not a lane's: those it would hand to each copy one lane after the
// other.
template <class K>
QK_DEVICE void copy_stages(const LinearArgs& a, const Tiles& tiles, const SharedMemory<K>& shared,
                           int rank, int warp) {
  using T = typename K::T;
  constexpr int kShare = T::kTokenBytes / T::kTogether;  // of the tokens, for all blocks
  static_assert(kPanelRows % (T::kTokens / T::kTogether) == 0);
  const int64_t row_codes = a.shape.k_padded * kLanes * info(K::kFormat).bits / 8;
  const bool first = threadIdx.x % kWarp == 0;
  Turn turn;
  skip<K::kStages>(turn, warp);
  int stage = warp;
  bool waited = false;
  each_tile<T>(tiles, rank, [&](int64_t row, int64_t token) {
    const int rows = packed_rows<K>(a, row);
    const uint8_t* const weights = a.packed + row * a.shape.bytes;
    if (!waited) {
      // While x is prepared, the first weights come to the L2 cache.
      const int lane = threadIdx.x % kWarp;
      const int64_t bytes = min(row_codes, int64_t{K::kStages * K::kRowBytes});
      if (warp == 0 && lane < rows && bytes > 0) {
        prefetch_bulk(weights + lane * a.shape.bytes, static_cast<int>(bytes));
      }
      wait_for_previous();
      waited = true;
    }
    const int64_t mine = token + rank * (T::kTokens / T::kTogether);
    const uint8_t* const tokens = tiled_rows(a, mine);
#pragma unroll 1
    for (; stage < tiles.stages; stage += kCopyingWarps, skip<K::kStages>(turn, kCopyingWarps)) {
      barrier_wait(shared.emptied(turn.stage), turn.parity ^ 1);
      Barrier* const filled = shared.filled(turn.stage);
      const int64_t begin = int64_t{stage} * K::kRowBytes;
      const int bytes = static_cast<int>(min(row_codes - begin, int64_t{K::kRowBytes}));
      if (!first) continue;
      barrier_expect(filled, T::kTokenBytes + rows * bytes);
      copy_bulk(shared.tokens(turn.stage) + rank * kShare, tokens + int64_t{stage} * kPieceBytes,
                kShare, filled, (1u << T::kTogether) - 1);
      uint8_t* const to = shared.weights(turn.stage);
      const uint8_t* from = weights + begin;
#pragma unroll
      for (int i = 0; i < K::kRows; ++i) {
        if (i < rows) copy_bulk(to + i * K::kRowBytes, from, bytes, filled);
        from += a.shape.bytes;
      }
    }
    stage -= tiles.stages;
  });
}

// Groups `first` to `first + count` of a tile, to a page. By a warp, each lane one of the copies.
template <class K>
QK_DEVICE void copy_page(const LinearArgs& a, const SharedMemory<K>& shared, int page, int64_t row,
                         int64_t token, int64_t first, int count) {
  static_assert(2 * K::kRows + kPageGroups <= kWarp);
  Barrier* const filled = shared.filled(shared.kPage + page);
  const int lane = threadIdx.x % kWarp, rows = packed_rows<K>(a, row);
  const int group_scales = kLanes * (a.layout.scale == DType::f32 ? 4 : 2);
  const int64_t pitch = code_sum_pitch(a.rows);
  const int sums = static_cast<int>(min(pitch - token, int64_t{K::T::kTokens})) * 4;
  if (lane == 0) {
    const int zero_bytes = K::kZeros ? rows * count * kLanes + count * sums : 0;
    barrier_expect(filled, rows * count * group_scales + zero_bytes);
  }
  __syncwarp();
  const int i = lane % K::kRows, group = lane - 2 * K::kRows;
  const uint8_t* from = a.packed + (row + i) * a.shape.bytes;
  uint8_t* to = nullptr;
  int bytes = 0;
  if (lane < K::kRows) {
    to = shared.scales(page) + i * K::kScaleBytes;
    from += a.shape.scales + first * group_scales;
    bytes = i < rows ? count * group_scales : 0;
  } else if (K::kZeros && lane < 2 * K::kRows) {
    to = shared.zeros(page) + i * K::kZeroBytes;
    from += a.shape.zeros + first * kLanes;
    bytes = i < rows ? count * kLanes : 0;
  } else if (K::kZeros && group < count) {
    to = shared.code_sums(page) + group * K::kSumBytes;
    from = reinterpret_cast<const uint8_t*>(a.group_sums + (first + group) * pitch + token);
    bytes = sums;
  }
  if (bytes > 0) copy_bulk(to, from, bytes, filled);
}

// By a warp.
template <class K>
QK_DEVICE void copy_ends(const LinearArgs& a, const Tiles& tiles, const SharedMemory<K>& shared,
                         int rank) {
  using T = typename K::T;
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = tiles.stages == 0 ? 0 : a.shape.groups;
  Turn page, tile;
  wait_for_previous();
  each_tile<T>(tiles, rank, [&](int64_t row, int64_t token) {
    for (int64_t first = 0; first < groups; first += kPageGroups, page.next(kPages)) {
      barrier_wait(shared.emptied(shared.kPage + page.stage), page.parity ^ 1);
      const int64_t count = min(groups - first, int64_t{kPageGroups});
      copy_page<K>(a, shared, page.stage, row, token, first, static_cast<int>(count));
    }
    __syncwarp();
    barrier_wait(shared.emptied(shared.kFacts), tile.parity ^ 1);
    for (int i = lane; i < T::kTokens; i += kWarp) {
      shared.token_facts()[i] = load_token(a, min(token + i, a.rows - 1), false);
    }
    for (int i = lane; i < T::kBlockFeatures; i += kWarp) {
      const Outputs<1> o = load_outputs<1>(a, row * kLanes + i);
      shared.output_facts()[i] = {o.weight_sum[0], o.bias[0]};
    }
    barrier_arrive(shared.filled(shared.kFacts));
    tile.next(1);
  });
}

}  // namespace qkernels::cuda
