// Scales of groups of any length and alignment: ranges of parts of groups, and then scales.
#include "cuda/dispatch.cuh"
#include "cuda/groups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarp;

// A part is worth a warp from so many elements on. With so many parts each lane of the warp that
// joins them reads 32, and an H100 has 8 warps on every multiprocessor.
constexpr int64_t kPart = 2048, kMostParts = 1024;

int64_t parts_of(const ScalesArgs& a) {
  const int64_t parts = (a.group_size + kPart - 1) / kPart;
  return parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
}

// A warp takes a part of a group.
template <DType kType>
__global__ void __launch_bounds__(kThreads)
    ranges_kernel(const ScalesArgs a, int64_t parts, int64_t total, Range* ranges) {
  const int64_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (warp >= total) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = divide(warp, parts), part = warp - index * parts;
  const Group group = group_at(a, index);
  // Whole eights, so that parts start on vectors if the group does.
  const int64_t each = round_up((group.end - group.begin + parts - 1) / parts, kEight);
  const int64_t row = group.row * a.cols;
  int64_t at = row + group.begin + part * each;
  const int64_t end = min(at + each, row + group.end);
  Range range;
  const void* from = static_cast<const uint8_t*>(a.x) + at * bytes_of(kType);
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    int64_t i = at + lane * kEight;
#pragma unroll 4
    for (; i + kEight <= end; i += kWarp * kEight) {
      float x[kEight];
      load_eight<kType>(x, a.x, i);
      extend(&range, x, false);
    }
    if (at < end) at += (end - at) / kEight * kEight;
  }
  for (at += lane; at < end; at += kWarp) {
    qkernels::extend(&range, load_element<kType>(a.x, at));
  }
  range = reduce(range, kWarp, false);
  if (lane == 0) ranges[warp] = range;
}

// A warp joins the parts of a group.
__global__ void __launch_bounds__(kThreads)
    scales_kernel(const ScalesArgs a, int64_t parts, int64_t total, const Range* ranges) {
  const int64_t index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (index >= total) return;
  const int lane = threadIdx.x % kWarp;
  Range range;
  for (int64_t i = lane; i < parts; i += kWarp) join(&range, ranges[index * parts + i], false);
  range = reduce(range, kWarp, false);
  if (lane != 0) return;
  const Affine affine = choose_affine(range, a.format, a.symmetric, a.scale_type);
  store_float(a.scale, a.scale_type, index, affine.scale);
  if (!a.symmetric) store_zero_point(a.zero_point, a.format, index, affine.zero_point);
}

}  // namespace

int64_t scales_workspace(const ScalesArgs& a) {
  return a.rows * a.groups * parts_of(a) * static_cast<int64_t>(sizeof(Range));
}

void choose_scales(const ScalesArgs& a, void* workspace, Stream stream) {
  const int64_t total = a.rows * a.groups, parts = parts_of(a);
  Range* ranges = static_cast<Range*>(workspace);
  for_float(a.x_type, [&](auto type) {
    launch(ranges_kernel<decltype(type)::value>, dim3(blocks_for(total * parts, kWarps)), kThreads,
           0, stream, a, parts, total * parts, ranges);
  });
  launch(scales_kernel, dim3(blocks_for(total, kWarps)), kThreads, 0, stream, a, parts, total,
         ranges);
}

}  // namespace qkernels::cuda
