// linear with int8 activations on sm_90a, for weights in groups and for all of int4: products of
// warpgroups, weights from registers, tokens from shared memory.
//
// A block takes tiles, one after the other. A warpgroup multiplies 64 outputs with the tile's
// tokens; while floats take up the exact sums of a group, the tensor cores work on the next one, or
// where registers have no room for both, on the other half of the tokens. The last warpgroup keeps
// copies under way. Blocks of a cluster work on the same tokens and copy a part of them each, to
// all.
#include "cuda/grouped_products.cuh"
#include "cuda/grouped_warpgroups.cuh"

namespace qkernels::cuda {
namespace {

// ---- Results ------------------------------------------------------------------------------------

// Hands the sums to the warpgroup by way of shared memory, kWordColumns at a time, so that a thread
// finishes four consecutive outputs of a token, the same ones each time.
template <class K>
QK_DEVICE void store_tile(const LinearArgs& a, const float (&sums)[K::kPieces][K::kTokens / 2],
                          const SharedMemory<K>& shared, int64_t row, int64_t token) {
  using T = typename K::T;
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int first_output = warpgroup * 64 + thread % 16 * 4;
  Outputs<4> outputs{};
  outputs.feature = row * kLanes + first_output;
  outputs.count = static_cast<int>(max(int64_t{0}, min(a.n - outputs.feature, int64_t{4})));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const OutputFacts& facts = shared.output_facts()[first_output + i];
    outputs.weight_sum[i] = facts.weight_sum, outputs.bias[i] = facts.bias;
  }
  uint32_t* const piece = shared.results(warpgroup);
#pragma unroll 1
  for (int round = 0; round < T::kTokens / kWordColumns; ++round) {
    const int first = round * kWordColumns;
    if (token + first >= a.rows) break;
    // Registers have no index: each round has its own stores.
#pragma unroll
    for (int r = 0; r < T::kTokens; r += kWordColumns) {
      if (r / kWordColumns != round) continue;
      put_words(piece, sums[r / K::kTokens], r % K::kTokens / 2, thread);
    }
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int at = thread / 16; at < kWordColumns; at += kWarpgroup / 16) {
      if (token + first + at >= a.rows) break;
      const uint4 v = load_shared_128(piece + at * kWordPitch + thread % 16 * 4);
      const float four[4] = {bit_cast<float>(v.x), bit_cast<float>(v.y), bit_cast<float>(v.z),
                             bit_cast<float>(v.w)};
      finish<4>(a, token + first + at, shared.token_facts()[first + at], outputs, four);
    }
    sync_some(1 + warpgroup, kWarpgroup);
  }
}

template <class K>
QK_DEVICE void multiply_tiles(const LinearArgs& a, const Tiles& tiles,
                              const SharedMemory<K>& shared, int rank) {
  Turn turn, page, tile;
  each_tile<typename K::T>(tiles, rank, [&](int64_t row, int64_t token) {
    float sums[K::kPieces][K::kTokens / 2] = {};
    multiply_tile<K>(sums, a, tiles, shared, turn, page);
    barrier_wait(shared.filled(shared.kFacts), tile.parity);
    store_tile<K>(a, sums, shared, row, token);
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared.emptied(shared.kFacts));
    tile.next(1);
  });
}

// Of a thread of two warpgroups that multiply, and of the one that copies for them.
constexpr int kMostRegisters = 208, kLeastRegisters = 88;
static_assert(registers_suffice(3 * kWarpgroup, 2 * kWarpgroup, kMostRegisters, kLeastRegisters));

template <class K>
__global__ void __launch_bounds__(K::T::kThreads, 1)
    grouped_warpgroups_kernel(const LinearArgs a, const Tiles tiles) {
  if constexpr (QK_SM90A) {
    using T = typename K::T;
    constexpr int kConsumers = T::kConsumers * kWarpgroup;  // threads
    const SharedMemory<K> shared{shared_memory<uint8_t>()};
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
      for (int i = 0; i <= shared.kFacts; ++i) {
        const int blocks = i < shared.kPage ? T::kTogether : 1;
        barrier_init(shared.filled(i), i == shared.kFacts ? kWarp : 1);
        barrier_init(shared.emptied(i), kConsumers / kWarp * blocks);
      }
      barrier_init_fence();
    }
    cluster_sync();
    if (threadIdx.x < kConsumers) {
      if constexpr (T::kConsumers > 1) take_registers<kMostRegisters>();
      multiply_tiles<K>(a, tiles, shared, rank);
    } else {
      if constexpr (T::kConsumers > 1) give_registers<kLeastRegisters>();
      // By a shuffle, so that the compiler knows that a warp's lanes agree.
      const int warp = shuffle(static_cast<int>(threadIdx.x - kConsumers) / kWarp, 0);
      if (warp < kCopyingWarps) {
        copy_stages<K>(a, tiles, shared, rank, warp);
      } else {
        copy_ends<K>(a, tiles, shared, rank);
      }
      __syncwarp();
    }
    // A block must not end while another one copies to it or arrives at its barriers.
    cluster_sync();
  }
}

template <class T, Format kFormat, bool kZeros, int kRun, bool kWhole>
void launch_as(const LinearArgs& a, Stream stream) {
  using K = Kernel<T, kFormat, kZeros, kRun, kWhole>;
  const Tiles tiles{blocks_for(a.n, T::kFeatures), blocks_for(a.rows, T::kTokens),
                    static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK)};
  const unsigned clusters = min(tiles.features * tiles.tokens,
                                static_cast<unsigned>(max(multiprocessors() / T::kTogether, 1)));
  launch_with({.cluster = T::kTogether, .overlaps = true}, grouped_warpgroups_kernel<K>,
              clusters * T::kTogether, T::kThreads, SharedMemory<K>::kBytes, stream, a, tiles);
}

template <class T, Format kFormat, bool kZeros>
void launch_run(const LinearArgs& a, Stream stream) {
  const int64_t chunks = a.shape.group_padded / kCudaChunk;
  const bool many = a.shape.groups > 1;
  if (many && chunks == 4) return launch_as<T, kFormat, kZeros, 4, T::kTwice>(a, stream);
  if (many && chunks == 2) return launch_as<T, kFormat, kZeros, 2, T::kTwice>(a, stream);
  if (many && chunks == 1) return launch_as<T, kFormat, kZeros, 1, T::kTwice>(a, stream);
  if constexpr (!T::kGroupsAreRuns) {
    if (!many || chunks % 4 == 0) return launch_as<T, kFormat, kZeros, 4, false>(a, stream);
    launch_as<T, kFormat, kZeros, 1, false>(a, stream);
  }
}

template <class T>
void launch_tile(const LinearArgs& a, Stream stream) {
  const auto launch_zeros = [&](auto format) {
    constexpr Format kFormat = decltype(format)::value;
    a.layout.symmetric ? launch_run<T, kFormat, false>(a, stream)
                       : launch_run<T, kFormat, true>(a, stream);
  };
  if (a.layout.format == Format::int8) {
    launch_zeros(std::integral_constant<Format, Format::int8>{});
  } else {
    launch_zeros(std::integral_constant<Format, Format::int4>{});
  }
}

}  // namespace

void linear_int8_grouped_warpgroups(const LinearArgs& a, int tokens, Stream stream) {
  using Tiles = GroupedWarpgroupTiles;
  if (tokens == Tiles::Tiny::kTokens) return launch_tile<Tiles::Tiny>(a, stream);
  if (tokens == Tiles::Small::kTokens) return launch_tile<Tiles::Small>(a, stream);
  launch_tile<Tiles::Large>(a, stream);
}

}  // namespace qkernels::cuda
