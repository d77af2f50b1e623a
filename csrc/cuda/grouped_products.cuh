// Products of linear_int8_grouped_warpgroups.cu: weights from registers, tokens from shared memory,
// and floats that take up the exact sums of groups.
#pragma once

#include "cuda/grouped_warpgroups.cuh"

namespace qkernels::cuda {

constexpr int kUnroll = 4;  // runs after which the tensor cores have nothing left

// What a warp has of the packed row in kRun chunks of a stage.
template <class K>
struct Codes {
  static constexpr int kBits = info(K::kFormat).bits;
  uint32_t words[K::kRun * kBits / 2];

  QK_DEVICE void load(const uint8_t* stage, int chunk) {
    constexpr int kBytes = kBits * 2;  // of a thread and a chunk
    const uint8_t* const lane = stage + threadIdx.x % kWarp * 16;
    if constexpr (K::kRun * kBytes == 8) {
      const uint2 v = load_shared_64(lane + chunk / 2 * kCudaUnit + chunk % 2 * 8);
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < K::kRun * kBytes / 16; ++i) {
        const uint4 v = load_shared_128(lane + (chunk * kBytes / 16 + i) * kCudaUnit);
        words[i * 4] = v.x, words[i * 4 + 1] = v.y;
        words[i * 4 + 2] = v.z, words[i * 4 + 3] = v.w;
      }
    }
  }

  // As A operands: of int4 16 * (code - 8), which is the nibble on the left of a byte with its
  // first bit turned.
  QK_DEVICE void widen(uint32_t (&a)[K::kRun][4]) const {
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) {
      if constexpr (K::kFormat == Format::int8) {
        const uint32_t* const w = words + i * 4;
        a[i][0] = w[0], a[i][1] = w[2], a[i][2] = w[1], a[i][3] = w[3];
      } else {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint32_t w = words[i * 2 + row];
          a[i][row] = (w * 16 & 0xf0f0f0f0u) ^ 0x80808080u;
          a[i][row + 2] = (w & 0xf0f0f0f0u) ^ 0x80808080u;
        }
      }
    }
  }
};

// What a thread needs at the end of a group: of outputs g and g + 8 of its packed row.
template <class K>
struct GroupEnd {
  float scales[2];
  const uint8_t* code_sums;  // of the tile's tokens
  ZeroFactor<K::kFormat> zeros[2];
  bool shifted;  // exact sums have to lose what `widen` multiplied them by

  // That factor is taken from the scales, if it leaves no bit behind, and given to zero points.
  QK_DEVICE void shift() {
    if constexpr (K::kFormat == Format::int4) {
      constexpr int kFactor = 1 << kSumShift<Format::int4>;
      shifted = false;
      float units[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        units[i] = scales[i] * (1.0f / kFactor);
        shifted |= units[i] * kFactor != scales[i];
      }
      if (shifted) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[i] = units[i], zeros[i] *= kFactor;
    }
  }

  QK_DEVICE void load(const SharedMemory<K>& shared, const LinearArgs& a, int page, int group) {
    const DType type = a.layout.scale;
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
    shift();
  }
};

// sums += exact * scales, for kTokens tokens of the tile, from `first` on.
template <int kTokens, class K>
QK_DEVICE void fold(float (&sums)[kTokens / 2], int32_t (&exact)[kTokens / 2],
                    const GroupEnd<K>& end, int first) {
  if constexpr (K::kFormat == Format::int4) {
    if (end.shifted) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) exact[i] >>= kSumShift<Format::int4>;
    }
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    int32_t codes[2] = {};
    if constexpr (K::kZeros) {
      const int token = first + j * 8 + threadIdx.x % 4 * 2;
      const uint2 v = load_shared_64(end.code_sums + token * 4);
      codes[0] = static_cast<int32_t>(v.x), codes[1] = static_cast<int32_t>(v.y);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int32_t products = exact[j * 4 + e];
      float value = static_cast<float>(products);
      if constexpr (K::kZeros) {
        value = group_value<K::kFormat>(products, codes[e % 2], end.zeros[e / 2]);
      }
      float& to = sums[j * 4 + e];
      to = std::fma(value, end.scales[e / 2], to);
    }
  }
}

// By a warp, to every block that copies to the stage.
template <class K>
QK_DEVICE void leave_stage(const SharedMemory<K>& shared, int stage) {
  __syncwarp();  // all lanes have read their weights
  const int lane = threadIdx.x % kWarp;
  if (lane < K::T::kTogether) barrier_arrive(shared.emptied(stage), lane);
}

// What a warpgroup knows on its way through a tile.
template <class K>
struct Products {
  using T = typename K::T;

  const LinearArgs& a;
  const SharedMemory<K>& shared;
  Turn& turn;  // of the stage that is read next
  Turn& page;
  int runs;       // that have not begun
  int chunk = 0;  // of the stage, that is read next
  int left = 0;   // runs of the group that have not begun
  int begun = 0;  // groups
  int group = 0;  // that is added up next
  int32_t exact[2][K::kTokens / 2];
  uint32_t weights[2][K::kRun][4];  // of a run and of the next one
  GroupEnd<K> end{};

  QK_DEVICE Products(const LinearArgs& a, const SharedMemory<K>& shared, Turn& turn, Turn& page,
                     int runs)
      : a(a), shared(shared), turn(turn), page(page), runs(runs) {}

  struct Run {
    uint64_t tokens;    // matrix_in_shared
    int stage;          // that is left with it, or -1
    bool begins, ends;  // a group
  };

  // Reads the weights of the next run.
  QK_DEVICE Run load(int parity) {
    Run run{};
    if (chunk == 0) barrier_wait(shared.filled(turn.stage), turn.parity);
    Codes<K> codes;
    codes.load(shared.weights(turn.stage) + threadIdx.x / kWarp * K::kRowBytes, chunk);
    codes.widen(weights[parity]);
    run.tokens = matrix_in_shared(shared.tokens(turn.stage)) + chunk * (kCudaChunk / 16);
    run.begins = left == 0;
    if (run.begins) left = ++begun < a.shape.groups ? group_runs() : runs;
    run.ends = --left == 0;
    --runs;
    chunk += K::kRun;
    run.stage = -1;
    if (chunk == kPieceK / kCudaChunk) run.stage = turn.stage, chunk = 0, turn.next(K::kStages);
    return run;
  }

  QK_DEVICE int group_runs() const {
    return static_cast<int>(a.shape.group_padded / (kCudaChunk * K::kRun));
  }

  QK_DEVICE void multiply(const Run& run, int half, int parity) {
    constexpr int kNextHalf = K::kTokens * kPieceK / 16;
    warpgroup_keep(exact[half]);
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) {
      warpgroup_mma<K::kTokens>(exact[half], weights[parity][i],
                                run.tokens + half * kNextHalf + i * (kCudaChunk / 16),
                                !run.begins || i > 0);
    }
    warpgroup_commit();
  }

  QK_DEVICE void load_end() {
    const int in_page = group % kPageGroups;
    if (in_page == 0) barrier_wait(shared.filled(shared.kPage + page.stage), page.parity);
    end.load(shared, a, page.stage, in_page);
  }

  // After the last use of a run's weights and stage.
  QK_DEVICE void leave(const Run& run, int parity) {
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) warpgroup_keep(weights[parity][i]);
    if (run.stage >= 0) leave_stage(shared, run.stage);
  }

  QK_DEVICE void leave_group() {
    ++group;
    if (group % kPageGroups != 0 && group != a.shape.groups) return;
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared.emptied(shared.kPage + page.stage));
    page.next(kPages);
  }

  // The next kCount runs, of which the first one's weights are in weights[0]; leaves those of the
  // run that follows there. While floats take up a half, the tensor cores work on the other or on
  // the next run's.
  template <int kCount>
  QK_DEVICE void advance(float (&sums)[2][K::kTokens / 2], Run& first) {
    Run run = first, next = first;
    multiply(run, 0, 0);
    multiply(run, 1, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (run.ends) load_end();
      if (i + 1 < kCount || runs > 0) next = load((i + 1) % 2);
      warpgroup_wait<1>();
      warpgroup_keep(exact[0]);
      if (run.ends) fold<K::kTokens>(sums[0], exact[0], end, 0);
      if (i + 1 < kCount) {
        multiply(next, 0, (i + 1) % 2);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      leave(run, i % 2);
      warpgroup_keep(exact[1]);
      if (run.ends) {
        fold<K::kTokens>(sums[1], exact[1], end, K::kTokens);
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

// The same where every run is a group, for tiles whose sums there is room for twice: all tokens'
// products of the next group are under way while floats take up this one's.
template <class K>
struct GroupProducts {
  using T = typename K::T;
  static constexpr int kSums = T::kTokens / 2;

  const LinearArgs& a;
  const SharedMemory<K>& shared;
  Turn& turn;  // of the stage that is read next
  Turn& page;
  int groups;
  int32_t exact[2][kSums];
  uint32_t weights[2][K::kRun][4];
  Codes<K> codes;  // of the group whose products are to begin next
  GroupEnd<K> end{};

  QK_DEVICE GroupProducts(const LinearArgs& a, const SharedMemory<K>& shared, Turn& turn,
                          Turn& page)
      : a(a), shared(shared), turn(turn), page(page), groups(static_cast<int>(a.shape.groups)) {}

  struct Run {
    uint64_t tokens;  // matrix_in_shared
    int stage;        // that is left with it, or -1
  };

  // Reads a group's codes; `number` is its place in the tile, or in what begins with a stage.
  QK_DEVICE Run load(int number, bool last) {
    const int chunk = number % K::kRuns * K::kRun;
    if (chunk == 0) barrier_wait(shared.filled(turn.stage), turn.parity);
    codes.load(shared.weights(turn.stage) + threadIdx.x / kWarp * K::kRowBytes, chunk);
    Run run{matrix_in_shared(shared.tokens(turn.stage)) + chunk * (kCudaChunk / 16), -1};
    if (last || chunk + K::kRun == kPieceK / kCudaChunk)
      run.stage = turn.stage, turn.next(K::kStages);
    return run;
  }

  QK_DEVICE void multiply(const Run& run, int parity) {
    codes.widen(weights[parity]);
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) warpgroup_keep(weights[parity][i]);
    warpgroup_wait<1>();  // ends nothing, but the compiler wants it behind operands that are new
    warpgroup_keep(exact[parity]);
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < K::kRun; ++i) {
      warpgroup_mma<T::kTokens>(exact[parity], weights[parity][i],
                                run.tokens + i * (kCudaChunk / 16), i > 0);
    }
    warpgroup_commit();
  }

  // Groups `group` to `group + kCount`, of which the first one's codes are read; reads those of the
  // one that follows.
  template <int kCount>
  QK_DEVICE void advance(float (&sums)[kSums], Run& first, int group) {
    const int number = kCount == kPageGroups ? 0 : group;
    const int lane = threadIdx.x % kWarp;
    Run now = first, next = first;
    const auto load_next = [&](int i) {
      const int left = groups - group - i;
      if (i < kCount || left > 0) next = load(number + i, left == 1);
    };
    multiply(now, 0);
    load_next(1);
    if (number % kPageGroups == 0) {
      barrier_wait(shared.filled(shared.kPage + page.stage), page.parity);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Run done = now;
      now = next;
      if (i + 1 < kCount) {
        multiply(now, (i + 1) % 2);
        load_next(i + 2);
      }
      end.load(shared, a, page.stage, (number + i) % kPageGroups);
      i + 1 < kCount ? warpgroup_wait<1>() : warpgroup_wait<0>();
      warpgroup_keep(exact[i % 2]);
#pragma unroll
      for (int j = 0; j < K::kRun; ++j) warpgroup_keep(weights[i % 2][j]);
      if (done.stage >= 0) leave_stage(shared, done.stage);
      fold<T::kTokens>(sums, exact[i % 2], end, 0);
    }
    first = now;
    if ((number + kCount) % kPageGroups != 0 && group + kCount != groups) return;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.emptied(shared.kPage + page.stage));
    page.next(kPages);
  }

  QK_DEVICE void add(float (&sums)[kSums]) {
    Run run = load(0, groups == 1);
    int group = 0;
#pragma unroll 1
    for (; group + kPageGroups <= groups; group += kPageGroups) {
      advance<kPageGroups>(sums, run, group);
    }
#pragma unroll 1
    for (; group < groups; ++group) advance<1>(sums, run, group);
  }
};

// The sums of a tile; of outputs beyond the weight's last ones they are anything.
template <class K>
QK_DEVICE void multiply_tile(float (&sums)[K::kPieces][K::kTokens / 2], const LinearArgs& a,
                             const Tiles& tiles, const SharedMemory<K>& shared, Turn& turn,
                             Turn& page) {
  int runs = tiles.stages * K::kRuns;
  if (runs == 0) return;
  if constexpr (K::kWhole) {
    GroupProducts<K>(a, shared, turn, page).add(sums[0]);
  } else {
    Products<K> products(a, shared, turn, page, runs);
    auto run = products.load(0);
#pragma unroll 1
    for (; runs >= kUnroll; runs -= kUnroll) products.template advance<kUnroll>(sums, run);
#pragma unroll 1
    for (; runs > 0; --runs) products.template advance<1>(sums, run);
  }
}

}  // namespace qkernels::cuda
