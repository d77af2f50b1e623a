// What the kernels of linear with int8 activations share: fragments of both operands, and the way
// from exact sums to y.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/linear_int8.h"

namespace qkernels::cuda {

// Sums of 4-bit weights count sixteenths: the tensor cores get 16 * (code - 8).
template <Format kFormat>
inline constexpr int kSumShift = kFormat == Format::int4 ? 4 : 0;

// What a code of x counts for beside its products, by the weight's zero point. Sums of codes are of
// the same type, so that they need no conversion where they meet; `prepare` leaves their bits.
template <Format kFormat>
using ZeroFactor = std::conditional_t<kFormat == Format::int4, float, int32_t>;

template <Format kFormat>
QK_DEVICE ZeroFactor<kFormat> zero_factor(int zero) {
  const int distance = symmetric_zero(kFormat) - zero;
  if constexpr (kFormat == Format::int8) {
    return distance;
  } else {
    return static_cast<float>(distance) * 0.125f;
  }
}

// The value of a group from the exact sums of products and of codes of x, of int4 as int4_dot.
template <Format kFormat>
QK_DEVICE float group_value(int32_t products, int32_t codes, ZeroFactor<kFormat> factor) {
  const ZeroFactor<kFormat> sum = bit_cast<ZeroFactor<kFormat>>(codes);
  if constexpr (kFormat == Format::int8) {
    return static_cast<float>(products + factor * sum);
  } else {
    return std::fma(factor, sum, static_cast<float>(products));
  }
}

// ---- Fragments ----------------------------------------------------------------------------------

// The A operand of chunk `half` of a pair, from the 16 bytes that a thread reads of a packed row:
// of int8 they are that chunk, of 4 bits the pair. The order of k within eight is that in which
// `prepare` writes the codes of x (k_order).
//
// `zero` is 0, but not to the compiler. The tensor cores want the words of int8 in another order
// than they are loaded in, in four registers side by side. Without an operation on each, the
// compiler copies them anew for nearly every product: 144 moves for 64 products instead of 32
// operations.
template <Format kFormat>
QK_DEVICE void weight_fragment(uint32_t (&a)[4], uint4 v, int half, uint32_t zero) {
  if constexpr (kFormat == Format::int8) {
    a[0] = v.x | zero, a[1] = v.z | zero, a[2] = v.y | zero, a[3] = v.w | zero;
  } else {
    const uint32_t low = half == 0 ? v.x : v.z, high = half == 0 ? v.y : v.w;
    // (nibble << 4) ^ 0x80 is 16 * (code - 8) as int8: 0x6a is (a & b) ^ c.
    constexpr uint32_t kMask = 0xf0f0f0f0u, kSign = 0x80808080u;
    a[0] = lop3<0x6a>(low << 4, kMask, kSign);
    a[1] = lop3<0x6a>(high << 4, kMask, kSign);
    a[2] = lop3<0x6a>(low, kMask, kSign);
    a[3] = lop3<0x6a>(high, kMask, kSign);
  }
}

QK_DEVICE uint32_t opaque_zero(const BlockShape& s) {
  static_assert(kMaxFeatures >> 48 == 0);
  return static_cast<uint32_t>(s.k >> 48);
}

// ---- From sums to y -----------------------------------------------------------------------------

// `kCount` outputs from `feature` on, for any token: what of them is in the packed weight.
template <int kCount>
struct Outputs {
  int64_t feature;
  int count;                 // of them that exist
  float weight_sum[kCount];  // of the dequantized weight
  float bias[kCount];
};

template <int kCount>
QK_DEVICE Outputs<kCount> load_outputs(const LinearArgs& a, int64_t feature) {
  Outputs<kCount> o{};
  o.feature = feature;
  const int64_t left = a.n - feature;
  o.count = left < 0 ? 0 : left < kCount ? static_cast<int>(left) : kCount;
  if (a.y_type == DType::i32) return o;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= o.count) continue;
    const uint8_t* row = a.packed + (feature + i) / kLanes * a.shape.bytes;
    const int lane = static_cast<int>((feature + i) % kLanes);
    o.weight_sum[i] = load_float(row + a.shape.bias, DType::f32, lane);
    if (a.bias != nullptr) o.bias[i] = load_float(a.bias, a.bias_type, feature + i);
  }
  return o;
}

// The scale of a group of a weight.
QK_DEVICE float scale_at(const LinearArgs& a, int64_t feature, int64_t group) {
  const uint8_t* row = a.packed + feature / kLanes * a.shape.bytes;
  return load_float(row + a.shape.scales, a.layout.scale, group * kLanes + feature % kLanes);
}

// Of an asymmetric weight.
template <Format kFormat>
QK_DEVICE ZeroFactor<kFormat> zero_factor_at(const LinearArgs& a, int64_t feature, int64_t group) {
  const uint8_t* row = a.packed + feature / kLanes * a.shape.bytes;
  const int zero = load_zero_point(row + a.shape.zeros, kFormat, group * kLanes + feature % kLanes);
  return zero_factor<kFormat>(zero);
}

// Stores `values`, one 32-bit word each: floats, or int32 where y is that.
template <int kCount>
QK_DEVICE void store_outputs(const LinearArgs& a, int64_t token, const Outputs<kCount>& o,
                             const uint32_t (&values)[kCount]) {
  const int64_t at = token * a.n + o.feature;
  if (kCount == 4 && o.count == 4 && a.n % 4 == 0) {
    // Rows of y begin at multiples of four elements, and y at one of 16 bytes.
    if (a.y_type == DType::f32 || a.y_type == DType::i32) {
      store_128(static_cast<uint32_t*>(a.y) + at,
                make_uint4(values[0], values[1], values[2], values[3]));
      return;
    }
    const bool bf16 = a.y_type == DType::bf16;
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = bit_cast<float>(values[2 * i]), high = bit_cast<float>(values[2 * i + 1]);
      pairs[i] = bf16 ? pack_bf16(low, high) : pack_f16(low, high);
    }
    store_64(static_cast<uint16_t*>(a.y) + at, make_uint2(pairs[0], pairs[1]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= o.count) continue;
    if (a.y_type == DType::f32 || a.y_type == DType::i32) {
      static_cast<uint32_t*>(a.y)[at + i] = values[i];
    } else if (a.y_type == DType::bf16) {
      store_element<DType::bf16>(a.y, at + i, bit_cast<float>(values[i]));
    } else {
      store_element<DType::f16>(a.y, at + i, bit_cast<float>(values[i]));
    }
  }
}

// Of a token: what its results need.
struct TokenCodes {
  float scale, zero;
  int32_t sum;  // of the codes, as bits; for weights with one group a row and zero points
};

QK_DEVICE TokenCodes load_token(const LinearArgs& a, int64_t token, bool sums) {
  if (a.y_type == DType::i32) return {};
  return {a.row_scale[token], a.row_zero[token], sums ? a.group_sums[token] : 0};
}

// The usual epilogues are looked at once for all values, so that their instructions mix.
template <int kCount>
QK_DEVICE void apply_epilogue(float (&y)[kCount], Epilogue epilogue) {
  if (epilogue == Epilogue::none) return;
  if (epilogue == Epilogue::relu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] = qkernels::apply_epilogue(y[i], epilogue);
}

// From the value of a group to its share of a result, and from all groups' to a result without
// activation function. `zeros`: codes of x have a zero point.
QK_DEVICE float scaled_sum(float value, float scale) { return std::fma(value, scale, 0.0f); }

QK_DEVICE float result(float sum, const TokenCodes& codes, bool zeros, float weight_sum,
                       float bias) {
  return std::fma(codes.scale, zeros ? std::fma(-codes.zero, weight_sum, sum) : sum, bias);
}

// From the sums over all groups, times the weight's scales, to y.
template <int kCount>
QK_DEVICE void finish(const LinearArgs& a, int64_t token, const TokenCodes& codes,
                      const Outputs<kCount>& o, const float (&sums)[kCount]) {
  const bool zeros = a.activation == Activation::int8_asymmetric;
  float y[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    y[i] = result(sums[i], codes, zeros, o.weight_sum[i], o.bias[i]);
  }
  apply_epilogue(y, a.epilogue);
  uint32_t values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = bit_cast<uint32_t>(y[i]);
  store_outputs<kCount>(a, token, o, values);
}

// Outputs of a weight whose rows are one group each.
template <Format kFormat, int kCount>
struct RowOutputs {
  Outputs<kCount> all;
  float scale[kCount];
  ZeroFactor<kFormat> zero[kCount];
};

template <Format kFormat, int kCount>
QK_DEVICE RowOutputs<kFormat, kCount> load_row_outputs(const LinearArgs& a, int64_t feature) {
  RowOutputs<kFormat, kCount> o{};
  o.all = load_outputs<kCount>(a, feature);
  if (a.y_type == DType::i32) return o;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= o.all.count) continue;
    o.scale[i] = scale_at(a, feature + i, 0);
    if (!a.layout.symmetric) o.zero[i] = zero_factor_at<kFormat>(a, feature + i, 0);
  }
  return o;
}

// From exact sums as the tensor cores leave them to y, where a row of the weight is one group.
template <Format kFormat, int kCount>
QK_DEVICE void finish_exact(const LinearArgs& a, int64_t token, const TokenCodes& codes,
                            const RowOutputs<kFormat, kCount>& o, const uint32_t (&exact)[kCount]) {
  if (a.y_type == DType::i32) return store_outputs<kCount>(a, token, o.all, exact);
  float sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t sum = static_cast<int32_t>(exact[i]) >> kSumShift<kFormat>;
    sums[i] = scaled_sum(group_value<kFormat>(sum, codes.sum, o.zero[i]), o.scale[i]);
  }
  finish<kCount>(a, token, codes, o.all, sums);
}

// ---- Codes --------------------------------------------------------------------------------------

// Quotients between `low` and `high` have codes in range.
struct Encoder {
  float inverse, low, high;
  uint32_t zero;
};

QK_DEVICE Encoder make_encoder(const Affine& affine, bool symmetric) {
  const int zero = affine.zero_point;
  return {affine.inverse, static_cast<float>(code_min(Format::int8, symmetric) - zero),
          static_cast<float>(code_max(Format::int8, symmetric) - zero),
          static_cast<uint32_t>(zero)};
}

// The code in the lowest byte, as encode_integer gives it; that of NaN may be any. Adding
// 1.5 * 2^23 rounds half to even and leaves the integer in the low bits, which is cheaper than a
// conversion.
QK_DEVICE uint32_t encode_low_byte(const Encoder& e, float x) {
  const float quotient = std::fmin(std::fmax(x * e.inverse, e.low), e.high);
  return bit_cast<uint32_t>(quotient + 0x1.8p23f) + e.zero;
}

}  // namespace qkernels::cuda
