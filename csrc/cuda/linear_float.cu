// linear with float activations: what goes before and behind the product, and the launches.
#include "cuda/dispatch.cuh"
#include "cuda/linear_float_warpgroups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

// Element k of a row of x as the weight sees it. An index that is none gives NaN: no one looked.
template <DType kType>
QK_DEVICE float gathered(const LinearArgs& a, int64_t row, int64_t k) {
  const int64_t from = a.perm == nullptr ? k : a.perm[k];
  if (from < 0 || from >= a.shape.k) return NAN;
  const float x = load_element<kType>(a.x, row * a.shape.k + from);
  return a.premul == nullptr ? x : x * a.premul[from];
}

// Cuts the lowest 16 bits off; NaN stays NaN.
QK_DEVICE float first_bf16(float x) {
  return x != x ? x : bit_cast<float>(bit_cast<uint32_t>(x) & 0xffff0000u);
}

// The panel: [parts * rows, ld] of 16 bits, groups padded with zeros.
template <DType kType>
__global__ void __launch_bounds__(kThreads)
    panel_kernel(const LinearArgs a, int64_t ld, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t row = at / ld, padded = at % ld;
  const int64_t group = a.shape.group_padded == 0 ? 0 : padded / a.shape.group_padded;
  const int64_t within = padded - a.shape.padded_begin(group);
  const bool real = group < a.shape.groups && within < a.shape.group_length(group);
  const float x = real ? gathered<kType>(a, row, a.shape.group_begin(group) + within) : 0.0f;
  uint16_t* panel = reinterpret_cast<uint16_t*>(a.panel);
  if constexpr (kType != DType::f32) {
    store_element<kType>(panel, at, x);
  } else {
    // Three times eight bits are all that x has, so the last difference is a bfloat16.
    const float high = first_bf16(x), rest = std::fabs(x) < INFINITY ? x - high : 0.0f;
    const float middle = first_bf16(rest);
    store_element<DType::bf16>(panel, at, high);
    store_element<DType::bf16>(panel, at + count, middle);
    store_element<DType::bf16>(panel, at + 2 * count, rest - middle);
  }
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) gather_kernel(const LinearArgs a, void* to) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.rows * a.shape.k) return;
  const int64_t row = at / a.shape.k;
  store_element<kType>(to, at, gathered<kType>(a, row, at - row * a.shape.k));
}

// y of the sums [levels, cuts, parts, rows, n]: cuts in order, the largest parts last.
template <DType kType>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const LinearArgs a, const float* sums, int levels, int cuts, int parts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = a.rows * a.n;
  if (at >= count) return;
  float total = 0.0f;
  for (int i = levels * parts - 1; i >= 0; --i) {
    const float* from = sums + (i / parts * cuts * parts + i % parts) * count + at;
    float sum = *from;
    for (int cut = 1; cut < cuts; ++cut) sum = sum + from[cut * parts * count];
    total = i + 1 == levels * parts ? sum : total + sum;
  }
  const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, at % a.n);
  store_element<kType>(a.y, at, apply_epilogue(total + bias, a.epilogue));
}

// All rows of `a` at once.
void linear_rows(const LinearArgs& a, float* sums, Stream stream) {
  const FloatPlan plan = float_plan(a, has_sm90a());
  const BlockShape& s = a.shape;
  FloatKernelArgs k{};
  k.rows = a.rows * plan.parts;
  k.n = a.n;
  k.x = static_cast<const uint16_t*>(a.x);
  k.ld = s.k;
  if (plan.panel) {
    k.x = reinterpret_cast<const uint16_t*>(a.panel);
    k.ld = round_up(s.k_padded, kStep);
    const int64_t count = a.rows * k.ld;
    for_float(a.x_type, [&](auto type) {
      launch(panel_kernel<decltype(type)::value>, blocks_for(count, kThreads), kThreads, 0, stream,
             a, k.ld, count);
    });
  }
  k.packed = a.packed;
  k.row_bytes = s.bytes;
  k.scales = s.scales;
  k.zeros = s.zeros;
  k.scale_type = a.layout.scale;
  k.asymmetric = !a.layout.symmetric;
  k.zero = symmetric_zero(a.layout.format);
  k.chunks = static_cast<int>(s.k_padded / kCudaChunk);
  k.group_chunks = static_cast<int>(max(s.group_padded / kCudaChunk, int64_t{1}));
  if (s.groups > 0) {
    k.group_end = static_cast<int>((s.padded_begin(s.groups - 1) + s.padded_length(s.groups - 1)) /
                                   kCudaChunk);
  }
  k.steps = (k.chunks + 1) / 2;
  k.slices = static_cast<int>(plan.slices.count);
  k.slice_steps = static_cast<int>(plan.slices.steps);
  k.cuts = static_cast<int>(plan.cuts);
  k.row_tiles = static_cast<int>((k.rows + 8 * plan.tiles - 1) / (8 * plan.tiles));
  k.teams = plan.teams;
  k.bias = a.bias;
  k.bias_type = a.bias_type;
  k.epilogue = a.epilogue;
  k.y = a.y;
  for (int part = 0; part < plan.levels; ++part) {
    if (plan.partial()) k.sums = sums + part * plan.cuts * k.rows * k.n;
    if (a.x_type == DType::f16) {
      k.levels = level_bytes<DType::f16>(part);
      (plan.warpgroups ? linear_warpgroups_f16 : linear_f16)(a.layout.format, plan, k, stream);
    } else {
      k.levels = level_bytes<DType::bf16>(part);
      (plan.warpgroups ? linear_warpgroups_bf16 : linear_bf16)(a.layout.format, plan, k, stream);
    }
  }
  if (!plan.partial()) return;
  for_float(a.x_type, [&](auto type) {
    launch(add_kernel<decltype(type)::value>, blocks_for(a.rows * a.n, kThreads), kThreads, 0,
           stream, a, sums, static_cast<int>(plan.levels), k.cuts, static_cast<int>(plan.parts));
  });
}

}  // namespace

void gather_rows(const LinearArgs& a, void* to, Stream stream) {
  for_float(a.x_type, [&](auto type) {
    launch(gather_kernel<decltype(type)::value>, blocks_for(a.rows * a.shape.k, kThreads), kThreads,
           0, stream, a, to);
  });
}

void linear_float(const LinearArgs& whole, float* sums, Stream stream) {
  const int64_t turn = float_plan(whole, has_sm90a()).rows;
  LinearArgs a = whole;
  for (int64_t begin = 0; begin < whole.rows; begin += turn) {
    a.x = static_cast<const uint8_t*>(whole.x) + begin * whole.shape.k * bytes_of(whole.x_type);
    a.y = static_cast<uint8_t*>(whole.y) + begin * whole.n * bytes_of(whole.y_type);
    a.rows = min(turn, whole.rows - begin);
    linear_rows(a, sums, stream);
  }
}

}  // namespace qkernels::cuda
