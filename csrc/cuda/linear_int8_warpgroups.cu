// linear with int8 activations and int_mm on sm_90a, where weights have one group a row: products
// of warpgroups, weights from registers, tokens from shared memory.
//
// A block takes tiles of 128 outputs, one after the other. Of its three warpgroups two multiply 64
// outputs each. Of the third a warp keeps copies under way, and the others fetch what the results
// of a tile need while it is multiplied.
//
// A cluster has two blocks that work on the same tokens and copy half of them each, to both: tokens
// cross the L2 cache once for 256 outputs. Where tiles are too few for a device, both work on the
// same tile, with a part of k each. They give their sums, which are exact, to each other, and each
// finishes half of the tokens.
#include "cuda/linear_int8_warpgroups.cuh"

#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

struct Tiles {
  uint32_t features, tokens;  // tiles of a cluster, in both directions
  int stages;                 // of a tile
  int sides;                  // tiles side by side in a cluster, which share their tokens
  int parts;                  // of a tile's stages; then a cluster takes one tile
  int share;                  // of the tokens, for each part to finish
};

// A block of a cluster.
struct Place {
  int sides, side, part;
  int begin, end;  // stages
};

QK_DEVICE Place place_in(const Tiles& tiles) {
  const int rank = cluster_rank(), part = rank / tiles.sides;
  return {tiles.sides, rank % tiles.sides, part, tiles.stages * part / tiles.parts,
          tiles.stages * (part + 1) / tiles.parts};
}

template <class T, class Body>
QK_DEVICE void each_tile(const Tiles& tiles, const Place& place, const Body& body) {
  each_in_bands<kTogether, kFeatures / kLanes, T::kTokens>(tiles.features, tiles.tokens,
                                                           tiles.sides, place.side, body);
}

// ---- The third warpgroup ------------------------------------------------------------------------

// By a warp. A lane copies 16 outputs, or the tokens: half of them to both blocks of a cluster
// where they share them.
template <class T>
QK_DEVICE void copy_tiles(const LinearArgs& a, const Tiles& tiles, const SharedMemory<T>& shared,
                          const Place& place) {
  constexpr int kHalf = T::kTokenBytes / kTogether, kTokenLane = kFeatures / kLanes;
  static_assert(kHalf <= kPieceBytes);
  const int lane = threadIdx.x % kWarp;
  const int64_t blocks = (a.n + kLanes - 1) / kLanes, row_codes = a.shape.k_padded * kLanes;
  Turn turn;
  bool waited = false;
  each_tile<T>(tiles, place, [&](int64_t row, int64_t token) {
    const int rows = static_cast<int>(max(int64_t{0}, min(blocks - row, int64_t{kTokenLane})));
    const uint8_t* weights = a.packed + (row + lane) * a.shape.bytes;
    if (!waited) {
      // While x is prepared, weights come to the L2 cache.
      const int64_t begin = int64_t{place.begin} * kRowPieceBytes;
      const int64_t end = min(row_codes, begin + kPrefetchBytes);
      if (lane < rows && begin < end) prefetch_bulk(weights + begin, static_cast<int>(end - begin));
      wait_for_previous();
      waited = true;
    }
    const int64_t mine = token + place.side * (T::kTokens / kTogether);  // side 0 where not shared
    const uint8_t* const tokens = tiled_rows(a, mine);
#pragma unroll 1
    for (int stage = place.begin; stage < place.end; ++stage, turn.next(T::kStages)) {
      barrier_wait(shared.emptied(turn.stage), turn.parity ^ 1);
      Barrier* const filled = shared.filled(turn.stage);
      const int64_t begin = int64_t{stage} * kRowPieceBytes;
      const int bytes = static_cast<int>(min(row_codes - begin, int64_t{kRowPieceBytes}));
      if (lane == 0) barrier_expect(filled, T::kTokenBytes + rows * bytes);
      __syncwarp();
      if (lane == kTokenLane) {
        const uint8_t* const from = tokens + int64_t{stage} * kPieceBytes;
        if (tiles.sides == kTogether) {
          copy_bulk(shared.tokens(turn.stage) + place.side * kHalf, from, kHalf, filled,
                    (1u << kTogether) - 1);
        } else {
          copy_bulk(shared.tokens(turn.stage), from, T::kTokenBytes, filled);
        }
      }
      if (lane < rows) {
        copy_bulk(shared.weights(turn.stage) + lane * kRowPieceBytes, weights + begin, bytes,
                  filled);
      }
    }
  });
}

// By the other warps.
template <class T>
QK_DEVICE void fetch_terms(const LinearArgs& a, const Tiles& tiles, const SharedMemory<T>& shared,
                           const Place& place) {
  const int thread = threadIdx.x - (kThreads - kFetching);
  uint32_t round = 0;
  wait_for_previous();
  each_tile<T>(tiles, place, [&](int64_t row, int64_t token) {
    barrier_wait(shared.terms_emptied(), round ^ 1);
#pragma unroll 1
    for (int i = thread; i < T::kTokens; i += kFetching) {
      const TokenCodes codes = load_token(a, min(token + i, a.rows - 1), !a.layout.symmetric);
      shared.scales()[i] = codes.scale;
      shared.zeros()[i] = codes.zero;
      shared.code_sums()[i] = codes.sum;
    }
#pragma unroll 1
    for (int i = thread; i < kFeatures; i += kFetching) {
      const RowOutputs<Format::int8, 1> o = load_row_outputs<Format::int8, 1>(a, row * kLanes + i);
      shared.outputs()[i] = {o.scale[0], o.all.weight_sum[0], o.all.bias[0], o.zero[0]};
    }
    barrier_arrive(shared.terms_filled());
    round ^= 1;
  });
}

// ---- Products -----------------------------------------------------------------------------------

// The sums of a tile; of outputs beyond the weight's last ones they are anything.
template <class T>
QK_DEVICE void multiply_tile(WarpgroupSums<T>& sums, const SharedMemory<T>& shared,
                             const Place& place, Turn& turn) {
  const int lane = threadIdx.x % kWarp;
  const int offset = threadIdx.x / kWarp * kRowPieceBytes + lane * 16;
  uint32_t a[2][kPieceK / kCudaChunk][4];  // of this stage and of the one before, still in use
  int before = 0;
  const auto release = [&](int stage) {
    __syncwarp();  // all lanes have read their weights
    if (lane < place.sides) barrier_arrive(shared.emptied(stage), place.part + lane);
  };
  const auto multiply = [&](uint32_t (&mine)[kPieceK / kCudaChunk][4],
                            uint32_t (&others)[kPieceK / kCudaChunk][4], bool first) {
    barrier_wait(shared.filled(turn.stage), turn.parity);
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
    turn.next(T::kStages);
  };
  const int stages = place.end - place.begin;
  warpgroup_keep(sums);
  multiply(a[0], a[1], true);
  int stage = 1;
#pragma unroll 1
  for (; stage + 1 < stages; stage += 2) {
    multiply(a[1], a[0], false);
    multiply(a[0], a[1], false);
  }
  if (stage < stages) multiply(a[1], a[0], false);
  warpgroup_wait<0>();
  warpgroup_keep(sums);
  release(before);
}

// The sums over both parts, of the block's half of the tokens: the thread in the same place of the
// other block has the other part. Stages are free then, since a cluster has one tile.
template <class T>
QK_DEVICE void add_parts(WarpgroupSums<T>& sums, const SharedMemory<T>& shared,
                         const Place& place) {
  constexpr int kEights = T::kTokens / 8 / kTogether;
  uint8_t* const mine = shared.at + threadIdx.x * 16;
  const auto at = [&](int eight) { return mine + eight * kMultiplying * 16; };
#pragma unroll
  for (int half = 0; half < kTogether; ++half) {
    if (half == place.part) continue;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = static_cast<uint32_t>(sums[(half * kEights + i) * 4 + e]);
      }
      store_async_128(at(i), make_uint4(v[0], v[1], v[2], v[3]), shared.parts_filled(), half);
    }
  }
  barrier_wait(shared.parts_filled(), 0);
#pragma unroll
  for (int half = 0; half < kTogether; ++half) {
    if (half != place.part) continue;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const uint4 v = load_shared_128(at(i));
      const uint32_t others[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[(half * kEights + i) * 4 + e] += static_cast<int32_t>(others[e]);
      }
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class T>
QK_DEVICE void multiply_tiles(const LinearArgs& a, const Tiles& tiles,
                              const SharedMemory<T>& shared, const Place& place) {
  const int warpgroup = threadIdx.x / kWarpgroup;
  const bool pairs = (a.y_type == DType::bf16 || a.y_type == DType::f16) &&
                     (a.epilogue == Epilogue::none || a.epilogue == Epilogue::relu);
  const bool plain = a.layout.symmetric && a.activation == Activation::int8_symmetric;
  Turn turn;
  uint32_t round = 0;
  each_tile<T>(tiles, place, [&](int64_t row, int64_t token) {
    WarpgroupSums<T> sums;
    multiply_tile<T>(sums, shared, place, turn);
    if (tiles.parts > 1) {
      cluster_sync();
      add_parts<T>(sums, shared, place);
    }
    const int rows = static_cast<int>(min(a.rows - token, int64_t{T::kTokens}));
    const int begin = place.part * tiles.share;
    const Stored stored{row * kLanes + warpgroup * 64, token, begin,
                        min(begin + tiles.share, rows)};
    barrier_wait(shared.terms_filled(), round);
    if (!pairs) {
      store_words<T>(a, sums, shared, stored);
    } else if (plain) {
      store_pairs<T, true>(a, sums, shared, stored);
    } else {
      store_pairs<T, false>(a, sums, shared, stored);
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared.terms_emptied());
    round ^= 1;
  });
}

constexpr int kMostRegisters = 224, kLeastRegisters = 56;
static_assert(registers_suffice(kThreads, kMultiplying, kMostRegisters, kLeastRegisters));

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroups_kernel(const LinearArgs a, const Tiles tiles) {
  if constexpr (QK_SM90A) {
    const SharedMemory<T> shared{shared_memory<uint8_t>()};
    const Place place = place_in(tiles);
    if (threadIdx.x == 0) {
      for (int i = 0; i < T::kStages; ++i) {
        barrier_init(shared.filled(i), 1);
        barrier_init(shared.emptied(i), kMultiplying / kWarp * tiles.sides);
      }
      barrier_init(shared.terms_filled(), kFetching);
      barrier_init(shared.terms_emptied(), kMultiplying / kWarp);
      barrier_init(shared.parts_filled(), 1);
      barrier_init_fence();
      barrier_expect(shared.parts_filled(), (tiles.parts - 1) * tiles.share * kFeatures * 4);
    }
    cluster_sync();
    if (threadIdx.x < kMultiplying) {
      take_registers<kMostRegisters>();
      multiply_tiles<T>(a, tiles, shared, place);
    } else {
      give_registers<kLeastRegisters>();
      threadIdx.x < kMultiplying + kWarp ? copy_tiles<T>(a, tiles, shared, place)
                                         : fetch_terms<T>(a, tiles, shared, place);
      __syncwarp();
      if (tiles.parts > 1) cluster_sync();
    }
    // A block must not end while another one copies to it or arrives at its barriers.
    cluster_sync();
  }
}

template <class T>
void launch_tile(const LinearArgs& a, int parts, Stream stream) {
  const int sides = kTogether / parts;
  const Tiles tiles{blocks_for(a.n, sides * kFeatures),
                    blocks_for(a.rows, T::kTokens),
                    static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK),
                    sides,
                    parts,
                    T::kTokens / parts};
  const unsigned all = tiles.features * tiles.tokens;
  const unsigned at_once = static_cast<unsigned>(clusters_at_once(multiprocessors()));
  launch_with({.cluster = kTogether, .overlaps = true}, warpgroups_kernel<T>,
              (parts > 1 ? all : min(all, at_once)) * kTogether, kThreads, SharedMemory<T>::kBytes,
              stream, a, tiles);
}

}  // namespace

void linear_int8_warpgroups(const LinearArgs& a, const Int8Plan& plan, Stream stream) {
  switch (plan.tokens) {
    case WarpgroupTiles::Small::kTokens:
      return launch_tile<WarpgroupTiles::Small>(a, plan.parts, stream);
    case WarpgroupTiles::Medium::kTokens:
      return launch_tile<WarpgroupTiles::Medium>(a, plan.parts, stream);
    default:
      return launch_tile<WarpgroupTiles::Large>(a, plan.parts, stream);
  }
}

}  // namespace qkernels::cuda
