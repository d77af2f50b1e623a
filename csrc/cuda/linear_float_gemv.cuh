// y = x . W for up to eight rows of 16-bit x, where reading the weight is all the work. A warp has
// outputs and a slice of k of its own and waits for no other: weights go from memory to registers
// kDepth steps of 64 k ahead, x from the cache two steps ahead, and the scales of a few groups to
// come lie in a ring in shared memory. Sums are those of linear_float.cuh to the bit: the same
// products in the same order.
#pragma once

#include "cuda/linear_float.cuh"

namespace qkernels::cuda {

template <Format kFormat_, DType kType_, int kBlocks_>
struct Gemv {
  static constexpr Format kFormat = kFormat_;
  static constexpr DType kType = kType_;
  static constexpr int kBlocks = kBlocks_;  // of 16 outputs, of a warp
  // A thread block has a warp for each slice, and less where it has many outputs.
  static constexpr int kMaxThreads = (kBlocks == 4 ? 4 : kMostSlices) * kWarp;
  static constexpr int kUnits = info(kFormat).bits == 8 ? 2 : 1;  // 16-byte loads in a step
  static constexpr int kDepth = 4 / kUnits;
  static_assert(kTurn % kDepth == 0 && kDepth % 2 == 0);

  // Groups in the ring; of each, for each block, scales and zero points.
  static constexpr int kRing = 8;
  static constexpr int kScaleBytes = kLanes * 4, kBlockBytes = kScaleBytes + kLanes;
  static constexpr int kGroupBytes = kBlocks * kBlockBytes, kRingBytes = kRing * kGroupBytes;
  static constexpr int kSums = kBlocks * 4 * kWarp;  // of a warp
  static_assert(kSums * 4 <= kRingBytes);
  using Pairs = CodePairs<kFormat, kType>;
};

template <class T>
__global__ void __launch_bounds__(T::kMaxThreads, 2) gemv_kernel(const FloatKernelArgs a) {
  using C = Codes<T::kFormat, T::kType>;
  constexpr int kBlocks = T::kBlocks, kUnits = T::kUnits, kDepth = T::kDepth;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t last_block = (a.n + kLanes - 1) / kLanes - 1;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kBlocks;
  const int rows = static_cast<int>(a.rows);
  const int begin = warp * a.slice_steps, end = min(a.steps, begin + a.slice_steps);

  uint8_t* const shared = shared_memory<uint8_t>();
  uint8_t* const ring = shared + T::Pairs::kTableBytes + warp * T::kRingBytes;

  // ---- Scales and zero points ----
  const int first_group = 2 * begin / a.group_chunks;
  const int last_group = max(a.group_end - 1, 0) / a.group_chunks;
  const bool wide = a.scale_type == DType::f32;
  // Eight lanes to a block, each with 16 bytes: four or two have scales and one has zero points.
  const int piece = lane % 8;
  const bool copies =
      lane < kBlocks * 8 && (piece < (wide ? 4 : 2) || (piece == 4 && a.asymmetric));
  const int copy_step = piece == 4 ? kLanes : wide ? kLanes * 4 : kLanes * 2;  // to the next group
  const uint8_t* copy_from = a.packed + min(block + lane / 8, last_block) * a.row_bytes +
                             (piece == 4 ? a.zeros : a.scales + piece * 16) +
                             static_cast<int64_t>(first_group) * copy_step;
  int copies_left = last_group - first_group;
  auto fetch = [&](uint8_t* to) {
    if (copies) cp_async<16>(to + lane / 8 * T::kBlockBytes + piece * 16, copy_from);
    cp_async_commit();
    // The last group again and again, so that a copy is always there to be waited for.
    if (copies_left-- > 0) copy_from += copy_step;
  };

  // ---- Weights and x ----
  const uint8_t* weights[kBlocks];  // at the turn's first step
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
    weights[r] = a.packed + min(block + r, last_block) * a.row_bytes + lane * 16 +
                 static_cast<int64_t>(begin) * kUnits * kCudaUnit;
  }
  // Columns without a row of x read the last row's; the results go nowhere.
  const uint16_t* x_from = a.x + min(g, rows - 1) * a.ld + begin * kStep + t * 8;
  uint4 words[kDepth][kBlocks][kUnits], x[2][2];
  // The part of step `turn + ahead` that is in unit u, or half of x.
  auto load_weights = [&](int turn, int ahead, int u) {
    const int step = turn + ahead;
    if (step >= end) return;
    auto& w = words[ahead % kDepth];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      // An odd number of int8 chunks ends in the middle of a step.
      w[r][u] = kUnits == 1 || step * kUnits + u < a.chunks
                    ? load_stream_128(weights[r] + (ahead * kUnits + u) * kCudaUnit)
                    : make_uint4(0, 0, 0, 0);
    }
  };
  auto load_x = [&](int turn, int ahead, int half) {
    if (turn + ahead >= end) return;
    x[ahead % 2][half] = load_128(x_from + ahead * kStep + half * kCudaChunk);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) load_weights(begin, d, u);
  }
#pragma unroll 1
  for (int i = 0; i < T::kRing - 1; ++i) fetch(ring + i * T::kGroupBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) load_x(begin, i / 2, i % 2);

  typename T::Pairs pairs_of(shared, a.levels);  // the block waits for each other here at most

  // ---- Products ----
  float products[kBlocks][4] = {}, sums[kBlocks][4] = {}, scales[kBlocks][2];
  typename C::Zero zeros[kBlocks][2];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) zeros[r][0] = zeros[r][1] = C::zero(a.zero);
  // The places of the open group and of the one before it. A word has one or two scales; of those
  // in bfloat16, and in float, this selects what is to be the float.
  uint8_t *open = ring, *closed = ring + (T::kRing - 1) * T::kGroupBytes;
  const uint32_t select = wide ? 0x3210 : g % 2 == 0 ? 0x1044 : 0x3244;
  const int word = (wide ? g : g / 2) * 4, eight_words = wide ? 32 : 16;
  auto open_group = [&] {
    cp_async_wait<T::kRing - 2>();
    __syncwarp();  // what others copied is here, and what they read of the group before is free
    const uint8_t* from = open + word;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t found = load_shared_32(from + r * T::kBlockBytes + i * eight_words);
        const uint32_t bits = prmt(found, 0, select);
        scales[r][i] = a.scale_type == DType::f16 ? f16_to_float(static_cast<uint16_t>(bits >> 16))
                                                  : bit_cast<float>(bits);
      }
    }
    if (T::kFormat != Format::nf4 && a.asymmetric) {
      __syncwarp();  // a branch: without it, instructions for nothing
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint8_t* const from = open + r * T::kBlockBytes + T::kScaleBytes;
          zeros[r][i] = C::zero(load_zero_point(from, T::kFormat, g + 8 * i));
        }
      }
    }
    fetch(closed);
    closed = open;
    open = open == ring + (T::kRing - 1) * T::kGroupBytes ? ring : open + T::kGroupBytes;
  };
  auto fold = [&] {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[r][i] = std::fma(products[r][i], scales[r][i / 2], sums[r][i]);
        products[r][i] = 0.0f;
      }
    }
  };

  int group_end = min((first_group + 1) * a.group_chunks, a.group_end);  // chunks
  if (begin < end) open_group();
  for (int turn = begin; turn < end; turn += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int step = turn + d;
      if (step >= end) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[kBlocks][2][4];
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const uint4 unit = words[d][r][kUnits == 2 ? half : 0];
          uint32_t pairs[2][4];  // of outputs g and g + 8
          if constexpr (kUnits == 2) {
            pairs_of(pairs[0], {unit.x, unit.y}, zeros[r][0]);
            pairs_of(pairs[1], {unit.z, unit.w}, zeros[r][1]);
          } else {
            const uint32_t low[1] = {half == 0 ? unit.x : unit.z};
            const uint32_t high[1] = {half == 0 ? unit.y : unit.w};
            pairs_of(pairs[0], low, zeros[r][0]);
            pairs_of(pairs[1], high, zeros[r][1]);
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) left[r][i / 4][i % 4] = pairs[i % 2][i / 2];
        }
        if (kUnits == 2) load_weights(turn, d + kDepth, half);
        if (kUnits == 1 && half == 1) load_weights(turn, d + kDepth, 0);
        const uint4 b = x[d % 2][half];
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) mma_float<T::kType>(products[r], left[r][0], b.x, b.y);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) mma_float<T::kType>(products[r], left[r][1], b.z, b.w);
        load_x(turn, d + 2, half);
        if (2 * step + half + 1 == group_end) {
          fold();
          group_end = next_end(a, group_end);
          open_group();
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) weights[r] += kDepth * kUnits * kCudaUnit;
    x_from += kDepth * kStep;
  }
  // A slice that ends inside of a group.
  if (2 * end < a.group_end && 2 * end % a.group_chunks != 0) fold();
  cp_async_wait<0>();

  // ---- Out: the slices in order ----
  float* const slices = shared_memory<float>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBlocks * 4; ++i) {
    slices[warp * T::kSums + i * kWarp + lane] = sums[i / 4][i % 4];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < T::kSums; i += static_cast<int>(blockDim.x)) {
    const int row = t * 2 + i / kWarp % 2;
    const int64_t output = (block + i / (4 * kWarp)) * kLanes + g + i / kWarp % 4 / 2 * 8;
    if (row >= rows || output >= a.n) continue;
    float sum = slices[i];
    for (int slice = 1; slice < a.slices; ++slice) sum = sum + slices[slice * T::kSums + i];
    if (a.sums != nullptr) {
      a.sums[row * a.n + output] = sum;
    } else {
      finish<T::kType>(a, row, output, sum, bias_at(a, output));
    }
  }
}

template <class T>
void launch_gemv(const FloatKernelArgs& a, Stream stream) {
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  const unsigned warps = static_cast<unsigned>(a.slices);
  launch(gemv_kernel<T>, blocks_for(blocks, T::kBlocks), warps * kWarp,
         T::Pairs::kTableBytes + warps * T::kRingBytes, stream, a);
}

template <Format kFormat, DType kType>
void launch_gemv(const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  plan.blocks == 4   ? launch_gemv<Gemv<kFormat, kType, 4>>(a, stream)
  : plan.blocks == 2 ? launch_gemv<Gemv<kFormat, kType, 2>>(a, stream)
                     : launch_gemv<Gemv<kFormat, kType, 1>>(a, stream);
}

}  // namespace qkernels::cuda
