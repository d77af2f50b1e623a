// linear with 16-bit x on sm_90a, for more rows than the GEMV takes: products of warpgroups,
// weights from registers, x from shared memory.
//
// The blocks of a cluster have the same 256 outputs and rows of x, and a slice of k each. Four
// warpgroups of a block multiply 64 outputs each, a packed row for each warp. The fifth keeps
// stages of k in shared memory: it has weights copied in the background, as they are packed, and
// copies x by its registers, because threads own k as the packed weight has it: eight consecutive k
// of a chunk of 32 are pairs 0 to 3 of slots in two products of 16 k. So the 16 bytes that hold
// pair j of four threads are written by four threads, 4 bytes each.
//
// Products of a group are summed up by the tensor cores; the group's scale is applied to the sums.
// At the end each block of the cluster gets the sums of a share of the rows of x from all others,
// adds them up in the order of k and makes y of them.
#pragma once

#include <algorithm>

#include "cuda/linear_float.cuh"
#include "cuda/ptx_sm90_float.cuh"

namespace qkernels::cuda {

template <Format kFormat_, bool kAsymmetric_, DType kType_, int kTokens_>
struct FloatWarpgroups {
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kAsymmetric = kAsymmetric_;
  static constexpr DType kType = kType_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kConsumers = FloatWarpgroupTile::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kWarps = kConsumers * kWarpgroup / kWarp;  // that multiply
  static constexpr int kOutputs = FloatWarpgroupTile::kOutputs;
  static_assert(kOutputs == kWarps * kLanes);

  static constexpr int kRowBytes = 2 * kCudaUnit;  // of a packed row in a stage
  static constexpr int kChunks = info(kFormat).bits == 8 ? 2 : 4;
  static constexpr int kStageK = kChunks * kCudaChunk;
  static constexpr int kMatrices = kStageK / static_cast<int>(kStep);  // of x
  static constexpr int kMatrixBytes = kTokens * 128;
  static constexpr int kTokenBytes = kMatrices * kMatrixBytes;
  static constexpr int kStageBytes = kTokenBytes + kWarps * kRowBytes;
  // A thread loads so many 16 bytes of x for a stage, for so many stages ahead.
  static constexpr int kLoads = kTokens * kStageK / 8 / kWarpgroup;
  static constexpr int kAhead = 8 / kLoads;

  // A stage has at most so many groups. Of each packed row it has their scales, then their zero
  // points.
  static constexpr int kGroups = kChunks;
  static constexpr int kZeros = kGroups * kLanes * 4;
  static constexpr int kGroupBytes = kZeros + kGroups * kLanes;

  static constexpr int kSharedBytes = 227 * 1024;  // that a block may have
  static constexpr int kStages =
      std::min(8, (kSharedBytes - 256) / (kStageBytes + kWarps * kGroupBytes));

  // Operands of two products, where registers allow: the other warpgroups compute meanwhile.
  static constexpr int kLefts = kTokens == 64 && (kFormat != Format::int4 || kAsymmetric) ? 1 : 2;

  // Words from a row of x to the next in the sums: what a warp writes at once, 8 outputs of every
  // second row, lies in different banks.
  static constexpr int kPitch = kOutputs + 4;

  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kGroupsAt = kBarriers + 8 * (2 * kStages + 2);
  static constexpr int kBytes = kGroupsAt + kStages * kWarps * kGroupBytes;
  static_assert(kGroupsAt % 16 == 0 && kBytes <= kSharedBytes);
  // All sums of the block, and a share of those of up to seven others.
  static_assert(2 * kTokens * kPitch * 4 <= kBarriers);

  struct Shared {
    uint8_t* at;
    QK_DEVICE uint8_t* tokens(int stage) const { return at + stage * kStageBytes; }
    QK_DEVICE uint8_t* weights(int stage) const { return tokens(stage) + kTokenBytes; }
    QK_DEVICE Barrier* filled(int stage) const {
      return reinterpret_cast<Barrier*>(at + kBarriers) + stage;
    }
    QK_DEVICE Barrier* emptied(int stage) const { return filled(kStages + stage); }
    QK_DEVICE Barrier* received() const { return filled(2 * kStages); }
    QK_DEVICE uint8_t* groups(int stage, int row) const {
      return at + kGroupsAt + (stage * kWarps + row) * kGroupBytes;
    }
    // The sums of this block, and those that another one sent.
    QK_DEVICE float* sums() const { return reinterpret_cast<float*>(at); }
    QK_DEVICE float* sums_from(int sender, int words) const {
      return sums() + kTokens * kPitch + sender * words;
    }
  };

  // One stage after the other. A barrier's phase has the parity of `round`.
  struct Turn {
    int stage = 0;
    uint32_t round = 0;

    QK_DEVICE void next() {
      if (++stage == kStages) stage = 0, round ^= 1;
    }
  };
};

// What of the product a block has.
struct WarpgroupPart {
  int64_t row, token;  // the first packed row, the first row of x
  int tokens;          // rows of x that there are
  int begin, stages;   // of k
};

// The chunk where the group that chunk `at` is in begins.
QK_DEVICE int first_group_of(const FloatKernelArgs& a, int at) {
  return min(at, a.group_end - 1) / a.group_chunks * a.group_chunks;
}

// ---- Copies -------------------------------------------------------------------------------------

template <class T>
QK_DEVICE void copy_operands(const FloatKernelArgs& a, const WarpgroupPart& part,
                             const typename T::Shared& shared) {
  constexpr int kRows = T::kTokens / 16;  // of a thread
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int piece = thread % 8, row = thread / 8;

  // ---- Weights ---- Eight threads have a packed row, one of them its codes.
  const int packed_rows = static_cast<int>(
      max(int64_t{0}, min((a.n + kLanes - 1) / kLanes - part.row, int64_t{T::kWarps})));
  const uint8_t* const packed = a.packed + (part.row + row) * a.row_bytes;
  const int row_codes = a.chunks * (T::kRowBytes / T::kChunks);
  const auto copy_weights = [&](int stage, int to) {
    const int from = (part.begin + stage) * T::kRowBytes;
    const int bytes = min(row_codes - from, T::kRowBytes);
    if (thread == 0) barrier_expect(shared.filled(to), packed_rows * bytes);
    if (piece == 0 && row < packed_rows) {
      copy_bulk(shared.weights(to) + row * T::kRowBytes, packed + from, bytes, shared.filled(to));
    }
  };
  const int scale_bytes = a.scale_type == DType::f32 ? kLanes * 4 : kLanes * 2;
  int chunk = part.begin * T::kChunks;
  int group_at = first_group_of(a, chunk), group = group_at / a.group_chunks;
  const auto copy_groups = [&](int to) {
    while (group_at + a.group_chunks <= min(chunk, a.group_end - 1)) {
      ++group, group_at += a.group_chunks;
    }
    const int last = min(chunk + T::kChunks, a.group_end);
    int groups = 1;
    for (int at = group_at + a.group_chunks; at < last; at += a.group_chunks) ++groups;
    chunk += T::kChunks;
    if (row >= packed_rows) return;
    uint8_t* const at = shared.groups(to, row) + piece * 16;
    const uint8_t* const scales = packed + a.scales + int64_t{group} * scale_bytes + piece * 16;
#pragma unroll
    for (int i = 0; i < T::kZeros; i += 8 * 16) {
      if (i + piece * 16 < groups * scale_bytes) cp_async<16>(at + i, scales + i);
    }
    if (T::kAsymmetric && piece < groups) {
      cp_async<16>(at + T::kZeros, packed + a.zeros + int64_t{group} * kLanes + piece * 16);
    }
  };

  // ---- x ---- Eight threads read 128 consecutive bytes of a row. What a warp writes at once, four
  // rows of eight threads, lies in different banks.
  const uint16_t* from[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    from[i] = a.x + (part.token + min(row + i * 16, part.tokens - 1)) * a.ld +
              int64_t{part.begin} * T::kStageK + piece * 8;
  }
  // Steps that there are from here on.
  const int steps = min(a.steps - part.begin * T::kMatrices, part.stages * T::kMatrices);
  const auto load = [&](uint4(&x)[T::kLoads], int stage) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int step = stage * T::kMatrices + i / kRows;
      x[i] = step < steps ? load_128(from[i % kRows] + step * static_cast<int>(kStep))
                          : make_uint4(0, 0, 0, 0);
    }
  };
  const int to = row * 128 + (piece / 4 * 4 ^ row % 8) * 16 + piece % 4 * 4;
  const auto store = [&](const uint4(&x)[T::kLoads], int stage) {
    uint8_t* const tokens = shared.tokens(stage);
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const uint32_t pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<uint32_t*>(tokens + (to ^ j * 16) + i / kRows * T::kMatrixBytes +
                                     i % kRows * (16 * 128)) = pairs[j];
      }
    }
  };

  for (int stage = 0; stage < min(part.stages, T::kStages); ++stage) copy_weights(stage, stage);
  uint4 x[T::kAhead][T::kLoads];
#pragma unroll
  for (int i = 0; i < T::kAhead; ++i) load(x[i], i);
  typename T::Turn turn;
#pragma unroll 1
  for (int first = 0; first < part.stages; first += T::kAhead) {
#pragma unroll
    for (int i = 0; i < T::kAhead; ++i) {
      const int stage = first + i;
      if (stage >= part.stages) break;
      if (stage >= T::kStages) {
        barrier_wait(shared.emptied(turn.stage), turn.round ^ 1);
        copy_weights(stage, turn.stage);
      }
      copy_groups(turn.stage);
      barrier_arrive_copied(shared.filled(turn.stage));
      store(x[i], turn.stage);
      load(x[i], stage + T::kAhead);
      shared_fence();
      barrier_arrive(shared.filled(turn.stage));
      turn.next();
    }
  }
}

// ---- Products -----------------------------------------------------------------------------------

// Scales of a group as they lie in shared memory: what a thread reads.
struct ScaleReader {
  int word, pick;  // its place; which bytes make a float of it
  bool half;       // float16

  QK_DEVICE ScaleReader(DType type, int lane)
      : word(type == DType::f32 ? lane * 4 : lane / 2 * 4),
        pick(type == DType::f32 ? 0x3210
             : lane % 2 == 0    ? 0x1044
                                : 0x3244),
        half(type == DType::f16) {}

  QK_DEVICE float operator()(const uint8_t* scales) const {
    const uint32_t bits =
        prmt(*reinterpret_cast<const uint32_t*>(scales + word), 0, static_cast<uint32_t>(pick));
    return half ? f16_to_float(static_cast<uint16_t>(bits >> 16)) : bit_cast<float>(bits);
  }
};

// The sums of a slice; of outputs and rows of x that are not there they are anything.
template <class T>
QK_DEVICE void multiply_slice(const FloatKernelArgs& a, const WarpgroupPart& part,
                              const typename T::Shared& shared, float (&sums)[T::kTokens / 2]) {
  using C = Codes<T::kFormat, T::kType>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4;
  const ScaleReader read_scale[2] = {{a.scale_type, g}, {a.scale_type, g + 8}};
  const int scales_bytes = a.scale_type == DType::f32 ? kLanes * 4 : kLanes * 2;

  float products[T::kTokens / 2];
  uint32_t left[T::kLefts][2][4];  // of this chunk and of the one before, still in use
  float scale[2] = {};
  typename C::Zero zero[2] = {C::zero(a.zero), C::zero(a.zero)};
#pragma unroll
  for (int i = 0; i < T::kTokens / 2; ++i) products[i] = sums[i] = 0.0f;
  const auto fold = [&] {
    warpgroup_wait<0>();
    warpgroup_keep(products);
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) {
      sums[i] = std::fma(products[i], scale[i / 2 % 2], sums[i]);
    }
  };

  // Where the next group begins, and the one after it.
  int chunk = part.begin * T::kChunks, group_at = chunk;
  int group_after = first_group_of(a, chunk) + a.group_chunks;
  int before = 0;
  typename T::Turn turn;
#pragma unroll 1
  for (int stage = 0; stage < part.stages; ++stage, turn.next()) {
    // Of the group that this stage begins in, or of the first that begins in it.
    const uint8_t* scales = shared.groups(turn.stage, warp);
    const uint8_t* zeros = scales + T::kZeros;
    if (chunk != group_at) scales += scales_bytes, zeros += kLanes;
    barrier_wait(shared.filled(turn.stage), turn.round);
    const uint8_t* const weights = shared.weights(turn.stage) + warp * T::kRowBytes + lane * 16;
    uint4 words = {};
#pragma unroll
    for (int i = 0; i < T::kChunks; ++i, ++chunk) {
      const bool begins = chunk == group_at;
      if (T::kAsymmetric && begins) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint8_t byte = zeros[g + 8 * r];
          zero[r] = C::zero(T::kFormat == Format::int8 ? static_cast<int8_t>(byte) : byte & 15);
        }
        zeros += kLanes;
      }
      uint32_t (&mine)[2][4] = left[i % T::kLefts];
      if (T::kChunks == 2 || i % 2 == 0) {
        words = load_shared_128(weights + (T::kChunks == 2 ? i : i / 2) * kCudaUnit);
      }
      uint32_t pairs[2][4];
      if constexpr (T::kChunks == 2) {
        C::pairs(pairs[0], {words.x, words.y}, zero[0], a.levels);
        C::pairs(pairs[1], {words.z, words.w}, zero[1], a.levels);
      } else {
        const uint32_t low[1] = {i % 2 == 0 ? words.x : words.z};
        const uint32_t high[1] = {i % 2 == 0 ? words.y : words.w};
        C::pairs(pairs[0], low, zero[0], a.levels);
        C::pairs(pairs[1], high, zero[1], a.levels);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) mine[j / 4][j % 4] = pairs[j % 2][j / 2];
      if (begins) {
        fold();  // the first time nothing, with a scale of 0
        scale[0] = read_scale[0](scales);
        scale[1] = read_scale[1](scales);
        scales += scales_bytes;
        group_at = group_after >= a.group_end ? INT32_MAX : group_after;
        group_after += a.group_chunks;
      }
      const uint64_t x =
          matrix_in_shared(shared.tokens(turn.stage) + i / 2 * T::kMatrixBytes) + i % 2 * 4;
      warpgroup_keep(products);
      warpgroup_fence();
      warpgroup_mma<T::kType, T::kTokens>(products, mine[0], x, !begins);
      warpgroup_mma<T::kType, T::kTokens>(products, mine[1], x + 2, true);
      warpgroup_commit();
      warpgroup_wait<T::kLefts - 1>();
      warpgroup_keep(left[(i + 1) % T::kLefts][0]);
      warpgroup_keep(left[(i + 1) % T::kLefts][1]);
      if (i == 0 && stage > 0 && lane == 0) barrier_arrive(shared.emptied(before));
    }
    before = turn.stage;
  }
  fold();
}

// ---- Results ------------------------------------------------------------------------------------

// Hands the sums to the blocks that make y of them, this one's in shared memory.
template <class T>
QK_DEVICE void put_sums(const typename T::Shared& shared, const float (&sums)[T::kTokens / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const to = shared.sums() + lane % 4 * 2 * T::kPitch +
                    static_cast<int>(threadIdx.x) / kWarp * kLanes + lane / 4;
  // All weights and rows of x that lay there have been read.
  sync_some(1, T::kConsumers * kWarpgroup);
#pragma unroll
  for (int i = 0; i < T::kTokens / 2; ++i) {
    to[(i / 4 * 8 + i % 2) * T::kPitch + i / 2 % 2 * 8] = sums[i];
  }
  shared_fence();
  sync_some(1, T::kConsumers * kWarpgroup);
}

template <class T>
QK_DEVICE void store_share(const FloatKernelArgs& a, const WarpgroupPart& part,
                           const typename T::Shared& shared, int rank) {
  const int share = T::kTokens / a.slices, words = share * T::kPitch;
  const int column = static_cast<int>(threadIdx.x) % T::kOutputs;
  const int64_t output = part.row * kLanes + column;
  const float* const own = shared.sums() + rank * words;
  if (a.slices > 1) barrier_wait(shared.received(), 0);
  if (output >= a.n) return;
  const float bias = bias_at(a, output);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / T::kOutputs; i < share;
       i += T::kConsumers * kWarpgroup / T::kOutputs) {
    const int token = rank * share + i;
    if (token >= part.tokens) break;
    const int at = i * T::kPitch + column;
    float sum = (rank == 0 ? own : shared.sums_from(0, words))[at];
    for (int slice = 1; slice < a.slices; ++slice) {
      const float* const from =
          slice == rank ? own : shared.sums_from(slice - (slice > rank ? 1 : 0), words);
      sum = sum + from[at];
    }
    finish<T::kType>(a, part.token + token, output, sum, bias);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) float_warpgroups_kernel(const FloatKernelArgs a) {
  if constexpr (QK_SM90A) {
    const typename T::Shared shared{shared_memory<uint8_t>()};
    const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
    const int share = T::kTokens / a.slices * T::kPitch;  // words
    if (thread == 0) {
      for (int i = 0; i < T::kStages; ++i) {
        barrier_init(shared.filled(i), 2 * kWarpgroup + 1);
        barrier_init(shared.emptied(i), T::kWarps);
      }
      barrier_init(shared.received(), 1);
      barrier_init_fence();
      if (a.slices > 1) barrier_expect(shared.received(), (a.slices - 1) * share * 4);
    }
    __syncthreads();
    const int tile = static_cast<int>(blockIdx.x) / a.slices;
    WarpgroupPart part;
    part.row = int64_t{tile / a.row_tiles} * T::kWarps;
    part.token = int64_t{tile % a.row_tiles} * T::kTokens;
    part.tokens = static_cast<int>(min(a.rows - part.token, int64_t{T::kTokens}));
    part.begin = rank * (a.slice_steps / T::kMatrices);
    part.stages = max(0, min(a.slice_steps, a.steps - rank * a.slice_steps) + T::kMatrices - 1) /
                  T::kMatrices;
    if (thread < T::kConsumers * kWarpgroup) {
      take_registers<104>();
      {
        float sums[T::kTokens / 2];
        multiply_slice<T>(a, part, shared, sums);
        put_sums<T>(shared, sums);
      }
      cluster_sync();  // the others have read their stages, too
      if (thread < a.slices && thread != rank) {
        copy_to_block(shared.sums_from(rank - (rank > thread ? 1 : 0), share),
                      shared.sums() + thread * share, share * 4, shared.received(), thread);
      }
      store_share<T>(a, part, shared, rank);
    } else {
      give_registers<64>();
      copy_operands<T>(a, part, shared);
      cluster_sync();
    }
    // A block must not end while others copy from it.
    cluster_sync();
  }
}

template <Format kFormat, bool kAsymmetric, DType kType>
void launch_warpgroups(const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  const auto run = [&](auto tile) {
    using T = decltype(tile);
    const unsigned clusters = blocks_for(a.n, T::kOutputs) * static_cast<unsigned>(a.row_tiles);
    const auto together = static_cast<unsigned>(a.slices);
    launch_clusters(float_warpgroups_kernel<T>, clusters * together, together, T::kThreads,
                    T::kBytes, stream, a);
  };
  if (plan.tiles == 2) return run(FloatWarpgroups<kFormat, kAsymmetric, kType, 16>{});
  if (plan.tiles == 4) return run(FloatWarpgroups<kFormat, kAsymmetric, kType, 32>{});
  run(FloatWarpgroups<kFormat, kAsymmetric, kType, 64>{});
}

// One source file for each type of x, to be compiled beside each other.
template <DType kType>
void launch_warpgroups_format(Format format, const FloatPlan& plan, const FloatKernelArgs& a,
                              Stream stream) {
  if (format == Format::nf4) return launch_warpgroups<Format::nf4, false, kType>(plan, a, stream);
  const auto run = [&]<Format kFormat>() {
    a.asymmetric ? launch_warpgroups<kFormat, true, kType>(plan, a, stream)
                 : launch_warpgroups<kFormat, false, kType>(plan, a, stream);
  };
  format == Format::int8 ? run.template operator()<Format::int8>()
                         : run.template operator()<Format::int4>();
}

void linear_warpgroups_bf16(Format format, const FloatPlan& plan, const FloatKernelArgs& a,
                            Stream stream);
void linear_warpgroups_f16(Format format, const FloatPlan& plan, const FloatKernelArgs& a,
                           Stream stream);

}  // namespace qkernels::cuda
