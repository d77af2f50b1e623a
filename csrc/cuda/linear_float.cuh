// y = x . W with 16-bit x, by mma.m16n8k16: outputs are the 16 rows of a tensor core's tile and
// rows of x its 8 columns, so few rows waste little. linear_float_gemv.cuh has those up to eight.
//
// A thread block goes along k in steps of 64. Of x, scales and zero points it keeps kStages steps
// in a ring in shared memory, filled in the background; of the weight each warp, which has outputs
// of its own, keeps kDepth steps in registers, since no other warp wants them. Products of a group
// are summed up by the tensor cores; the group's scale is applied once, to the sums. See
// linear_float.h for the order of sums. A thread block does all slices, or (cuts > 1) one.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/fragments.cuh"
#include "cuda/linear_float.h"

namespace qkernels::cuda {

struct FloatKernelArgs {
  const uint16_t* x;  // [rows, ld]; zeros where the weight is padding
  int64_t ld, rows, n;
  const uint8_t* packed;
  int64_t row_bytes, scales, zeros;
  DType scale_type;
  bool asymmetric;
  int zero;                             // of all groups, when symmetric
  int chunks, group_chunks, group_end;  // of a row, of a group, to the end of the last group
  int steps, slices, slice_steps, cuts;
  int row_tiles;
  int teams;          // in a block, by warpgroups
  LevelBytes levels;  // of nf4
  float* sums;        // [cuts, rows, n], instead of y; or null
  const void* bias;
  DType bias_type;
  Epilogue epilogue;
  void* y;  // [rows, n], of x's type
};

template <Format kFormat_, DType kType_, int kBlocks_, int kTiles_, int kWarps_>
struct FloatTile {
  static constexpr Format kFormat = kFormat_;
  static constexpr DType kType = kType_;
  static constexpr int kBlocks = kBlocks_, kTiles = kTiles_;  // of a warp
  static constexpr int kTeamBlocks = kBlocks * kWarps_;
  static constexpr int kTeam = kWarp * kWarps_;  // threads
  static constexpr int kRows = 8 * kTiles;
  // The largest tile needs all registers, the others have two blocks on a multiprocessor.
  static constexpr int kMinBlocks = kTiles == 8 ? 1 : 2;

  static constexpr int kUnits = info(kFormat).bits == 8 ? 2 : 1;  // 16-byte loads in a step
  static constexpr int kStages = kTiles == 8 ? 3 : 4;
  // Steps of the largest tile are so long that one ahead is enough.
  static constexpr int kDepth = kTiles == 8 ? (kFormat == Format::int4 ? 2 : 1) : 4 / kUnits;
  static_assert(kTurn % kDepth == 0);

  // Of a step: x, then for each block two groups' scales and two groups' zero points.
  static constexpr int kScaleBytes = kLanes * 4;
  static constexpr int kBlockBytes = 2 * (kScaleBytes + kLanes);
  static constexpr int kStageBytes = kRows * 128 + kTeamBlocks * kBlockBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kBlocks * kTiles * 4 * 4;  // of a thread
  // On its way out a tile lies in shared memory, rows of x and outputs as in y. Words from a row to
  // the next: the lanes of a warp, 8 outputs of every second row, meet in no bank.
  static constexpr int kOutPitch = kTeamBlocks * kLanes + 4;
  static constexpr int kOutBytes = kRows * kOutPitch * 4;
};

// The chunk at which the group after the one that ends at `end` does; none after the last.
QK_DEVICE int next_end(const FloatKernelArgs& a, int end) {
  return end >= a.group_end ? INT32_MAX : min(end + a.group_chunks, a.group_end);
}

// Scale `lane` of 16, without a branch.
QK_DEVICE float scale_at(const uint8_t* scales, DType type, int lane) {
  const bool wide = type == DType::f32;
  const uint32_t word = reinterpret_cast<const uint32_t*>(scales)[wide ? lane : lane / 2];
  const uint16_t half = static_cast<uint16_t>(lane % 2 == 0 ? word : word >> 16);
  const float narrow = type == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
  return wide ? bit_cast<float>(word) : narrow;
}

QK_DEVICE float bias_at(const FloatKernelArgs& a, int64_t output) {
  return a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, output);
}

template <DType kType>
QK_DEVICE void finish(const FloatKernelArgs& a, int64_t row, int64_t output, float sum,
                      float bias) {
  store_element<kType>(a.y, row * a.n + output, apply_epilogue(sum + bias, a.epilogue));
}

template <class T>
__global__ void __launch_bounds__(T::kTeam, T::kMinBlocks)
    linear_float_kernel(const FloatKernelArgs a) {
  using C = Codes<T::kFormat, T::kType>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int member = static_cast<int>(threadIdx.x);

  const int row_tile = static_cast<int>(blockIdx.x) % a.row_tiles;
  const int64_t team_block =
      static_cast<int64_t>(static_cast<int>(blockIdx.x) / a.row_tiles) * T::kTeamBlocks;
  const int64_t last_block = (a.n + kLanes - 1) / kLanes - 1;
  const int64_t block = team_block + warp * T::kBlocks;
  const int64_t first_row = static_cast<int64_t>(row_tile) * T::kRows;
  const int rows = static_cast<int>(min(a.rows - first_row, static_cast<int64_t>(T::kRows)));

  const int cut = static_cast<int>(blockIdx.y);
  const int begin = cut * a.slice_steps;
  const int end = a.cuts == 1 ? a.steps : min(a.steps, begin + a.slice_steps);

  uint8_t* shared = shared_memory<uint8_t>();

  // ---- Into the ring ---- A row of a step is a line of eight 16-byte pieces. Odd rows have the
  // halves of their line swapped: the eight threads that read together want the same half of an
  // even and an odd row, and so meet in no bank.
  const int piece = member % 8;
  constexpr int kCopies = T::kRows * 8 / T::kTeam;
  const uint16_t* source[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = member / 8 + i * (T::kTeam / 8);
    source[i] = a.x + (first_row + min(row, rows - 1)) * a.ld + piece * 8;
  }
  const int copy_to = member / 8 * 128 + (piece ^ member / 8 % 2 * 4) * 16;
  // Four threads to a block fetch its scales and zero points, four lanes each.
  const int quarter = member % 4;
  const uint8_t* meta = a.packed + min(team_block + member / 4, last_block) * a.row_bytes;
  const int meta_to = T::kRows * 128 + member / 4 * T::kBlockBytes;

  const bool wide = a.scale_type == DType::f32;
  const int first_group = 2 * begin / a.group_chunks;
  const int scale_stride = wide ? kLanes * 4 : kLanes * 2;
  const uint8_t* scale_from = meta + a.scales + first_group * static_cast<int64_t>(scale_stride) +
                              quarter * (scale_stride / 4);
  const uint8_t* zero_from = meta + a.zeros + first_group * kLanes + quarter * 4;
  const int first_end = min((first_group + 1) * a.group_chunks, a.group_end);
  int fetched_end = first_end, fetched_slice = min(begin + a.slice_steps, end);
  const bool fetches = member < T::kTeamBlocks * 4;
  auto fill = [&](int step, int stage) {
    if (step < end) {
      uint8_t* to = shared + stage * T::kStageBytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        cp_async<16>(to + copy_to + i * (T::kTeam / 8) * 128,
                     source[i] + static_cast<int64_t>(step) * kStep);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint8_t* scale_to = to + meta_to + half * T::kScaleBytes + quarter * (scale_stride / 4);
        if (a.asymmetric && fetches) {
          cp_async<4>(to + meta_to + 2 * T::kScaleBytes + half * kLanes + quarter * 4, zero_from);
        }
        // A scale is for the end of a group, or for a slice's that is inside of one.
        const bool ends = 2 * step + half + 1 == fetched_end;
        const bool inside = half == 1 && step + 1 == fetched_slice && fetched_end != INT32_MAX;
        if (ends || inside) {
          if (fetches && wide) cp_async<16>(scale_to, scale_from);
          if (fetches && !wide) cp_async<8>(scale_to, scale_from);
        }
        if (ends) {
          scale_from += scale_stride;
          zero_from += kLanes;
          fetched_end = next_end(a, fetched_end);
        }
      }
      if (step + 1 == fetched_slice) fetched_slice = min(fetched_slice + a.slice_steps, end);
    }
    cp_async_commit();
  };

  // ---- Into registers ----
  const uint8_t* weight = a.packed + min(block, last_block) * a.row_bytes + lane * 16;
  const int blocks_left = static_cast<int>(min(last_block - block, int64_t{T::kBlocks}));
  uint4 words[T::kDepth][T::kBlocks][T::kUnits];
  auto load = [&](uint4(&w)[T::kBlocks][T::kUnits], int step, int half) {
    if (step >= end) return;
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
      if (T::kUnits == 2 && u != half) continue;
      const int unit = step * T::kUnits + u;
#pragma unroll
      for (int r = 0; r < T::kBlocks; ++r) {
        // An odd number of int8 chunks ends in the middle of a step.
        w[r][u] = T::kUnits == 1 || unit < a.chunks
                      ? load_stream_128(weight + min(r, max(blocks_left, 0)) * a.row_bytes +
                                        static_cast<int64_t>(unit) * kCudaUnit)
                      : make_uint4(0, 0, 0, 0);
      }
    }
  };

  // ---- Products ----
  float products[T::kBlocks][T::kTiles][4] = {}, sums[T::kBlocks][T::kTiles][4] = {};
  typename C::Zero zero[T::kBlocks][2];
#pragma unroll
  for (int r = 0; r < T::kBlocks; ++r) zero[r][0] = zero[r][1] = C::zero(a.zero);
  const int x_from = g * 128, x_swap = g % 2 * 4;
  const int my_meta = T::kRows * 128 + warp * T::kBlocks * T::kBlockBytes;

  auto fold = [&](const uint8_t* scales) {
#pragma unroll
    for (int r = 0; r < T::kBlocks; ++r) {
      const uint8_t* at = scales + r * T::kBlockBytes;
      const float scale[2] = {scale_at(at, a.scale_type, g), scale_at(at, a.scale_type, g + 8)};
#pragma unroll
      for (int j = 0; j < T::kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r][j][i] = std::fma(products[r][j][i], scale[i / 2], sums[r][j][i]);
          products[r][j][i] = 0.0f;
        }
      }
    }
  };

  // Half 0 or 1 of a step: a chunk of 32 k, which is two products of 16.
  auto operands = [&](uint32_t (&left)[T::kBlocks][2][4], const uint4(&w)[T::kBlocks][T::kUnits],
                      int half) {
#pragma unroll
    for (int r = 0; r < T::kBlocks; ++r) {
      const uint4 unit = half == 0 ? w[r][0] : w[r][T::kUnits - 1];
      uint32_t pairs[2][4];
      if constexpr (T::kUnits == 1) {
        const uint32_t low[1] = {half == 0 ? unit.x : unit.z};
        const uint32_t high[1] = {half == 0 ? unit.y : unit.w};
        C::pairs(pairs[0], low, zero[r][0], a.levels);
        C::pairs(pairs[1], high, zero[r][1], a.levels);
      } else {
        C::pairs(pairs[0], {unit.x, unit.y}, zero[r][0], a.levels);
        C::pairs(pairs[1], {unit.z, unit.w}, zero[r][1], a.levels);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) left[r][i / 4][i % 4] = pairs[i % 2][i / 2];
    }
  };
  auto multiply = [&](const uint8_t* stage, const uint32_t (&left)[T::kBlocks][2][4], int half) {
    const uint8_t* x = stage + x_from + ((half * 4 + t) ^ x_swap) * 16;
#pragma unroll
    for (int j = 0; j < T::kTiles; ++j) {
      const uint4 b = load_shared_128(x + j * 8 * 128);
#pragma unroll
      for (int r = 0; r < T::kBlocks; ++r) {
        mma_float<T::kType>(products[r][j], left[r][0], b.x, b.y);
      }
#pragma unroll
      for (int r = 0; r < T::kBlocks; ++r) {
        mma_float<T::kType>(products[r][j], left[r][1], b.z, b.w);
      }
    }
  };
  auto zero_points = [&](const uint8_t* zeros) {
    if (!a.asymmetric) return;
#pragma unroll
    for (int r = 0; r < T::kBlocks; ++r) {
      for (int i = 0; i < 2; ++i) {
        const uint8_t* const from = zeros + r * T::kBlockBytes;
        zero[r][i] = C::zero(load_zero_point(from, T::kFormat, g + 8 * i));
      }
    }
  };

  // Sums of the slices before this one wait in shared memory, a column for each thread.
  float* parked = reinterpret_cast<float*>(shared + T::kRingBytes) + threadIdx.x;
  auto end_slice = [&](bool first, bool last) {
#pragma unroll
    for (int i = 0; i < T::kBlocks * T::kTiles * 4; ++i) {
      float& sum = sums[i / (T::kTiles * 4)][i / 4 % T::kTiles][i % 4];
      if (!first) sum = parked[i * T::kTeam] + sum;
      if (last) continue;
      parked[i * T::kTeam] = sum;
      sum = 0.0f;
    }
  };

#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) fill(begin + i, i);
#pragma unroll
  for (int d = 0; d < T::kDepth; ++d) {
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) load(words[d], begin + d, u);
  }
  int stage = 0, freed = T::kStages - 1;
  int group_end = first_end;  // chunks
  for (int first = begin; first < end; first += a.slice_steps) {
    const int last = min(first + a.slice_steps, end);
    const uint8_t* scales = nullptr;
    for (int base = first; base < last; base += T::kDepth) {
#pragma unroll
      for (int d = 0; d < T::kDepth; ++d) {
        const int step = base + d;
        if (step >= last) break;
        cp_async_wait<T::kStages - 2>();
        // What others copied is here, and what was read in the last step may be written.
        __syncthreads();
        fill(step + T::kStages - 1, freed);
        const uint8_t* at = shared + stage * T::kStageBytes;
#pragma unroll(T::kTiles == 8 ? 1 : 2)
        for (int half = 0; half < 2; ++half) {
          scales = at + my_meta + half * T::kScaleBytes;
          zero_points(at + my_meta + 2 * T::kScaleBytes + half * kLanes);
          uint32_t left[T::kBlocks][2][4];
          operands(left, words[d], half);
          if (T::kUnits == 2 || half == 1) load(words[d], step + T::kDepth, half);
          multiply(at, left, half);
          if (2 * step + half + 1 == group_end) {
            fold(scales);
            group_end = next_end(a, group_end);
          }
        }
        freed = stage;
        stage = stage + 1 == T::kStages ? 0 : stage + 1;
      }
    }
    // A slice that ends inside of a group.
    if (2 * last < a.group_end && 2 * last % a.group_chunks != 0) fold(scales);
    if (first > begin || last < end) end_slice(first == begin, last == end);
  }
  cp_async_wait<0>();

  // ---- Out ----
  // By shared memory, so that what makes y of a sum is there once. Unrolled for the sums of a
  // thread it was most of the machine code, and took longer to fetch than to run.
  static_assert(T::kTeam == T::kTeamBlocks * kLanes);
  float* tile = shared_memory<float>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < T::kBlocks * T::kTiles * 4; ++i) {
    const int r = i / (T::kTiles * 4), j = i / 4 % T::kTiles;
    const int column = (warp * T::kBlocks + r) * kLanes + g + i % 4 / 2 * 8;
    tile[(j * 8 + t * 2 + i % 2) * T::kOutPitch + column] = sums[r][j][i % 4];
  }
  __syncthreads();
  const int64_t output = team_block * kLanes + threadIdx.x;
  if (output >= a.n) return;
  const float* from = tile + threadIdx.x;
  if (a.sums != nullptr) {
    float* to = a.sums + (cut * a.rows + first_row) * a.n + output;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) to[row * a.n] = from[row * T::kOutPitch];
    return;
  }
  const float bias = bias_at(a, output);
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    finish<T::kType>(a, first_row + row, output, from[row * T::kOutPitch], bias);
  }
}

template <class T>
void launch_tile(const FloatKernelArgs& a, Stream stream) {
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  const int64_t columns = (blocks + T::kTeamBlocks - 1) / T::kTeamBlocks;
  int64_t bytes = T::kRingBytes;
  if (a.cuts == 1 && a.slices > 1) bytes += T::kTeam * T::kSumBytes;
  bytes = max(bytes, static_cast<int64_t>(T::kOutBytes));
  const dim3 grid(static_cast<unsigned>(columns * a.row_tiles), static_cast<unsigned>(a.cuts));
  launch(linear_float_kernel<T>, grid, T::kTeam, bytes, stream, a);
}

template <Format kFormat, DType kType>
void launch_gemv(const FloatPlan& plan, const FloatKernelArgs& a, Stream stream);

template <Format kFormat, DType kType>
void launch_plan(const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  if (plan.gemv) {
    launch_gemv<kFormat, kType>(plan, a, stream);
  } else if (plan.tiles == 2) {
    launch_tile<FloatTile<kFormat, kType, 2, 2, 4>>(a, stream);
  } else if (plan.tiles == 4) {
    launch_tile<FloatTile<kFormat, kType, 2, 4, 4>>(a, stream);
  } else {
    launch_tile<FloatTile<kFormat, kType, 2, 8, 8>>(a, stream);
  }
}

// One source file for each type of x, to be compiled beside each other.
template <DType kType>
void launch_format(Format format, const FloatPlan& plan, const FloatKernelArgs& a, Stream stream) {
  if (format == Format::int8) return launch_plan<Format::int8, kType>(plan, a, stream);
  if (format == Format::int4) return launch_plan<Format::int4, kType>(plan, a, stream);
  launch_plan<Format::nf4, kType>(plan, a, stream);
}

void linear_bf16(Format format, const FloatPlan& plan, const FloatKernelArgs& a, Stream stream);
void linear_f16(Format format, const FloatPlan& plan, const FloatKernelArgs& a, Stream stream);

}  // namespace qkernels::cuda
