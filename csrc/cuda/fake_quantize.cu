// fake_quantize, with scales that it chooses or is given, and the gradients of the latter.
#include "cuda/dispatch.cuh"
#include "cuda/groups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

// fake() of core/codec.h, without a branch: many of them cost a stack.
template <Format kFormat>
QK_DEVICE float fake_element(float x, const Affine& affine, bool symmetric) {
  const int code = encode_element<kFormat>(x, affine, symmetric);
  const float y = decode(code, kFormat, affine.scale, affine.zero_point);
  return std::fabs(x) < INFINITY ? y : NAN;
}

template <Format kFormat, DType kElement>
struct FakeJob {
  static constexpr DType kType = kElement;
  static constexpr int kResident = kFormat == Format::nf4 ? 4 : 0;
  FakeQuantizeArgs args;

  QK_DEVICE Affine settle(const Range& range, int64_t, int64_t, bool) const {
    return choose_affine(range, kFormat, args.symmetric, args.scale_type);
  }

  template <int kCount>
  QK_DEVICE void put(int64_t row, int64_t begin, const float (&x)[kCount],
                     const Affine& affine) const {
#pragma unroll
    for (int eight = 0; eight < kCount; eight += kEight) {
      float y[kEight];
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        y[i] = fake_element<kFormat>(x[eight + i], affine, args.symmetric);
      }
      store_eight<kType>(args.y, row * args.cols + begin + eight, y);
    }
  }
};

// A zero point that is NaN makes its group NaN: nobody has looked at the values.
template <Format kFormat, class Args>
QK_DEVICE Affine given_affine(const Args& a, int64_t row, int64_t group) {
  const int64_t at = a.shared_scale ? 0 : row * a.groups + group;
  float scale = load_float(a.scale, a.scale_type, at);
  int zero = symmetric_zero(kFormat);
  if (a.zero_point != nullptr) {
    if (a.float_zeros) {
      const float value = static_cast<const float*>(a.zero_point)[at];
      zero = to_zero_point(value, kFormat);
      if (value != value) scale = NAN;
    } else {
      zero = given_zero_point<kFormat>(a.zero_point, at);
    }
  }
  return {scale, 1.0f / scale, zero};
}

// A thread takes eight elements of one group, or one element.
template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_with_kernel(const FakeQuantizeArgs a, int64_t units, int64_t row_units) {
  constexpr int kUnit = kVectors ? kEight : 1;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = divide(unit, row_units), begin = (unit - row * row_units) * kUnit;
  const int64_t at = row * a.cols + begin;
  const Affine affine = given_affine<kFormat>(a, row, divide(begin, a.group_size));
  if constexpr (kVectors) {
    float x[kEight];
    load_eight<kType>(x, a.x, at);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = fake_element<kFormat>(x[i], affine, a.symmetric);
    store_eight<kType>(a.y, at, x);
  } else {
    const float x = load_element<kType>(a.x, at);
    store_element<kType>(a.y, at, fake_element<kFormat>(x, affine, a.symmetric));
  }
}

void fake_quantize_with(const FakeQuantizeArgs& a, int64_t rows, Stream stream) {
  const bool vectors = vectors_fit(a.x, a) && vectors_fit(a.y, a);
  const int64_t row_units = vectors ? a.cols / kEight : a.cols, units = rows * row_units;
  for_format(a.format, [&](auto format) {
    for_float(a.type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      const auto kernel = vectors ? fake_quantize_with_kernel<kFormat, kType, true>
                                  : fake_quantize_with_kernel<kFormat, kType, false>;
      launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units, row_units);
    });
  });
}

FakeQuantizeArgs split(const FakeQuantizeArgs& whole, int64_t* rows) {
  FakeQuantizeArgs a = whole;
  split_groups(&a, rows, 8);
  return a;
}

// ---- Gradient -----------------------------------------------------------------------------------

// A thread stands for one of the kSumLanes lanes in which the sums of a group are promised, and
// reads kAhead elements before it writes.
constexpr int kAhead = 4;

template <Format kFormat, DType kType>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_backward_kernel(const FakeBackwardArgs a, int64_t total) {
  constexpr int kPerBlock = kThreads / kSumLanes;
  const int lane = static_cast<int>(threadIdx.x) % kSumLanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPerBlock + threadIdx.x / kSumLanes;
  const bool exists = index < total;  // all lanes of a warp take part in the sums
  const Group group = group_at(a, exists ? index : 0);
  const Affine affine = given_affine<kFormat>(a, group.row, group.number);
  const int64_t row = group.row * a.cols, end = exists ? row + group.end : 0;
  float scale_sum = 0.0f, zero_sum = 0.0f;
  for (int64_t i = row + group.begin + lane; i < end; i += kAhead * kSumLanes) {
    float x[kAhead], grad[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = i + j * kSumLanes;
      x[j] = at < end ? load_element<kType>(a.x, at) : 0.0f;
      grad[j] = at < end ? load_element<kType>(a.grad, at) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = i + j * kSumLanes;
      if (at >= end) break;
      const FakeSlopes s = fake_slopes(x[j], grad[j], kFormat, affine, a.symmetric);
      scale_sum = std::fma(grad[j], s.slope, scale_sum);
      zero_sum += s.clipped;
      store_element<kType>(a.dx, at, s.dx);
    }
  }
  // As sum_lanes() of core/codec.h.
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    scale_sum += shuffle_xor(scale_sum, half);
    zero_sum += shuffle_xor(zero_sum, half);
  }
  if (!exists || lane != 0) return;
  a.scale_grad[index] = scale_sum;
  if (a.zero_grad != nullptr) a.zero_grad[index] = -affine.scale * zero_sum;
}

// One warp reads 32 values at a time; each lane adds them all, in order.
__global__ void __launch_bounds__(kWarp)
    ordered_sum_kernel(const float* values, int64_t count, float* sum) {
  const int lane = static_cast<int>(threadIdx.x);
  double total = 0.0;
  float next = lane < count ? values[lane] : 0.0f;
  for (int64_t begin = 0; begin < count; begin += kWarp) {
    const float mine = next;
    const int64_t ahead = begin + kWarp + lane;
    next = ahead < count ? values[ahead] : 0.0f;
#pragma unroll
    for (int i = 0; i < kWarp; ++i) {
      const float value = shuffle(mine, i);
      if (begin + i < count) total += static_cast<double>(value);
    }
  }
  if (lane == 0) *sum = static_cast<float>(total);
}

}  // namespace

int64_t fake_quantize_workspace(const FakeQuantizeArgs& whole, int64_t rows) {
  const FakeQuantizeArgs a = split(whole, &rows);
  if (a.scale != nullptr || one_pass(a, a.type, a.y)) return 0;
  // Ranges, scales and zero points, of which the widest have four and two bytes.
  const ScalesArgs scales = scales_args(a, rows, a.type);
  return round_up(scales_workspace(scales), kLine) + scales.rows * scales.groups * (4 + 2);
}

void fake_quantize(const FakeQuantizeArgs& whole, int64_t rows, void* workspace, Stream stream) {
  FakeQuantizeArgs a = split(whole, &rows);
  if (a.scale != nullptr) return fake_quantize_with(a, rows, stream);
  if (one_pass(a, a.type, a.y)) {
    for_format(a.format, [&](auto format) {
      for_float(a.type, [&](auto type) {
        const FakeJob<decltype(format)::value, decltype(type)::value> job{a};
        launch_groups(job, rows, stream);
      });
    });
    return;
  }
  ScalesArgs scales = scales_args(a, rows, a.type);
  uint8_t* at = static_cast<uint8_t*>(workspace) + round_up(scales_workspace(scales), kLine);
  scales.scale = at;
  if (!a.symmetric) scales.zero_point = at + scales.rows * scales.groups * 4;
  choose_scales(scales, workspace, stream);
  a.scale = scales.scale;
  a.zero_point = scales.zero_point;
  fake_quantize_with(a, rows, stream);
}

void fake_quantize_backward(const FakeBackwardArgs& whole, int64_t rows, Stream stream) {
  FakeBackwardArgs a = whole;
  if (!a.shared_scale) split_groups(&a, &rows, 8);
  const int64_t total = rows * a.groups;
  const dim3 grid(blocks_for(total, kThreads / kSumLanes));
  for_format(a.format, [&](auto format) {
    for_float(a.type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      launch(fake_quantize_backward_kernel<kFormat, kType>, grid, kThreads, 0, stream, a, total);
    });
  });
}

void ordered_sum(const float* values, int64_t count, float* sum, Stream stream) {
  launch(ordered_sum_kernel, dim3(1), kWarp, 0, stream, values, count, sum);
}

}  // namespace qkernels::cuda
