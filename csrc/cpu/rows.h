// Steps that every ISA's kernels share: they depend on single rows and scales, not on vectors.
#pragma once

#include "core/pool.h"
#include "cpu/kernels.h"

namespace qkernels {

// Element i of row `row` of x as the matmul sees it: permuted, then multiplied.
static inline float activation_at(const LinearArgs& a, int64_t row, int64_t i) {
  const int64_t column = a.perm == nullptr ? i : a.perm[i];
  const float x = load_float(a.x, a.x_type, row * a.shape.k + column);
  return a.premul == nullptr ? x : x * a.premul[column];
}

// Scale and zero point of a row of activations.
static inline Affine activation_affine(const LinearArgs& a, const Range& range) {
  if (!a.is_static) {
    return choose_affine(range, Format::int8, a.activation == Activation::int8_symmetric,
                         DType::f32);
  }
  const float scale = range.finite() ? a.static_scale : NAN;
  return {scale, 1.0f / a.static_scale, a.static_zero_point};
}

// From the sum of a row and an output, scaled by the weight, to y. `weight_sum` is the packed row's
// sum of the dequantized weight: it turns the activation's zero point into one product.
static inline float finish(const LinearArgs& a, int64_t row, float sum, float weight_sum,
                           float bias) {
  if (a.activation == Activation::int8_asymmetric)
    sum = std::fma(-a.row_zero[row], weight_sum, sum);
  return apply_epilogue(std::fma(a.row_scale[row], sum, bias), a.epilogue);
}

// ---- Convolution --------------------------------------------------------------------------------

// Where position `at` of the grid's dimension `dim` comes from in x, or -1 where the grid is zero.
static inline int64_t conv_source(const ConvArgs& a, int dim, int64_t at) {
  const int64_t offset = at - a.before[dim];
  if (offset < 0 || offset % a.step[dim] != 0) return -1;
  const int64_t source = offset / a.step[dim];
  return source < a.in[dim] ? source : -1;
}

// Index of output `o` of pixel `pixel` of image `n` in y.
static inline int64_t conv_output(const ConvArgs& a, int64_t n, int64_t pixel, int64_t o) {
  return a.y_channels_last ? (n * a.pixels() + pixel) * a.out_channels + o
                           : (n * a.out_channels + o) * a.pixels() + pixel;
}

// An output as it is stored.
static inline void conv_store(const ConvArgs& a, int64_t at, float y) {
  if (a.y_type == DType::i8) {
    static_cast<int8_t*>(a.y)[at] =
        static_cast<int8_t>(encode_integer(y, {1.0f, a.y_inverse, a.y_zero}, -128, 127));
  } else {
    store_float(a.y, a.y_type, at, y);
  }
}

static inline float conv_residual(const ConvArgs& a, int64_t at) {
  if (a.residual_type != DType::i8) return load_float(a.residual, a.residual_type, at);
  return decode(static_cast<const int8_t*>(a.residual)[at], Format::int8, a.residual_scale,
                a.residual_zero);
}

// ---- Attention and normalization ----------------------------------------------------------------

// Weights of softmax below e to this are 0.
inline constexpr float kLowestExp = -87.0f;

// How many keys the rows before `row_end` see.
static inline int64_t attention_keys(const AttentionArgs& a, int64_t row_end) {
  return a.causal && row_end < a.keys ? row_end : a.keys;
}

// What is added to the score of a row and a key.
static inline float attention_mask(const AttentionArgs& a, int64_t batch, int64_t head, int64_t row,
                                   int64_t key) {
  if (a.mask == nullptr) return 0.0f;
  const int64_t at =
      batch * a.mask_step[0] + head * a.mask_step[1] + row * a.mask_step[2] + key * a.mask_step[3];
  if (a.mask_is_bool) return static_cast<const bool*>(a.mask)[at] ? 0.0f : -INFINITY;
  return load_float(a.mask, a.mask_type, at);
}

// Sums over a row go through so many lanes, element i in lane i % kNormLanes, on every ISA: four
// vectors of AVX-512, whose additions do not wait for each other.
inline constexpr int kNormLanes = 4 * kSumLanes;

static inline float sum_norm_lanes(const float* lanes) {
  float sums[kSumLanes];
  for (int i = 0; i < kSumLanes; ++i) {
    sums[i] =
        (lanes[i] + lanes[i + kSumLanes]) + (lanes[i + 2 * kSumLanes] + lanes[i + 3 * kSumLanes]);
  }
  return sum_lanes(sums);
}

// One over the root of the mean square and eps.
static inline float norm_inverse(const NormArgs& a, float squares) {
  return 1.0f / std::sqrt(squares / static_cast<float>(a.cols) + a.eps);
}

// ---- Fake quantization --------------------------------------------------------------------------

// Scale and zero point that fake_quantize was given for a group.
template <class Args>
static inline Affine given_affine(const Args& a, int64_t row, int64_t group) {
  const int64_t i = a.shared_scale ? 0 : row * a.groups + group;
  const float scale = load_float(a.scale, a.scale_type, i);
  const int zero = a.zero_point == nullptr ? symmetric_zero(a.format)
                                           : load_zero_point(a.zero_point, a.format, i);
  return {scale, 1.0f / scale, zero};
}

}  // namespace qkernels
