// What happens to int8 codes between convolutions: pooling, add, lookup and concat. A thread makes
// kVector elements that lie side by side in memory: sixteen where that is possible, or one.
#include "core/pool.h"
#include "cuda/elements.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSixteen = 16;

struct Codes {
  float scale;
  int zero;
};
QK_DEVICE Codes read(const GivenCodes& given) {
  return {given.device_scale == nullptr ? given.scale : *given.device_scale,
          given.device_zero == nullptr ? given.zero : *given.device_zero};
}

template <int kVector>
QK_DEVICE void load(int (&codes)[kVector], const int8_t* from) {
  if constexpr (kVector == 1) {
    codes[0] = *from;
  } else {
    const uint4 v = load_128(from);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = static_cast<int8_t>(words[i / 4] >> i % 4 * 8);
  }
}

template <int kVector>
QK_DEVICE void store(int8_t* to, const int (&codes)[kVector]) {
  if constexpr (kVector == 1) {
    *to = static_cast<int8_t>(codes[0]);
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      words[i / 4] |= (static_cast<uint32_t>(codes[i]) & 0xff) << i % 4 * 8;
    }
    store_128(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Numbers as they are, or as codes: clamp(round(y * inverse) + zero).
template <int kVector>
QK_DEVICE void store_result(void* data, DType type, int64_t at, const float (&y)[kVector],
                            float inverse, int zero) {
  if (type != DType::i8) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) store_float(data, type, at + i, y[i]);
    return;
  }
  int codes[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    codes[i] = encode_integer(y[i], {1.0f, inverse, zero}, -128, 127);
  }
  store(static_cast<int8_t*>(data) + at, codes);
}

bool on_vectors(const void* data) { return reinterpret_cast<uintptr_t>(data) % kSixteen == 0; }

// ---- Pooling ------------------------------------------------------------------------------------

template <int kVector, bool kMeans>
__global__ void __launch_bounds__(kThreads) pool_kernel(const PoolArgs a, int64_t units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t inner = a.channels_last ? a.channels : 1;  // from a pixel to the next
  const int64_t at = unit * kVector;
  const int64_t pixel = divide(at, inner), channel = at - pixel * inner;
  const int64_t row = divide(pixel, a.out[2]);
  const int64_t plane = divide(row, a.out[1]);
  const int64_t image = divide(plane, a.out[0]);
  const Window z = pool_window(a, 0, plane - image * a.out[0]);
  const Window y = pool_window(a, 1, row - plane * a.out[1]);
  const Window x = pool_window(a, 2, pixel - row * a.out[2]);

  const int x_zero = kMeans ? read(a.x_codes).zero : 0;
  int result[kVector];
#pragma unroll
  for (int c = 0; c < kVector; ++c) result[c] = kMeans ? 0 : -128;
  for (int64_t i = 0; i < z.count; ++i) {
    for (int64_t j = 0; j < y.count; ++j) {
      const int64_t in_z = image * a.in[0] + z.first + i * z.step;
      const int64_t in_y = in_z * a.in[1] + y.first + j * y.step;
      const int8_t* from = a.x + (in_y * a.in[2] + x.first) * inner + channel;
      for (int64_t k = 0; k < x.count; ++k, from += x.step * inner) {
        int codes[kVector];
        load(codes, from);
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          result[c] = kMeans ? result[c] + codes[c] - x_zero : max(result[c], codes[c]);
        }
      }
    }
  }
  if constexpr (kMeans) {
    const Codes y_codes = read(a.y_codes);
    PoolArgs scaled = a;
    scaled.scale = static_cast<double>(read(a.x_codes).scale) / y_codes.scale;
    const float scale = pool_scale(scaled, z, y, x);
    float sums[kVector];
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      sums[c] = static_cast<float>(result[c]);
      if (a.y_type != DType::i8) sums[c] = sums[c] * scale;
    }
    store_result(a.y, a.y_type, at, sums, scale, y_codes.zero);
  } else {
    store(static_cast<int8_t*>(a.y) + at, result);
  }
}

template <bool kMeans>
void pool(const PoolArgs& a, Stream stream) {
  const int64_t elements = a.batch * a.channels * a.out[0] * a.out[1] * a.out[2];
  const bool vectors =
      a.channels_last && a.channels % kSixteen == 0 && on_vectors(a.x) && on_vectors(a.y);
  const int64_t units = vectors ? elements / kSixteen : elements;
  const auto kernel = vectors ? pool_kernel<kSixteen, kMeans> : pool_kernel<1, kMeans>;
  launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units);
}

// ---- Element by element -------------------------------------------------------------------------

template <int kVector>
__global__ void __launch_bounds__(kThreads) add_kernel(const AddArgs a, int64_t units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t at = unit * kVector;
  const Codes a_codes = read(a.a_codes), b_codes = read(a.b_codes), y_codes = read(a.y_codes);
  int first[kVector], second[kVector];
  load(first, a.a + at);
  load(second, a.b + at);
  float y[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[i] = apply_epilogue(decode(first[i], Format::int8, a_codes.scale, a_codes.zero) +
                              decode(second[i], Format::int8, b_codes.scale, b_codes.zero),
                          a.epilogue);
  }
  store_result(a.y, a.y_type, at, y, 1.0f / y_codes.scale, y_codes.zero);
}

template <int kVector>
__global__ void __launch_bounds__(kThreads) lookup_kernel(const LookupArgs a, int64_t units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  int codes[kVector];
  load(codes, a.x + unit * kVector);
  // The table is two lines of the L1 cache.
#pragma unroll
  for (int i = 0; i < kVector; ++i) codes[i] = a.table[codes[i] + 128];
  store(a.y + unit * kVector, codes);
}

template <int kVector>
__global__ void __launch_bounds__(kThreads)
    concat_kernel(const ConcatArgs a, int64_t units, int64_t row_units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = divide(unit, row_units), begin = (unit - row * row_units) * kVector;
  const Codes x = read(a.x_codes), y = read(a.y_codes);
  int codes[kVector];
  load(codes, a.x + row * a.cols + begin);
  if (x.scale != y.scale || x.zero != y.zero) {
    const Affine affine{y.scale, 1.0f / y.scale, y.zero};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = decode(codes[i], Format::int8, x.scale, x.zero);
      codes[i] = encode_integer(value, affine, -128, 127);
    }
  }
  store(a.y + row * a.pitch + begin, codes);
}

}  // namespace

void max_pool(const PoolArgs& a, Stream stream) { pool<false>(a, stream); }

void avg_pool(const PoolArgs& a, Stream stream) { pool<true>(a, stream); }

void add(const AddArgs& a, int64_t count, Stream stream) {
  const bool vectors =
      count % kSixteen == 0 && on_vectors(a.a) && on_vectors(a.b) && on_vectors(a.y);
  const int64_t units = vectors ? count / kSixteen : count;
  const auto kernel = vectors ? add_kernel<kSixteen> : add_kernel<1>;
  launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units);
}

void lookup(const LookupArgs& a, int64_t count, Stream stream) {
  const bool vectors = count % kSixteen == 0 && on_vectors(a.x) && on_vectors(a.y);
  const int64_t units = vectors ? count / kSixteen : count;
  const auto kernel = vectors ? lookup_kernel<kSixteen> : lookup_kernel<1>;
  launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units);
}

void concat(const ConcatArgs& a, Stream stream) {
  const bool vectors =
      a.cols % kSixteen == 0 && a.pitch % kSixteen == 0 && on_vectors(a.x) && on_vectors(a.y);
  const int64_t row_units = vectors ? a.cols / kSixteen : a.cols, units = a.rows * row_units;
  const auto kernel = vectors ? concat_kernel<kSixteen> : concat_kernel<1>;
  launch(kernel, dim3(blocks_for(units, kThreads)), kThreads, 0, stream, a, units, row_units);
}

}  // namespace qkernels::cuda
