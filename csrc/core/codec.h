// Scalar conversions, scales and codes: what NUMERICS.md promises, written once. Every ISA calls
// the scale functions; the element functions are what the vector code must equal to the bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/format.h"

namespace qkernels {

// Functions are `static inline` so that each translation unit keeps its own copy: a copy compiled
// for one ISA must never be the one that another links to.

template <class To, class From>
QK_HD static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- 16-bit floats ------------------------------------------------------------------------------

QK_HD static inline float from_bf16(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

QK_HD static inline uint16_t to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

QK_HD static inline float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0) {
    // Subnormal: mantissa * 2^-24 is exact in float.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000 : 0;
    return bit_cast<float>(sign | 0x7f800000 | mantissa << 13 | quiet);
  }
  return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

QK_HD static inline uint16_t to_f16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  }
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Adding 0.5 makes the FPU round at 2^-24, the step of f16 subnormals.
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000));
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

QK_HD static inline float load_float(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(data)[i]);
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(data)[i]);
    case DType::i8:
      return static_cast<const int8_t*>(data)[i];
    case DType::i32:
      break;
  }
  return static_cast<float>(static_cast<const int32_t*>(data)[i]);
}

// `type` is a float type.
QK_HD static inline void store_float(void* data, DType type, int64_t i, float value) {
  if (type == DType::f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = type == DType::bf16 ? to_bf16(value) : to_f16(value);
  }
}

// ---- Scales -------------------------------------------------------------------------------------

// What a group's scale depends on. `magnitude` is the largest |x| as raw bits, compared as an
// integer: exact, independent of order, and NaN and Inf win over every number.
struct Range {
  float min = 0.0f;  // of the numbers and 0
  float max = 0.0f;
  uint32_t magnitude = 0;

  QK_HD bool finite() const { return magnitude < 0x7f800000; }
};

QK_HD static inline void extend(Range* range, float x) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
  if (magnitude > range->magnitude) range->magnitude = magnitude;
  if (x < range->min) range->min = x;
  if (x > range->max) range->max = x;
}

struct Affine {
  float scale;     // as stored: already rounded to the scale's type
  float inverse;   // 1 / scale
  int zero_point;  // in steps of the format: 1 / info(format).zero_steps of a code
};

// A zero point as the code next to it and what is left, at most half a code.
struct ZeroParts {
  int whole;
  float fraction;
};
QK_HD static inline ZeroParts zero_parts(int zero_point, Format format) {
  if (format != Format::int4) return {zero_point, 0.0f};
  const int whole = (zero_point + 4) >> 3;
  return {whole, static_cast<float>(zero_point - 8 * whole) * 0.125f};
}

// The zero point of a symmetric group.
QK_HD static inline int symmetric_zero(Format format) {
  return format == Format::int4 ? kInt4Offset * 8 : 0;
}

static inline constexpr float kSmallestScale = 0x1p-126f;  // FLT_MIN

// The scale as its stored type holds it. It stays positive and finite when the type is narrower
// than the value: zero would divide, infinity would erase the group.
QK_HD static inline float round_scale(float scale, DType type) {
  if (!(scale > 0.0f) || scale == INFINITY) return scale;  // NaN passes
  if (type == DType::bf16) {
    const float rounded = from_bf16(to_bf16(scale));
    return rounded == INFINITY ? from_bf16(0x7f7f) : rounded;
  }
  if (type == DType::f16) {
    const float rounded = from_f16(to_f16(scale));
    if (rounded == INFINITY) return 65504.0f;
    return rounded == 0.0f ? 0x1p-24f : rounded;
  }
  return scale;
}

// Codes that a group may use, as stored numbers.
QK_HD static inline int code_min(Format format, bool symmetric) {
  if (format == Format::int4) return 0;
  return symmetric ? info(format).symmetric_min : info(format).asymmetric_min;
}
QK_HD static inline int code_max(Format format, bool symmetric) {
  if (format == Format::int4) return 15;
  return symmetric ? info(format).symmetric_max : info(format).asymmetric_max;
}

// Half to even, then saturate; NaN gives `low`. The bounds are small integers, so clamping before
// rounding is the same as after it and keeps lrintf in range.
QK_HD static inline int round_clamp(float value, int low, int high) {
  if (!(value > static_cast<float>(low))) return low;
  if (value > static_cast<float>(high)) return high;
#ifdef __CUDA_ARCH__
  return __float2int_rn(value);  // one instruction; lrintf would convert to 64 bits
#else
  return static_cast<int>(lrintf(value));
#endif
}

// The zero point nearest to a number of codes.
QK_HD static inline int to_zero_point(float codes, Format format) {
  const FormatInfo f = info(format);
  return round_clamp(codes * static_cast<float>(f.zero_steps), f.asymmetric_min * f.zero_steps,
                     f.asymmetric_max * f.zero_steps);
}

// The scale and zero point of a group. The zero point is a whole code, so that 0 keeps its value:
// where a few numbers make the scale large, most lie close to 0, and would all be off alike. All
// zero: scale 1. NaN or Inf inside: scale NaN, so that what is computed from the group is NaN and
// never a plausible number.
QK_HD static inline Affine choose_affine(const Range& range, Format format, bool symmetric,
                                         DType scale_type) {
  const FormatInfo f = info(format);
  const int middle = symmetric ? symmetric_zero(format) : 0;
  if (!range.finite()) return {NAN, NAN, middle};
  if (range.magnitude == 0) return {1.0f, 1.0f, middle};
  if (symmetric) {
    float scale = bit_cast<float>(range.magnitude) / f.symmetric_range;
    scale = round_scale(scale < kSmallestScale ? kSmallestScale : scale, scale_type);
    return {scale, 1.0f / scale, middle};
  }
  // Divided one by one: max - min may overflow.
  const float steps = static_cast<float>(f.asymmetric_max - f.asymmetric_min);
  float scale = range.max / steps - range.min / steps;
  scale = round_scale(scale < kSmallestScale ? kSmallestScale : scale, scale_type);
  const float inverse = 1.0f / scale;
  const float zero = static_cast<float>(f.asymmetric_min) - range.min * inverse;
  const int whole = round_clamp(zero, f.asymmetric_min, f.asymmetric_max);
  return {scale, inverse, whole * f.zero_steps};
}

// ---- Codes --------------------------------------------------------------------------------------

// The quotient is x * inverse, rounded half to even, plus the zero point, saturated. NaN gives the
// zero point (value 0). For formats whose zero points are codes.
QK_HD static inline int encode_integer(float x, const Affine& affine, int low, int high) {
  const float quotient = x * affine.inverse;
  if (quotient != quotient) return affine.zero_point;
  const int zero = affine.zero_point;
  return round_clamp(quotient, low - zero, high - zero) + zero;
}

// The same where a zero point has a fraction, which is added to the quotient before it is rounded.
QK_HD static inline int encode_int4(float x, const Affine& affine) {
  const float quotient = x * affine.inverse;
  const ZeroParts zero = zero_parts(affine.zero_point, Format::int4);
  if (quotient != quotient) return zero.whole;
  return round_clamp(quotient + zero.fraction, -zero.whole, 15 - zero.whole) + zero.whole;
}

// The nearest NF4 level; a tie goes to the lower one. NaN gives the code of 0.
QK_HD static inline int encode_nf4(float x, float inverse) {
  const float value = x * inverse;
  if (value != value) return 7;
  static constexpr Nf4Table middles = kNf4Middles;
  int code = 0;
  for (int i = 0; i < 15; ++i) code += value > middles.at[i];
  return code;
}

QK_HD static inline int encode(float x, Format format, const Affine& affine, bool symmetric) {
  if (format == Format::nf4) return encode_nf4(x, affine.inverse);
  if (format == Format::int4) return encode_int4(x, affine);
  return encode_integer(x, affine, code_min(format, symmetric), code_max(format, symmetric));
}

// The local copy is what GPU code can read.
QK_HD static inline float nf4_level(int code) {
  static constexpr Nf4Table levels = kNf4Levels;
  return levels.at[code];
}

// What a code stands for in units of the scale.
QK_HD static inline float code_value(int code, Format format, int zero_point) {
  if (format == Format::nf4) return nf4_level(code);
  if (format == Format::int4) {
    return static_cast<float>(code) - static_cast<float>(zero_point) * 0.125f;
  }
  return static_cast<float>(code - zero_point);
}

// The sum of the values of `count` codes that add up to `sum`.
QK_HD static inline float value_sum(int64_t sum, int64_t count, Format format, int zero_point) {
  const int64_t steps = info(format).zero_steps;
  return static_cast<float>(steps * sum - zero_point * count) / static_cast<float>(steps);
}

// The value of a group of an int4 weight from exact sums of codes of x, and of their products with
// the weight's codes less 8: a zero point other than 8 adds its distance times the sum.
QK_HD static inline float int4_dot(int32_t products, int32_t codes, int zero_point) {
  const float distance = static_cast<float>(symmetric_zero(Format::int4) - zero_point) * 0.125f;
  return std::fma(distance, static_cast<float>(codes), static_cast<float>(products));
}

// code_value * scale: the value is exact, the product is rounded once.
QK_HD static inline float decode(int code, Format format, float scale, int zero_point) {
  return code_value(code, format, zero_point) * scale;
}

// x after quantizing and dequantizing. NaN and Inf give NaN: training must not hide them.
QK_HD static inline float fake(float x, Format format, const Affine& affine, bool symmetric) {
  if (!(std::fabs(x) < INFINITY)) return NAN;
  return decode(encode(x, format, affine, symmetric), format, affine.scale, affine.zero_point);
}

// What an element adds to the gradients of fake(): straight through inside of the codes' range and
// nothing outside of it; `slope` is dy / dscale (Esser et al., "Learned step size quantization",
// 2020), and `clipped`, times -scale, the part of the zero point (Bhalgat et al., "LSQ+", 2020).
struct FakeSlopes {
  float dx, slope, clipped;
};
QK_HD static inline FakeSlopes fake_slopes(float x, float grad, Format format, const Affine& affine,
                                           bool symmetric) {
  const bool levels = format == Format::nf4;
  const int zero = affine.zero_point;
  const float low = levels ? -1.0f : code_value(code_min(format, symmetric), format, zero);
  const float high = levels ? 1.0f : code_value(code_max(format, symmetric), format, zero);
  const float quotient = x * affine.inverse;
  const float value = code_value(encode(x, format, affine, symmetric), format, zero);
  if (quotient < low || quotient > high) return {0.0f, value, grad};
  return {grad, value - quotient, 0.0f};
}

// Gradients of scales are summed in so many lanes, element i of a group in lane i % kSumLanes, and
// the lanes in pairs: one order for every ISA.
inline constexpr int kSumLanes = 16;

QK_HD static inline float sum_lanes(const float* lanes) {
  float sums[kSumLanes];
  std::memcpy(sums, lanes, sizeof(sums));
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// Codes in storage. `zero_points` are int8, uint8 (int4) or int16 by the format.
QK_HD static inline int load_code(const void* row, Format format, int64_t k) {
  switch (format) {
    case Format::int8:
      return static_cast<const int8_t*>(row)[k];
    case Format::int16:
      return static_cast<const int16_t*>(row)[k];
    case Format::int4:
    case Format::nf4:
      break;
  }
  return static_cast<const uint8_t*>(row)[k / 2] >> (k % 2 * 4) & 0xf;
}

// A 4-bit row is written in ascending k: an even k clears its byte, an odd one completes it.
QK_HD static inline void store_code(void* row, Format format, int64_t k, int code) {
  if (format == Format::int8) {
    static_cast<int8_t*>(row)[k] = static_cast<int8_t>(code);
  } else if (format == Format::int16) {
    static_cast<int16_t*>(row)[k] = static_cast<int16_t>(code);
  } else {
    uint8_t* byte = static_cast<uint8_t*>(row) + k / 2;
    *byte = static_cast<uint8_t>(k % 2 == 0 ? code : *byte | code << 4);
  }
}

QK_HD static inline int load_zero_point(const void* zeros, Format format, int64_t i) {
  switch (format) {
    case Format::int8:
      return static_cast<const int8_t*>(zeros)[i];
    case Format::int16:
      return static_cast<const int16_t*>(zeros)[i];
    case Format::int4:
    case Format::nf4:
      break;
  }
  return static_cast<const uint8_t*>(zeros)[i];
}

QK_HD static inline void store_zero_point(void* zeros, Format format, int64_t i, int value) {
  if (format == Format::int16) {
    static_cast<int16_t*>(zeros)[i] = static_cast<int16_t>(value);
  } else {
    static_cast<int8_t*>(zeros)[i] = static_cast<int8_t>(value);
  }
}

// ---- Epilogue functions -------------------------------------------------------------------------
// One polynomial each, with every fma written out: the vector code repeats these steps lane by
// lane, so all ISAs agree to the bit. NaN stays NaN.

// exp with a relative error below 1e-7 for x from -87 to 88. Below, it stays at exp(-87), which is
// zero to the callers; from 89 on the power of two below is infinity, and so is the result.
QK_HD static inline float exp_poly(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // x = n * ln2 + r; adding 1.5 * 2^23 rounds to an integer that stays in the low mantissa bits.
  const float shifted = std::fma(x, 0x1.715476p+0f, 0x1.8p23f);
  const float n = shifted - 0x1.8p23f;
  float r = std::fma(n, -0x1.62e4p-1f, x);
  r = std::fma(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6b7a7ap-10f;  // 1/720 and so on, minimax on |r| <= ln2 / 2
  p = std::fma(p, r, 0x1.1239dap-7f);
  p = std::fma(p, r, 0x1.555a7ep-5f);
  p = std::fma(p, r, 0x1.5554dap-3f);
  p = std::fma(p, r, 0x1.fffffap-2f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const uint32_t power = (bit_cast<uint32_t>(shifted) + 127) << 23;
  return p * bit_cast<float>(power);
}

QK_HD static inline float sigmoid_times(float x, float z) { return x / (1.0f + exp_poly(-z)); }

// x * Phi(x), Phi by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).
QK_HD static inline float gelu(float x) {
  const float z = std::fabs(x) * 0x1.6a09e6p-1f;
  const float t = 1.0f / std::fma(z, 0.3275911f, 1.0f);
  float p = 1.061405429f;
  p = std::fma(p, t, -1.453152027f);
  p = std::fma(p, t, 1.421413741f);
  p = std::fma(p, t, -0.284496736f);
  p = std::fma(p, t, 0.254829592f);
  const float tail = 0.5f * (p * t) * exp_poly(-(z * z));  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

QK_HD static inline float gelu_tanh(float x) {
  // 0.5 * (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
  const float inner = std::fma(x * x, 0.044715f * 1.5957691216f, 1.5957691216f);
  return sigmoid_times(x, x * inner);
}

QK_HD static inline float relu6(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }

QK_HD static inline float hardswish(float x) { return x * (relu6(x + 3.0f) * (1.0f / 6.0f)); }

QK_HD static inline float apply_epilogue(float x, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return x;
    case Epilogue::relu:
      return x < 0.0f ? 0.0f : x;
    case Epilogue::gelu:
      return gelu(x);
    case Epilogue::gelu_tanh:
      return gelu_tanh(x);
    case Epilogue::relu6:
      return relu6(x);
    case Epilogue::hardswish:
      return hardswish(x);
    case Epilogue::silu:
      break;
  }
  return sigmoid_times(x, x);
}

}  // namespace qkernels
