// Groups that choose their own scale, one pass over memory: a group's elements stay in registers
// while its scale is chosen. What is done with them is a Job's:
//
//   static constexpr DType kType;  of x
//   args  with x, cols, groups, group_size and symmetric
//   Affine settle(const Range&, int64_t row, int64_t group, bool writes)
//   void put(int64_t row, int64_t begin, const float (&x)[kCount], const Affine&), for a kCount of
//     8 and 16
//
// Groups that are ragged or too long for registers take two passes, of which the second finds most
// of x in the L2 cache: `choose_scales`, and then the kernel for scales that are given.
#pragma once

#include "cuda/elements.cuh"

namespace qkernels::cuda {

// ---- Ranges -------------------------------------------------------------------------------------

QK_DEVICE void join(Range* range, const Range& other, bool symmetric) {
  range->magnitude = max(range->magnitude, other.magnitude);
  if (symmetric) return;
  range->min = other.min < range->min ? other.min : range->min;
  range->max = other.max > range->max ? other.max : range->max;
}

// A symmetric scale needs the magnitude alone.
template <int kCount>
QK_DEVICE void extend(Range* range, const float (&x)[kCount], bool symmetric) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (symmetric) {
      range->magnitude = max(range->magnitude, bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    } else {
      qkernels::extend(range, x[i]);
    }
  }
}

// Of `width` neighbouring lanes, a power of two. The whole warp takes part.
QK_DEVICE Range reduce(Range range, int width, bool symmetric) {
  for (int mask = width / 2; mask > 0; mask /= 2) {
    Range other;
    other.magnitude = shuffle_xor(range.magnitude, mask);
    if (!symmetric) {
      other.min = shuffle_xor(range.min, mask);
      other.max = shuffle_xor(range.max, mask);
    }
    join(&range, other, symmetric);
  }
  return range;
}

// Row, number in the row and extent of the `index`-th group of a tensor.
struct Group {
  int64_t row, number, begin, end;
};
template <class Args>
QK_DEVICE Group group_at(const Args& a, int64_t index) {
  Group g{index, 0, 0, 0};
  if (a.groups != 1) {
    g.row = divide(index, a.groups);
    g.number = index - g.row * a.groups;
  }
  g.begin = g.number * a.group_size;
  g.end = min(g.begin + a.group_size, a.cols);
  return g;
}

// ---- Short groups -------------------------------------------------------------------------------

inline constexpr int kShortThreads = 256;
inline constexpr int64_t kShortGroup = kWarp * kEight;

// 2^log_width threads, up to a warp, take a group, and each of them kCount elements: 16 where rows
// and groups consist of sixteens, because what a thread does once for its group is as much work as
// encoding eight. Job::kResident blocks shall fit an SM; 0 leaves that to the compiler.
template <class Job, int kCount>
__global__ void __launch_bounds__(kShortThreads, Job::kResident)
    short_groups_kernel(const Job job, int64_t total, int log_width) {
  const auto& a = job.args;
  const int width = 1 << log_width, thread = static_cast<int>(threadIdx.x);
  const int part = thread & (width - 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kShortThreads >> log_width);
  const int64_t index = first + (thread >> log_width);
  const Group group = group_at(a, min(index, total - 1));
  const int64_t at = group.begin + part * kCount;
  const bool mine = index < total && at < group.end;
  Eight<Job::kType> held[kCount / kEight];
  float x[kCount];
#pragma unroll
  for (int i = 0; i < kCount / kEight; ++i) {
    if (mine) {
      held[i].load(a.x, group.row * a.cols + at + i * kEight);
    } else {
      held[i].clear();
    }
  }
#pragma unroll
  for (int i = 0; i < kCount / kEight; ++i) {
    float eight[kEight];
    held[i].widen(eight);
#pragma unroll
    for (int j = 0; j < kEight; ++j) x[i * kEight + j] = eight[j];
  }
  Range range;
  extend(&range, x, a.symmetric);
  range = reduce(range, width, a.symmetric);
  if (!mine) return;
  const Affine affine = job.settle(range, group.row, group.number, part == 0);
  job.put(group.row, at, x, affine);
}

template <class Job, int kCount>
void launch_short_groups(const Job& job, int64_t total, Stream stream) {
  int log_width = 0;
  while (int64_t{kCount} << log_width < job.args.group_size) ++log_width;
  const dim3 grid(blocks_for(total, kShortThreads >> log_width));
  launch(short_groups_kernel<Job, kCount>, grid, kShortThreads, 0, stream, job, total, log_width);
}

// ---- Long groups --------------------------------------------------------------------------------

inline constexpr int kLongThreads = 512;

// Eights that a thread keeps: 32 registers.
QK_HD constexpr int held_eights(DType type) { return type == DType::f32 ? 4 : 8; }

// A block takes a group. Its shared memory holds a Range for each warp.
template <class Job>
__global__ void __launch_bounds__(kLongThreads, 1) long_groups_kernel(const Job job) {
  constexpr DType kType = Job::kType;
  constexpr int kHeld = held_eights(kType);
  const auto& a = job.args;
  const Group group = group_at(a, blockIdx.x);
  const int64_t start = group.row * a.cols + group.begin;
  // Offsets in the group are small: 32 bits save registers.
  const int length = static_cast<int>(group.end - group.begin);
  const int stride = static_cast<int>(blockDim.x) * kEight;
  const int first = static_cast<int>(threadIdx.x) * kEight;
  Eight<kType> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * stride < length) {
      held[i].load(a.x, start + first + i * stride);
    } else {
      held[i].clear();
    }
  }
  Range range;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float x[kEight];
    held[i].widen(x);
    extend(&range, x, a.symmetric);
  }
  range = reduce(range, kWarp, a.symmetric);
  Range* ranges = shared_memory<Range>();
  if (threadIdx.x % kWarp == 0) ranges[threadIdx.x / kWarp] = range;
  __syncthreads();
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) join(&range, ranges[i], a.symmetric);
  const Affine affine = job.settle(range, group.row, group.number, threadIdx.x == 0);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * stride < length) {
      float x[kEight];
      held[i].widen(x);
      job.put(group.row, group.begin + first + i * stride, x, affine);
    }
  }
}

// ---- How a tensor's groups are taken ------------------------------------------------------------

// Groups that divide the row are rows of their own, which saves a division. `bits` of a code, if
// codes are written: such rows have to begin on a byte.
template <class Args>
void split_groups(Args* a, int64_t* rows, int bits) {
  if (a->groups <= 1 || a->cols % a->group_size != 0 || a->group_size * bits % 8 != 0) return;
  *rows *= a->groups;
  a->cols = a->group_size;
  a->groups = 1;
}

// Whether groups can be kept in registers, x and what is written being `type` and on vectors.
template <class Args>
bool one_pass(const Args& a, DType type, const void* written) {
  const int64_t longest = int64_t{kLongThreads} * held_eights(type) * kEight;
  return !a.shared_scale && a.group_size > 0 && a.group_size <= longest &&
         a.group_size % kEight == 0 && vectors_fit(a.x, a) && vectors_fit(written, a);
}

template <class Job>
void launch_groups(const Job& job, int64_t rows, Stream stream) {
  const auto& a = job.args;
  const int64_t total = rows * a.groups;
  if (total == 0) return;
  if (a.group_size <= kShortGroup) {
    const bool sixteens = a.group_size % 16 == 0 && a.cols % 16 == 0;
    if (sixteens) return launch_short_groups<Job, 16>(job, total, stream);
    launch_short_groups<Job, kEight>(job, total, stream);
  } else {
    const unsigned warps =
        blocks_for(a.group_size, int64_t{held_eights(Job::kType)} * kEight * kWarp);
    launch(long_groups_kernel<Job>, dim3(static_cast<unsigned>(total)), warps * kWarp,
           warps * static_cast<int64_t>(sizeof(Range)), stream, job);
  }
}

// ---- Scales alone -------------------------------------------------------------------------------

// What `choose_scales` reads and writes. A scale for the whole tensor is one group of one row.
struct ScalesArgs {
  const void* x;
  DType x_type;
  int64_t rows, cols, groups, group_size;
  Format format;
  bool symmetric;
  void* scale;
  DType scale_type;
  void* zero_point;  // null when symmetric
};
template <class Args>
ScalesArgs scales_args(const Args& a, int64_t rows, DType x_type) {
  ScalesArgs s{};
  s.x = a.x;
  s.x_type = x_type;
  s.rows = a.shared_scale ? 1 : rows;
  s.cols = a.shared_scale ? rows * a.cols : a.cols;
  s.groups = a.groups;
  s.group_size = a.shared_scale ? s.cols : a.group_size;
  s.format = a.format;
  s.symmetric = a.symmetric;
  s.scale_type = a.scale_type;
  return s;
}

int64_t scales_workspace(const ScalesArgs& args);  // in bytes
void choose_scales(const ScalesArgs& args, void* workspace, Stream stream);

}  // namespace qkernels::cuda
