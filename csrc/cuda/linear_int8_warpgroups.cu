// linear with int8 activations and int_mm on sm_90a, where weights have one group a row: products
// of warpgroups, weights from registers, tokens from shared memory.
//
// A block takes tiles of 128 outputs, one after the other. Of its three warpgroups two multiply 64
// outputs each, and a thread of the third keeps copies under way. Two blocks of a cluster work on
// the same tokens and copy half of them each, to both: tokens cross the L2 cache once for 256
// outputs.
//
// Shared memory: stages of [tokens | weights], the tokens as `matrix_in_shared` wants them, the
// weights as they are packed; then barriers, what the results need of each token, and for each
// warpgroup sums on their way to other threads.
#include "cuda/int8.cuh"
#include "cuda/linear_int8.cuh"
#include "cuda/ptx_sm90.cuh"

namespace qkernels::cuda {
namespace {

using T = WarpgroupTile;

constexpr int kConsumers = 2;  // warpgroups
// Results leave so many tokens at a time, whose words are kRoundPitch apart: the four tokens that a
// warp writes at once, eight words each, lie in different banks.
constexpr int kRoundTokens = 32, kRoundPitch = 64 + 4;

struct SharedMemory {
  static constexpr int kStage = T::kTokenBytes + T::kWeightBytes;
  static constexpr int kBarriers = T::kStages * kStage;
  static constexpr int kTokenCodes = kBarriers + 2 * 8 * T::kStages;
  static constexpr int kOutputs = kTokenCodes + T::kTokens * static_cast<int>(sizeof(TokenCodes));
  static constexpr int kOutputBytes = kRoundTokens * kRoundPitch * 4;
  static_assert(kOutputs % 16 == 0);
  static constexpr int kBytes = kOutputs + kConsumers * kOutputBytes;

  uint8_t* at;
  QK_DEVICE uint8_t* tokens(int stage) const { return at + stage * kStage; }
  QK_DEVICE uint8_t* weights(int stage) const { return tokens(stage) + T::kTokenBytes; }
  QK_DEVICE Barrier* filled(int stage) const {
    return reinterpret_cast<Barrier*>(at + kBarriers) + stage;
  }
  QK_DEVICE Barrier* emptied(int stage) const { return filled(T::kStages + stage); }
  QK_DEVICE TokenCodes* token_codes() const {
    return reinterpret_cast<TokenCodes*>(at + kTokenCodes);
  }
  QK_DEVICE uint32_t* outputs(int warpgroup) const {
    return reinterpret_cast<uint32_t*>(at + kOutputs + warpgroup * kOutputBytes);
  }
};

// One stage after the other, over all tiles of a block. A barrier's phase has the parity of
// `round`.
struct Turn {
  int stage = 0;
  uint32_t round = 0;

  QK_DEVICE void next() {
    if (++stage == T::kStages) stage = 0, round ^= 1;
  }
};

struct Tiles {
  uint32_t features, tokens;  // pairs of tiles side by side, tiles of tokens
  int stages;                 // of a tile
};

// Calls body(first packed row of the block, first token) for each of its tiles. The blocks that run
// at the same time take 16 tiles of tokens and then the next features, so that they share both
// operands in the L2 cache.
template <class Body>
QK_DEVICE void each_tile(const Tiles& tiles, int rank, const Body& body) {
  constexpr uint32_t kBand = 16;
  const uint32_t per_band = kBand * tiles.features;
  for (uint32_t tile = blockIdx.x / T::kTogether; tile < tiles.features * tiles.tokens;
       tile += gridDim.x / T::kTogether) {
    const uint32_t band = tile / per_band, first = band * kBand;
    const uint32_t width = min(tiles.tokens - first, kBand), left = tile - band * per_band;
    const int64_t pair = left / width;
    body((pair * T::kTogether + rank) * (T::kBlockFeatures / kLanes),
         int64_t{first + left % width} * T::kTokens);
  }
}

// ---- Copies -------------------------------------------------------------------------------------

QK_DEVICE void copy_tiles(const LinearArgs& a, const Tiles& tiles, const SharedMemory& shared,
                          int rank) {
  constexpr int kShare = T::kTokenBytes / T::kTogether;  // of the tokens, for both blocks
  static_assert(kShare <= kPieceBytes);
  const int64_t blocks = (a.n + kLanes - 1) / kLanes, row_codes = a.shape.k_padded * kLanes;
  Turn turn;
  each_tile(tiles, rank, [&](int64_t row, int64_t token) {
    const int rows =
        static_cast<int>(max(int64_t{0}, min(blocks - row, int64_t{T::kBlockFeatures / kLanes})));
    const uint8_t* weights = a.packed + row * a.shape.bytes;
    const int64_t mine = token + rank * (T::kTokens / T::kTogether);
    const uint8_t* tokens =
        a.panel + mine / kPanelRows * tiled_pitch(a.shape) + mine % kPanelRows * kPieceK;
    for (int stage = 0; stage < tiles.stages; ++stage, turn.next()) {
      barrier_wait(shared.emptied(turn.stage), turn.round ^ 1);
      Barrier* const filled = shared.filled(turn.stage);
      const int64_t begin = int64_t{stage} * kRowPieceBytes;
      const int bytes = static_cast<int>(min(row_codes - begin, int64_t{kRowPieceBytes}));
      barrier_expect(filled, T::kTokenBytes + rows * bytes);
      copy_bulk(shared.tokens(turn.stage) + rank * kShare, tokens + int64_t{stage} * kPieceBytes,
                kShare, filled, (1u << T::kTogether) - 1);
      for (int i = 0; i < rows; ++i) {
        copy_bulk(shared.weights(turn.stage) + i * kRowPieceBytes,
                  weights + i * a.shape.bytes + begin, bytes, filled);
      }
    }
  });
}

// ---- Products -----------------------------------------------------------------------------------

using WarpgroupSums = int32_t[T::kTokens / 2];

// The sums of a tile; of outputs beyond the weight's last ones they are anything.
QK_DEVICE void multiply_tile(WarpgroupSums& sums, const Tiles& tiles, const SharedMemory& shared,
                             Turn& turn) {
  const int lane = threadIdx.x % kWarp;
  const int offset = threadIdx.x / kWarp * kRowPieceBytes + lane * 16;
  uint32_t a[2][kPieceK / kCudaChunk][4];  // of this stage and of the one before, still in use
  int before = 0;
  const auto release = [&](int stage) {
    if (lane < T::kTogether) barrier_arrive(shared.emptied(stage), lane);
  };
  const auto multiply = [&](uint32_t (&mine)[kPieceK / kCudaChunk][4],
                            uint32_t (&others)[kPieceK / kCudaChunk][4], bool first) {
    barrier_wait(shared.filled(turn.stage), turn.round);
    const uint8_t* weights = shared.weights(turn.stage) + offset;
#pragma unroll
    for (int chunk = 0; chunk < kPieceK / kCudaChunk; ++chunk) {
      const uint4 v = load_shared_128(weights + chunk * kCudaUnit);
      mine[chunk][0] = v.x, mine[chunk][1] = v.z, mine[chunk][2] = v.y, mine[chunk][3] = v.w;
    }
    const uint64_t tokens = matrix_in_shared(shared.tokens(turn.stage));
    warpgroup_fence();
#pragma unroll
    for (int chunk = 0; chunk < kPieceK / kCudaChunk; ++chunk) {
      warpgroup_mma<T::kTokens>(sums, mine[chunk], tokens + chunk * (kCudaChunk / 16),
                                !first || chunk > 0);
    }
    warpgroup_commit();
    warpgroup_wait<1>();
#pragma unroll
    for (int chunk = 0; chunk < kPieceK / kCudaChunk; ++chunk) warpgroup_keep(others[chunk]);
    if (!first) release(before);
    before = turn.stage;
    turn.next();
  };
  warpgroup_keep(sums);
  multiply(a[0], a[1], true);
  int stage = 1;
#pragma unroll 1
  for (; stage + 1 < tiles.stages; stage += 2) {
    multiply(a[1], a[0], false);
    multiply(a[0], a[1], false);
  }
  if (stage < tiles.stages) multiply(a[1], a[0], false);
  warpgroup_wait<0>();
  warpgroup_keep(sums);
  release(before);
}

// ---- Results ------------------------------------------------------------------------------------

// Hands the sums to the warpgroup by way of shared memory, kRoundTokens at a time, so that a thread
// finishes four consecutive outputs of a token, the same ones each time.
QK_DEVICE void store_tile(const LinearArgs& a, const WarpgroupSums& sums,
                          const SharedMemory& shared, const RowOutputs<4>& outputs, int64_t token) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  uint32_t* const piece = shared.outputs(warpgroup);
#pragma unroll 1
  for (int round = 0; round < T::kTokens / kRoundTokens; ++round) {
    const int first = round * kRoundTokens;
    if (token + first >= a.rows) break;
    // Registers have no index: each round has its own stores.
#pragma unroll
    for (int r = 0; r < T::kTokens / kRoundTokens; ++r) {
      if (r != round) continue;
#pragma unroll
      for (int j = 0; j < kRoundTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = j * 8 + 2 * t + e % 2, feature = warp * 16 + g + e / 2 * 8;
          piece[at * kRoundPitch + feature] =
              static_cast<uint32_t>(sums[(r * kRoundTokens / 8 + j) * 4 + e]);
        }
      }
    }
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int at = thread / 16; at < kRoundTokens; at += kWarpgroup / 16) {
      if (token + first + at >= a.rows) break;
      const uint4 v = load_shared_128(piece + at * kRoundPitch + thread % 16 * 4);
      const uint32_t exact[4] = {v.x, v.y, v.z, v.w};
      finish_exact<Format::int8, 4>(a, token + first + at, shared.token_codes()[first + at],
                                    outputs, exact);
    }
    sync_some(1 + warpgroup, kWarpgroup);
  }
}

QK_DEVICE void multiply_tiles(const LinearArgs& a, const Tiles& tiles, const SharedMemory& shared,
                              int rank) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  Turn turn;
  each_tile(tiles, rank, [&](int64_t row, int64_t token) {
    // What the results need is asked for before the products.
    const RowOutputs<4> outputs =
        load_row_outputs<Format::int8, 4>(a, row * kLanes + warpgroup * 64 + thread % 16 * 4);
    for (int i = threadIdx.x; i < T::kTokens; i += kConsumers * kWarpgroup) {
      shared.token_codes()[i] = load_token(a, min(token + i, a.rows - 1), !a.layout.symmetric);
    }
    WarpgroupSums sums;
    multiply_tile(sums, tiles, shared, turn);
    sync_some(kConsumers + 1, kConsumers * kWarpgroup);
    store_tile(a, sums, shared, outputs, token);
    sync_some(kConsumers + 1, kConsumers * kWarpgroup);  // before the next tile's token codes
  });
}

__global__ void __launch_bounds__(T::kThreads, 1)
    warpgroups_kernel(const LinearArgs a, const Tiles tiles) {
  if constexpr (QK_SM90A) {
    const SharedMemory shared{shared_memory<uint8_t>()};
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
      for (int i = 0; i < T::kStages; ++i) {
        barrier_init(shared.filled(i), 1);
        barrier_init(shared.emptied(i), kConsumers * (kWarpgroup / kWarp) * T::kTogether);
      }
      barrier_init_fence();
    }
    cluster_sync();
    if (threadIdx.x < kConsumers * kWarpgroup) {
      take_registers<232>();
      multiply_tiles(a, tiles, shared, rank);
    } else {
      give_registers<40>();
      if (threadIdx.x == kConsumers * kWarpgroup) copy_tiles(a, tiles, shared, rank);
      __syncwarp();
    }
    // A block must not end while the other one copies to it or arrives at its barriers.
    cluster_sync();
  }
}

}  // namespace

void linear_int8_warpgroups(const LinearArgs& a, Stream stream) {
  const Tiles tiles{blocks_for(a.n, T::kFeatures), blocks_for(a.rows, T::kTokens),
                    static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK)};
  const unsigned clusters =
      min(tiles.features * tiles.tokens, static_cast<unsigned>(multiprocessors() / T::kTogether));
  launch_clusters(warpgroups_kernel, max(clusters, 1u) * T::kTogether, T::kTogether, T::kThreads,
                  SharedMemory::kBytes, stream, a, tiles);
}

}  // namespace qkernels::cuda
