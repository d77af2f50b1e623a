// linear with int8 activations on sm_90a, for weights in groups and for all of int4: products of
// warpgroups, weights from registers, tokens from shared memory.
//
// A block takes tiles, one after the other. A warpgroup multiplies 64 outputs with the tile's
// tokens, in two halves: while floats take up the exact sums of one half's group, the tensor cores
// work on the other half. The last warpgroup's first two warps keep copies under way. Blocks of a
// cluster work on the same tokens and copy a part of them each, to all.
#include "cuda/grouped_warpgroups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kUnroll = 4;  // runs after which the tensor cores have nothing left

// ---- Products -----------------------------------------------------------------------------------

// code - 8 of four nibbles, the low one of each byte, as int8. What is below 8 and what is not are
// taken apart, and 31 * 8 is 248, which is -8: no byte overflows.
QK_DEVICE uint32_t signed_nibbles(uint32_t w) {
  return (~w & 0x08080808u) * 31u + (w & 0x07070707u);
}

// The A operands of kRun chunks from `chunk` of a stage on, from what a warp has of the packed row.
template <class K>
QK_DEVICE void load_weights(uint32_t (&a)[K::kRun][4], const uint8_t* stage, int chunk) {
  const uint8_t* const at = stage + threadIdx.x % kWarp * 16;
  if constexpr (K::kFormat == Format::int8) {
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) {
      const uint4 v = load_shared_128(at + (chunk + i) * kCudaUnit);
      a[i][0] = v.x, a[i][1] = v.z, a[i][2] = v.y, a[i][3] = v.w;
    }
  } else {
    const auto widen = [](uint32_t (&to)[4], uint32_t low, uint32_t high) {
      to[0] = signed_nibbles(low), to[1] = signed_nibbles(high);
      to[2] = signed_nibbles(low >> 4), to[3] = signed_nibbles(high >> 4);
    };
    if constexpr (K::kRun == 1) {
      const uint2 v = load_shared_64(at + chunk / 2 * kCudaUnit + chunk % 2 * 8);
      widen(a[0], v.x, v.y);
    } else {
#pragma unroll
      for (int i = 0; i < K::kRun; i += 2) {
        const uint4 v = load_shared_128(at + (chunk + i) / 2 * kCudaUnit);
        widen(a[i], v.x, v.y), widen(a[i + 1], v.z, v.w);
      }
    }
  }
}

// What a thread needs at the end of a group: of outputs g and g + 8 of its packed row.
template <class K>
struct GroupEnd {
  float scales[2];
  int zeros[2];              // zero_factor
  const uint8_t* code_sums;  // of the tile's tokens

  QK_DEVICE void load(const SharedMemory<K>& shared, DType type, int page, int group) {
    const int warp = threadIdx.x / kWarp, at = group * kLanes + threadIdx.x % kWarp / 4;
    const uint8_t* const from = shared.scales(page) + warp * K::kScaleBytes;
    if (type == DType::f32) {
      const float* const floats = reinterpret_cast<const float*>(from) + at;
      scales[0] = floats[0], scales[1] = floats[8];
    } else {
      const uint16_t* const halves = reinterpret_cast<const uint16_t*>(from) + at;
      const bool bf16 = type == DType::bf16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[i] = bf16 ? bf16_to_float(halves[i * 8]) : f16_to_float(halves[i * 8]);
      }
    }
    if constexpr (K::kZeros) {
      const uint8_t* const zero = shared.zeros(page) + warp * K::kZeroBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        zeros[i] = zero_factor<K::kFormat>(load_zero_point(zero, K::kFormat, at + i * 8));
      }
      code_sums = shared.code_sums(page) + group * K::kSumBytes;
    }
  }
};

// sums += exact * scales, for half the tokens.
template <class K>
QK_DEVICE void fold(float (&sums)[K::kHalf / 2], const int32_t (&exact)[K::kHalf / 2],
                    const GroupEnd<K>& end, int half) {
#pragma unroll
  for (int j = 0; j < K::kHalf / 8; ++j) {
    int32_t codes[2] = {};
    if constexpr (K::kZeros) {
      const int token = half * K::kHalf + j * 8 + threadIdx.x % 4 * 2;
      const uint2 v = load_shared_64(end.code_sums + token * 4);
      codes[0] = static_cast<int32_t>(v.x), codes[1] = static_cast<int32_t>(v.y);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int32_t sum = exact[j * 4 + e];
      if constexpr (K::kZeros) sum += end.zeros[e / 2] * codes[e % 2];
      float& to = sums[j * 4 + e];
      to = std::fma(static_cast<float>(sum), end.scales[e / 2], to);
    }
  }
}

// What a warpgroup knows on its way through a tile.
template <class K>
struct Products {
  using T = typename K::T;

  const LinearArgs& a;
  const SharedMemory<K>& shared;
  Turn<K::kStages>& turn;  // of the stage that is read next
  Turn<kPages>& page;
  int rank;
  int runs;       // that have not begun
  int chunk = 0;  // of the stage, that is read next
  int left = 0;   // runs of the group that have not begun
  int begun = 0;  // groups
  int group = 0;  // that is added up next
  int32_t exact[2][K::kHalf / 2];
  uint32_t weights[2][K::kRun][4];  // of a run and of the next one
  GroupEnd<K> end{};

  QK_DEVICE Products(const LinearArgs& a, const SharedMemory<K>& shared, Turn<K::kStages>& turn,
                     Turn<kPages>& page, int rank, int runs)
      : a(a), shared(shared), turn(turn), page(page), rank(rank), runs(runs) {}

  struct Run {
    uint64_t tokens;    // matrix_in_shared
    int stage;          // that is left with it, or -1
    bool begins, ends;  // a group
  };

  // Reads the weights of the next run.
  QK_DEVICE Run load(int parity) {
    Run run{};
    if (chunk == 0) barrier_wait(shared.filled(turn.place), turn.round);
    load_weights<K>(weights[parity],
                    shared.weights(turn.place) + threadIdx.x / kWarp * K::kRowBytes, chunk);
    run.tokens = matrix_in_shared(shared.tokens(turn.place)) + chunk * (kCudaChunk / 16);
    run.begins = left == 0;
    if (run.begins) left = ++begun < a.shape.groups ? group_runs() : runs;
    run.ends = --left == 0;
    --runs;
    chunk += K::kRun;
    run.stage = -1;
    if (chunk == kPieceK / kCudaChunk) run.stage = turn.place, chunk = 0, turn.next();
    return run;
  }

  QK_DEVICE int group_runs() const {
    return static_cast<int>(a.shape.group_padded / (kCudaChunk * K::kRun));
  }

  QK_DEVICE void multiply(const Run& run, int half, int parity) {
    constexpr int kNextHalf = K::kHalf * kPieceK / 16;
    warpgroup_keep(exact[half]);
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) {
      warpgroup_mma<K::kHalf>(exact[half], weights[parity][i],
                              run.tokens + half * kNextHalf + i * (kCudaChunk / 16),
                              !run.begins || i > 0);
    }
    warpgroup_commit();
  }

  QK_DEVICE void load_end() {
    const int in_page = group % kPageGroups;
    if (in_page == 0) barrier_wait(shared.filled(shared.kPage + page.place), page.round);
    end.load(shared, a.layout.scale, page.place, in_page);
  }

  // After the last use of a run's weights and stage.
  QK_DEVICE void leave(const Run& run, int parity) {
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) warpgroup_keep(weights[parity][i]);
    const int lane = threadIdx.x % kWarp;
    if (run.stage >= 0 && lane < T::kTogether) barrier_arrive(shared.emptied(run.stage), lane);
  }

  QK_DEVICE void leave_group() {
    ++group;
    if (group % kPageGroups != 0 && group != a.shape.groups) return;
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      barrier_arrive(shared.emptied(shared.kPage + page.place), rank);
    }
    page.next();
  }

  // The next kCount runs, of which the first one's weights are in weights[0]; leaves those of the
  // run that follows there. While floats take up a half, the tensor cores work on the other or on
  // the next run's.
  template <int kCount>
  QK_DEVICE void advance(float (&sums)[2][K::kHalf / 2], Run& first) {
    Run run = first, next = first;
    multiply(run, 0, 0);
    multiply(run, 1, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (run.ends) load_end();
      if (i + 1 < kCount || runs > 0) next = load((i + 1) % 2);
      warpgroup_wait<1>();
      warpgroup_keep(exact[0]);
      if (run.ends) fold<K>(sums[0], exact[0], end, 0);
      if (i + 1 < kCount) {
        multiply(next, 0, (i + 1) % 2);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      leave(run, i % 2);
      warpgroup_keep(exact[1]);
      if (run.ends) {
        fold<K>(sums[1], exact[1], end, 1);
        leave_group();
      }
      if (i + 1 < kCount) multiply(next, 1, (i + 1) % 2);
      run = next;
    }
    first = run;
    if constexpr (kCount % 2 == 1) {
#pragma unroll
      for (int i = 0; i < K::kRun; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[0][i][j] = weights[1][i][j];
      }
    }
  }
};

// The sums of a tile; of outputs beyond the weight's last ones they are anything.
template <class K>
QK_DEVICE void multiply_tile(float (&sums)[2][K::kHalf / 2], const LinearArgs& a,
                             const Tiles& tiles, const SharedMemory<K>& shared,
                             Turn<K::kStages>& turn, Turn<kPages>& page, int rank) {
  int runs = tiles.stages * K::kRuns;
  if (runs == 0) return;
  Products<K> products(a, shared, turn, page, rank, runs);
  auto run = products.load(0);
#pragma unroll 1
  for (; runs >= kUnroll; runs -= kUnroll) products.template advance<kUnroll>(sums, run);
#pragma unroll 1
  for (; runs > 0; --runs) products.template advance<1>(sums, run);
}

// ---- Results ------------------------------------------------------------------------------------

// Hands the sums to the warpgroup by way of shared memory, kRoundTokens at a time, so that a thread
// finishes four consecutive outputs of a token, the same ones each time.
template <class K>
QK_DEVICE void store_tile(const LinearArgs& a, const float (&sums)[2][K::kHalf / 2],
                          const SharedMemory<K>& shared, int64_t row, int64_t token) {
  using T = typename K::T;
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
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
  for (int round = 0; round < T::kTokens / kRoundTokens; ++round) {
    const int first = round * kRoundTokens;
    if (token + first >= a.rows) break;
    // Registers have no index: each round has its own stores.
#pragma unroll
    for (int eight = 0; eight < T::kTokens / 8; ++eight) {
      if (eight / (kRoundTokens / 8) != round) continue;
      constexpr int kEights = K::kHalf / 8;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = eight % (kRoundTokens / 8) * 8 + 2 * t + e % 2;
        const int feature = warp * 16 + g + e / 2 * 8;
        piece[at * kRoundPitch + feature] =
            bit_cast<uint32_t>(sums[eight / kEights][eight % kEights * 4 + e]);
      }
    }
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int at = thread / 16; at < kRoundTokens; at += kWarpgroup / 16) {
      if (token + first + at >= a.rows) break;
      const uint4 v = load_shared_128(piece + at * kRoundPitch + thread % 16 * 4);
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
  Turn<K::kStages> turn;
  Turn<kPages> page;
  Turn<1> tile;
  each_tile<typename K::T>(tiles, rank, [&](int64_t row, int64_t token) {
    float sums[2][K::kHalf / 2] = {};
    multiply_tile<K>(sums, a, tiles, shared, turn, page, rank);
    barrier_wait(shared.filled(shared.kFacts), tile.round);
    store_tile<K>(a, sums, shared, row, token);
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared.emptied(shared.kFacts), rank);
    tile.next();
  });
}

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
        barrier_init(shared.filled(i), i < shared.kPage    ? kCopyingWarps
                                       : i < shared.kFacts ? 1
                                                           : kWarp);
        barrier_init(shared.emptied(i), kConsumers / kWarp * blocks);
      }
      barrier_init_fence();
    }
    cluster_sync();
    if (threadIdx.x < kConsumers) {
      if constexpr (T::kConsumers > 1) take_registers<216>();
      multiply_tiles<K>(a, tiles, shared, rank);
    } else {
      if constexpr (T::kConsumers > 1) give_registers<80>();
      // By a shuffle, so that the compiler knows that a warp's lanes agree.
      const int warp = shuffle(static_cast<int>(threadIdx.x - kConsumers) / kWarp, 0);
      if (warp == 0) {
        copy_tokens<K>(a, tiles, shared, rank);
      } else if (warp < kCopyingWarps) {
        copy_weights<K>(a, tiles, shared, rank, warp - 1);
      } else {
        copy_ends<K>(a, tiles, shared, rank);
      }
      __syncwarp();
    }
    // A block must not end while another one copies to it or arrives at its barriers.
    cluster_sync();
  }
}

template <class T, Format kFormat, bool kZeros, int kRun>
void launch_as(const LinearArgs& a, Stream stream) {
  using K = Kernel<T, kFormat, kZeros, kRun>;
  const Tiles tiles{blocks_for(a.n, T::kFeatures), blocks_for(a.rows, T::kTokens),
                    static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK)};
  const unsigned clusters = min(tiles.features * tiles.tokens,
                                static_cast<unsigned>(clusters_at_once<T>(multiprocessors())));
  launch_clusters(grouped_warpgroups_kernel<K>, clusters * T::kTogether, T::kTogether, T::kThreads,
                  SharedMemory<K>::kBytes, stream, a, tiles);
}

template <class T, Format kFormat, bool kZeros>
void launch_run(const LinearArgs& a, Stream stream) {
  const int64_t chunks = a.shape.group_padded / kCudaChunk;
  if (a.shape.groups <= 1 || chunks % 4 == 0) return launch_as<T, kFormat, kZeros, 4>(a, stream);
  if (chunks % 2 == 0) return launch_as<T, kFormat, kZeros, 2>(a, stream);
  launch_as<T, kFormat, kZeros, 1>(a, stream);
}

template <class T, Format kFormat>
void launch_zeros(const LinearArgs& a, Stream stream) {
  a.layout.symmetric ? launch_run<T, kFormat, false>(a, stream)
                     : launch_run<T, kFormat, true>(a, stream);
}

template <class T>
void launch_tile(const LinearArgs& a, Stream stream) {
  a.layout.format == Format::int8 ? launch_zeros<T, Format::int8>(a, stream)
                                  : launch_zeros<T, Format::int4>(a, stream);
}

}  // namespace

void linear_int8_grouped_warpgroups(const LinearArgs& a, bool large, Stream stream) {
  large ? launch_tile<GroupedWarpgroupTiles::Large>(a, stream)
        : launch_tile<GroupedWarpgroupTiles::Small>(a, stream);
}

}  // namespace qkernels::cuda
