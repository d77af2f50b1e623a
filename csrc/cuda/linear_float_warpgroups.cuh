// linear with 16-bit x on sm_90a, for more rows than the GEMV takes: products of warpgroups,
// weights from registers, x from shared memory.
//
// Four warpgroups of a block multiply 64 outputs each, a packed row for each warp. They are 1, 2 or
// 4 teams: each team has all outputs of the block, and a slice of k. So do the blocks of a cluster.
// The fifth warpgroup keeps stages of k in shared memory, all copied in the background: weights as
// they are packed, and x in the order in which the products want it: threads own eight consecutive
// k of a chunk of 32, which are pairs 0 to 3 of slots in two products of 16 k. So pair j of four
// threads is 16 bytes, and x is copied 4 bytes at a time.
//
// Products of a group are summed up by the tensor cores; the group's scale is applied to the sums.
// At the end the teams add up their sums, one after the other. Then each block of the cluster gets
// the sums of a share of the rows of x from all others, adds them up in the order of k and makes y
// of them.
#pragma once

#include "cuda/linear_float_stages.cuh"

namespace qkernels::cuda {

// ---- Products -----------------------------------------------------------------------------------

// Scales of a group as they lie in shared memory: those of outputs g and g + 8.
struct ScaleReader {
  uint32_t at[2], pick[2];  // their words' places; which bytes make floats of these
  bool half;                // float16

  QK_DEVICE ScaleReader(DType type, int g) : half(type == DType::f16) {
    const bool wide = type == DType::f32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      at[i] = static_cast<uint32_t>((wide ? g + 8 * i : (g + 8 * i) / 2) * 4);
      pick[i] = wide ? 0x3210 : g % 2 == 0 ? 0x1044 : 0x3244;
    }
    // Otherwise the compiler finds them out again each time.
    warpgroup_keep(at);
    warpgroup_keep(pick);
  }

  QK_DEVICE void operator()(float (&scale)[2], const uint8_t* scales) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = prmt(load_shared_32(scales + at[i]), 0, pick[i]);
      scale[i] = half ? f16_to_float(static_cast<uint16_t>(bits >> 16)) : bit_cast<float>(bits);
    }
  }
};

// The sums of a team; of outputs and rows of x that are not there they are anything.
template <class T>
QK_DEVICE void multiply_slice(const FloatKernelArgs& a, const WarpgroupPart& part,
                              const typename T::Shared& shared, const typename T::Pairs& pairs_of,
                              float (&sums)[T::kTokens / 2]) {
  using C = Codes<T::kFormat, T::kType>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // The same of all lanes, which the compiler is to know.
  const int warp = shuffle(static_cast<int>(threadIdx.x) / kWarp, 0);
  const int g = lane / 4, team = warp / shared.rows();
  const ScaleReader read_scale(a.scale_type, g);
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

  // Where the next group begins, and the one after it, and where the last one ends: chunks from
  // where the stage begins.
  constexpr int kNever = INT32_MAX / 2;
  const int first = (part.begin + team * part.each) * T::kChunks;
  int group_at = first < a.group_end ? 0 : kNever;
  int group_after = first_group_of(a, first) + a.group_chunks - first;
  int group_end = a.group_end - first;
  int before = 0;
  Turn turn;
#pragma unroll 1
  for (int stage = 0; stage < part.stages; ++stage, turn.next(shared.stages)) {
    // Of the group that this stage begins in, or of the first that begins in it.
    const uint8_t* scales = shared.groups(turn.stage, warp);
    const uint8_t* zeros = scales + T::kZeros;
    if (group_at != 0) scales += scales_bytes, zeros += kLanes;
    barrier_wait(shared.filled(turn.stage), turn.parity);
    shared_fence();  // x was copied the way of stores
    const uint8_t* const weights = shared.weights(turn.stage, warp) + lane * 16;
    const uint64_t tokens = matrix_in_shared(shared.tokens(turn.stage, team));
    // All of the stage at once, where there are registers.
    uint4 units[T::kUnits];
    const auto load = [&](int u) { units[u] = load_shared_128(weights + u * kCudaUnit); };
    if (T::kTokens < 64) {
#pragma unroll
      for (int u = 0; u < T::kUnits; ++u) load(u);
    }
#pragma unroll
    for (int i = 0; i < T::kChunks; ++i) {
      const bool begins = i == group_at;
      if (T::kAsymmetric && begins) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          zero[r] = C::zero(load_zero_point(zeros, T::kFormat, g + 8 * r));
        }
        zeros += kLanes;
      }
      uint32_t (&mine)[2][4] = left[i % T::kLefts];
      constexpr int kChunksOfUnit = T::kChunks / T::kUnits;
      if (T::kTokens == 64 && i % kChunksOfUnit == 0) load(i / kChunksOfUnit);
      const uint4 words = units[i / kChunksOfUnit];
      uint32_t pairs[2][4];
      if constexpr (T::kBytes) {
        pairs_of(pairs[0], {words.x, words.y}, zero[0]);
        pairs_of(pairs[1], {words.z, words.w}, zero[1]);
      } else {
        const uint32_t low[1] = {i % 2 == 0 ? words.x : words.z};
        const uint32_t high[1] = {i % 2 == 0 ? words.y : words.w};
        pairs_of(pairs[0], low, zero[0]);
        pairs_of(pairs[1], high, zero[1]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) mine[j / 4][j % 4] = pairs[j % 2][j / 2];
      if (begins) {
        fold();  // the first time nothing, with a scale of 0
        read_scale(scale, scales);
        scales += scales_bytes;
        group_at = group_after >= group_end ? kNever : group_after;
        group_after += a.group_chunks;
      }
      const auto x = [&](int k32) {
        const uint32_t at = static_cast<uint32_t>(tokens) + i / 2 * (T::kMatrixBytes / 16);
        return tokens >> 32 << 32 | (at + static_cast<uint32_t>(i % 2 * 4 + k32));
      };
      warpgroup_keep(products);
      warpgroup_fence();
      warpgroup_mma<T::kType, T::kTokens>(products, mine[0], x(0), !begins);
      warpgroup_mma<T::kType, T::kTokens>(products, mine[1], x(2), true);
      warpgroup_commit();
      warpgroup_wait<T::kLefts - 1>();
      warpgroup_keep(left[(i + 1) % T::kLefts][0]);
      warpgroup_keep(left[(i + 1) % T::kLefts][1]);
      if (i == 0 && stage > 0) {
        __syncwarp();  // all lanes have read their weights
        if (lane == 0) barrier_arrive(shared.emptied(before));
      }
    }
    before = turn.stage;
    group_at -= T::kChunks, group_after -= T::kChunks, group_end -= T::kChunks;
  }
  fold();
}

// ---- Results ------------------------------------------------------------------------------------

// Adds up the sums of the teams in shared memory, the first one's first.
template <class T>
QK_DEVICE void put_sums(const typename T::Shared& shared, const float (&sums)[T::kTokens / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float* const to =
      shared.sums() + lane % 4 * 2 * shared.pitch + warp % shared.rows() * kLanes + lane / 4;
#pragma unroll 1
  for (int team = 0; team < shared.teams; ++team) {
    // All weights and rows of x that lay there have been read, or the team before is done.
    sync_some(1, T::kConsumers * kWarpgroup);
    if (warp / shared.rows() != team) continue;
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) {
      float& sum = to[(i / 4 * 8 + i % 2) * shared.pitch + i / 2 % 2 * 8];
      sum = team == 0 ? sums[i] : sum + sums[i];
    }
  }
  shared_fence();
  sync_some(1, T::kConsumers * kWarpgroup);
}

template <class T>
QK_DEVICE void store_share(const FloatKernelArgs& a, const WarpgroupPart& part,
                           const typename T::Shared& shared, int rank) {
  const int share = T::kTokens / a.slices, words = share * shared.pitch;
  const int outputs = shared.rows() * kLanes;
  const int column = static_cast<int>(threadIdx.x) % outputs;
  const int64_t output = part.row * kLanes + column;
  const float* const own = shared.sums() + rank * words;
  if (a.slices > 1) barrier_wait(shared.received(), 0);
  if (output >= a.n) return;
  const float bias = bias_at(a, output);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / outputs; i < share;
       i += T::kConsumers * kWarpgroup / outputs) {
    const int token = rank * share + i;
    if (token >= part.tokens) break;
    const int at = i * shared.pitch + column;
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
    const typename T::Shared shared(a.teams);
    const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
    const int share = T::kTokens / a.slices * shared.pitch;  // words
    if (thread == 0) {
      for (int i = 0; i < shared.stages; ++i) {
        barrier_init(shared.filled(i), kWarpgroup + T::kWarps);
        barrier_init(shared.emptied(i), T::kWarps);
      }
      barrier_init(shared.received(), 1);
      barrier_init_fence();
      if (a.slices > 1) barrier_expect(shared.received(), (a.slices - 1) * share * 4);
    }
    const typename T::Pairs pairs_of(shared_memory<uint8_t>(), a.levels);
    __syncthreads();
    const int tile = static_cast<int>(blockIdx.x) / a.slices;
    WarpgroupPart part;
    part.row = int64_t{tile / a.row_tiles} * shared.rows();
    part.token = int64_t{tile % a.row_tiles} * T::kTokens;
    part.tokens = static_cast<int>(min(a.rows - part.token, int64_t{T::kTokens}));
    const int first_step = rank * a.teams * a.slice_steps;
    part.each = a.slice_steps / T::kMatrices;
    part.begin = rank * a.teams * part.each;
    part.stages =
        max(0, min(a.slice_steps, a.steps - first_step) + T::kMatrices - 1) / T::kMatrices;
    if (thread < T::kConsumers * kWarpgroup) {
      take_registers<112>();
      {
        float sums[T::kTokens / 2];
        multiply_slice<T>(a, part, shared, pairs_of, sums);
        put_sums<T>(shared, sums);
      }
      if (a.slices > 1) cluster_sync();  // the others have read their stages, too
      if (thread < a.slices && thread != rank) {
        copy_to_block(shared.sums_from(rank - (rank > thread ? 1 : 0), share),
                      shared.sums() + thread * share, share * 4, shared.received(), thread);
      }
      store_share<T>(a, part, shared, rank);
    } else {
      give_registers<32>();
      copy_operands<T>(a, part, shared);
      if (a.slices > 1) cluster_sync();
    }
    // A block must not end while others copy from it.
    if (a.slices > 1) cluster_sync();
  }
}

template <Format kFormat, bool kAsymmetric, DType kType>
void launch_warpgroups(const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  const auto run = [&](auto tile) {
    using T = decltype(tile);
    const unsigned clusters =
        blocks_for(a.n, T::kWarps * kLanes / a.teams) * static_cast<unsigned>(a.row_tiles);
    const auto together = static_cast<unsigned>(a.slices);
    launch_with({.cluster = together}, float_warpgroups_kernel<T>, clusters * together, T::kThreads,
                T::bytes(a.teams), stream, a);
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
