// What a thread of an elementwise kernel takes: eight consecutive elements of a row as vectors, or
// the least that storage can hold.
#pragma once

#include "cuda/ptx.cuh"

namespace qkernels::cuda {

inline constexpr int kEight = 8;

// Elements per thread.
QK_HD constexpr int unit_of(Format format, bool vectors) {
  return vectors ? kEight : info(format).bits == 4 ? 2 : 1;
}

// Whether rows start on vectors and consist of eights that belong to one group each.
template <class Args>
bool vectors_fit(const void* data, const Args& a) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && a.cols % kEight == 0 &&
         (a.groups == 1 || a.group_size % kEight == 0);
}

// a / b, neither negative, in 32 bits where that will do: 64-bit division takes many times as long.
QK_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (static_cast<uint64_t>(a | b) >> 32 != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// One element of a float tensor, its type known to the compiler.
template <DType kType>
QK_DEVICE float load_element(const void* data, int64_t i) {
  if constexpr (kType == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kType == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

template <DType kType>
QK_DEVICE void store_element(void* data, int64_t i, float value) {
  if constexpr (kType == DType::f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        kType == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  }
}

// Eight elements as they lie in memory.
template <DType kType>
struct Eight {
  static constexpr int kVectors = kType == DType::f32 ? 2 : 1;
  uint4 vectors[kVectors];

  QK_DEVICE void load(const void* data, int64_t at) {
    const uint8_t* from = static_cast<const uint8_t*>(data) + at * bytes_of(kType);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = load_128(from + i * 16);
  }

  QK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = make_uint4(0, 0, 0, 0);
  }

  QK_DEVICE void widen(float (&x)[kEight]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t words[4] = {vectors[v].x, vectors[v].y, vectors[v].z, vectors[v].w};
      constexpr int kPerVector = kEight / kVectors;
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        if constexpr (kType == DType::f32) {
          x[v * kPerVector + i] = bit_cast<float>(words[i]);
        } else {
          const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
          x[i] = kType == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
        }
      }
    }
  }
};

template <DType kType>
QK_DEVICE void load_eight(float (&x)[kEight], const void* data, int64_t at) {
  Eight<kType> eight;
  eight.load(data, at);
  eight.widen(x);
}

template <DType kType>
QK_DEVICE void store_eight(void* data, int64_t at, const float (&y)[kEight]) {
  if constexpr (kType == DType::f32) {
    float* to = static_cast<float*>(data) + at;
    for (int i = 0; i < kEight; i += 4) {
      store_128(to + i, make_uint4(bit_cast<uint32_t>(y[i]), bit_cast<uint32_t>(y[i + 1]),
                                   bit_cast<uint32_t>(y[i + 2]), bit_cast<uint32_t>(y[i + 3])));
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = kType == DType::bf16 ? pack_bf16(y[2 * i], y[2 * i + 1])
                                      : pack_f16(y[2 * i], y[2 * i + 1]);
    }
    store_128(static_cast<uint16_t*>(data) + at,
              make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// encode_nf4 of a quotient that is a number. 15 comparisons would take longer than memory does; the
// guess, 0 to 14, and what it is good for are those of csrc/cpu/codes.inl. Here it is the whole
// part of a number whose last bit is 2^-8, since 1.5 * 2^15 is added. Lanes may ask for different
// middles at once, since the table is in global memory and on one line of the L1 cache.
QK_DEVICE int encode_level(float quotient) {
  alignas(64) static constexpr Nf4Table middles = kNf4Middles;
  const float value = std::fmin(std::fmax(quotient, -1.0f), 1.0f);
  const float slope = std::fma(value * value, -4.347f, 11.318f);
  const float guess = std::fma(value, slope, 0x1.8p15f + 6.772f + 0.5f);
  const uint32_t code = bit_cast<uint32_t>(guess) >> 8 & 15;
  return static_cast<int>(code + (value > middles.at[code]));
}

// Zero point `at` of those that are given to an op. Nobody has looked at the values: those of int4
// are kept in range, so that no code leaves its nibble.
template <Format kFormat>
QK_DEVICE int given_zero_point(const void* zeros, int64_t at) {
  const int zero = load_zero_point(zeros, kFormat, at);
  return kFormat == Format::int4 ? min(zero, 15 * info(kFormat).zero_steps) : zero;
}

// encode() of core/codec.h. Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low
// bits: a conversion would take as long as four additions.
template <Format kFormat>
QK_DEVICE int encode_element(float x, const Affine& affine, bool symmetric) {
  constexpr float kRound = 0x1.8p23f;
  constexpr int kRoundBits = 0x4b400000;
  const float quotient = x * affine.inverse;
  const bool number = quotient == quotient;
  if constexpr (kFormat != Format::nf4) {
    const ZeroParts zero = zero_parts(affine.zero_point, kFormat);
    const float low = static_cast<float>(code_min(kFormat, symmetric) - zero.whole);
    const float high = static_cast<float>(code_max(kFormat, symmetric) - zero.whole);
    const float wanted = kFormat == Format::int4 ? quotient + zero.fraction : quotient;
    const float value = std::fmin(std::fmax(wanted, low), high);
    return number ? bit_cast<int>(value + kRound) + (zero.whole - kRoundBits) : zero.whole;
  } else {
    return number ? encode_level(quotient) : 7;
  }
}

// The lowest bytes of four words.
QK_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410);
}

// Eight codes as they lie in storage. Those of 4 bits are 0 to 15.
template <int kBits>
QK_DEVICE void pack_eight(uint32_t (&words)[kBits / 4], const int* codes) {
#pragma unroll
  for (int w = 0; w < kBits / 4; ++w) {
    constexpr int kEach = 32 / kBits;
    const int* const c = codes + w * kEach;
    if constexpr (kBits == 8) {
      words[w] = low_bytes(static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                           static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3]));
    } else if constexpr (kBits == 16) {
      words[w] = prmt(static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]), 0x5410);
    } else {
      words[w] = 0;
#pragma unroll
      for (int i = kEach - 1; i >= 0; --i) words[w] = words[w] * 16 + static_cast<uint32_t>(c[i]);
    }
  }
}

// Codes as they lie in storage: one, the two of a byte, or eights.
template <Format kFormat, int kUnit>
QK_DEVICE void store_codes(uint8_t* to, const int (&codes)[kUnit]) {
  constexpr int kBits = info(kFormat).bits;
  if constexpr (kUnit % kEight == 0) {
    constexpr int kWords = kUnit * kBits / 32, kOfEight = kBits / 4;
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kUnit / kEight; ++i) {
      uint32_t eight[kOfEight];
      pack_eight<kBits>(eight, codes + i * kEight);
#pragma unroll
      for (int j = 0; j < kOfEight; ++j) words[i * kOfEight + j] = eight[j];
    }
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        store_128(to + i * 4, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
      }
    } else if constexpr (kWords == 2) {
      store_64(to, make_uint2(words[0], words[1]));
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) store_code(to, kFormat, i, codes[i]);
  }
}

template <Format kFormat, int kUnit>
QK_DEVICE void load_codes(int (&codes)[kUnit], const uint8_t* from) {
  constexpr int kBits = info(kFormat).bits;
  if constexpr (kUnit == kEight) {
    uint32_t words[kBits / 4];
    if constexpr (kBits == 16) {
      const uint4 v = load_128(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kBits == 8) {
      const uint2 v = load_64(from);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = load_32(from);
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const uint32_t code = words[i * kBits / 32] >> i * kBits % 32 & ((1u << kBits) - 1);
      codes[i] = kBits == 8    ? static_cast<int8_t>(code)
                 : kBits == 16 ? static_cast<int16_t>(code)
                               : static_cast<int>(code);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) codes[i] = load_code(from, kFormat, i);
  }
}

}  // namespace qkernels::cuda
