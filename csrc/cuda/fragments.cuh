// Codes of a packed weight as 16-bit operands of the tensor cores, less their zero point and
// without their scale: numbers of eight bits at most, which both types hold exactly, or levels of
// nf4. A few integer instructions for each pair; no conversion instruction, which are slow.
#pragma once

#include "cuda/ptx.cuh"

namespace qkernels::cuda {

// Levels of nf4 in 16 bits: bytes 4i to 4i + 3 of all low bytes, and of all high ones.
struct LevelBytes {
  uint32_t low[4], high[4];
};

// Part 0, 1 or 2 of the levels: the type's nearest to what the parts before leave over. Three of
// bfloat16 add up to a float.
template <DType kType>
LevelBytes level_bytes(int part) {
  LevelBytes bytes{};
  for (int i = 0; i < 16; ++i) {
    float rest = nf4_level(i);
    uint16_t bits = 0;
    for (int j = 0; j <= part; ++j) {
      bits = kType == DType::bf16 ? to_bf16(rest) : to_f16(rest);
      rest -= kType == DType::bf16 ? from_bf16(bits) : from_f16(bits);
    }
    bytes.low[i / 4] |= (bits & 0xffu) << i % 4 * 8;
    bytes.high[i / 4] |= static_cast<uint32_t>(bits >> 8) << i % 4 * 8;
  }
  return bytes;
}

template <DType kType>
QK_DEVICE void mma_float(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kType == DType::bf16) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

QK_DEVICE uint32_t twice(uint32_t half) { return half | half << 16; }

// What eight codes of a lane, e0 to e7, become: pairs[j] is (e(2j), e(2j + 1)). `Zero` is made of a
// zero point once and used for all codes of a group.
template <Format kFormat, DType kType>
struct Codes;

inline constexpr int kAndOr = 0xea;  // lop3: (a & b) | c

// A code in the significand of a power of two is that much more than the code, where its lowest bit
// counts one. The zero point, so much more as well, has room for its eighths behind the code: three
// bits in bfloat16, 16 + code, and four in float16, 64 + code. Both are exact, and so is the
// difference.
template <DType kType>
struct Codes<Format::int4, kType> {
  static constexpr bool kBf16 = kType == DType::bf16;
  static constexpr int kPlace = kBf16 ? 3 : 4;  // of a code in the significand
  static constexpr uint32_t kBase = kBf16 ? 0x4180 : 0x5400;
  static constexpr int kWords = 1;
  using Zero = uint32_t;
  QK_DEVICE static Zero zero(int z) {
    const uint32_t bits = kBase + (static_cast<uint32_t>(z) << (kPlace - 3));
    return twice(kBf16 ? 0x8000 + bits : bits);  // there is no subtraction of bfloat16
  }
  QK_DEVICE static void pairs(uint32_t (&p)[4], const uint32_t (&words)[1], const Zero& z,
                              const LevelBytes&) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int right = 4 * j - kPlace;
      const uint32_t moved = right < 0 ? words[0] << -right : words[0] >> right;
      const uint32_t w = lop3<kAndOr>(moved, twice(15 << kPlace), twice(kBase));
      p[j] = kBf16 ? fma_bf16x2(w, 0x3f803f80, z) : sub_f16x2(w, z);
    }
  }
};

// With its sign turned over, a code is code + 128 of 0 to 255.
template <>
struct Codes<Format::int8, DType::f16> {
  static constexpr int kWords = 2;
  using Zero = uint32_t;
  QK_DEVICE static Zero zero(int z) { return twice(static_cast<uint32_t>(0x6480 + z)); }
  QK_DEVICE static void pairs(uint32_t (&p)[4], const uint32_t (&words)[2], const Zero& z,
                              const LevelBytes&) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t w = words[i] ^ 0x80808080;
      p[2 * i] = sub_f16x2(prmt(w, 0x64646464, 0x4140), z);
      p[2 * i + 1] = sub_f16x2(prmt(w, 0x64646464, 0x4342), z);
    }
  }
};

// Seven bits fit into the significand of 128. The sign, left where it is, is the lowest bit of the
// exponent and makes 256 of 128: just what a negative code is to have subtracted.
template <>
struct Codes<Format::int8, DType::bf16> {
  static constexpr int kWords = 2;
  using Zero = uint32_t;
  QK_DEVICE static Zero zero(int z) { return twice(float_to_bf16(static_cast<float>(-z))); }
  QK_DEVICE static void pairs(uint32_t (&p)[4], const uint32_t (&words)[2], const Zero& z,
                              const LevelBytes&) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t w = prmt(words[j / 2], 0x43434343, j % 2 == 0 ? 0x4140 : 0x4342);
      const uint32_t code = fma_bf16x2(w & 0xff80ff80, 0xbf80bf80, w & 0xff7fff7f);
      p[j] = fma_bf16x2(code, 0x3f803f80, z);
    }
  }
};

// A table of 16 numbers of 16 bits in eight registers. prmt looks four nibbles up in eight bytes,
// so each byte takes two, and a third that picks between them by the nibble's top bit.
template <DType kType>
struct Codes<Format::nf4, kType> {
  static constexpr int kWords = 1;
  struct Zero {};
  QK_DEVICE static Zero zero(int) { return {}; }
  QK_DEVICE static void pairs(uint32_t (&p)[4], const uint32_t (&words)[1], const Zero&,
                              const LevelBytes& table) {
    const uint32_t index = words[0] & 0x77777777;
    const uint32_t pick = lop3<kAndOr>(words[0] >> 1, 0x44444444, 0x32103210);
    uint32_t halves[2][2];  // e0 and e2, e4 and e6; e1 and e3, e5 and e7
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t i = index >> 16 * odd, which = pick >> 16 * odd;
      const uint32_t low =
          prmt(prmt(table.low[0], table.low[1], i), prmt(table.low[2], table.low[3], i), which);
      const uint32_t high =
          prmt(prmt(table.high[0], table.high[1], i), prmt(table.high[2], table.high[3], i), which);
      halves[odd][0] = prmt(low, high, 0x5140);
      halves[odd][1] = prmt(low, high, 0x7362);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[j] = prmt(halves[0][j / 2], halves[1][j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

// The same in a loop without products enough to hide instructions behind. Of nf4 a table in shared
// memory has the two levels of each byte, 32 times, once for each bank, so that the lanes of a warp
// never wait for each other. All threads of the block construct it together.
template <Format kFormat, DType kType>
struct CodePairs {
  using C = Codes<kFormat, kType>;
  static constexpr int kTableBytes = 0;

  QK_DEVICE CodePairs(uint8_t*, const LevelBytes&) {}
  QK_DEVICE void operator()(uint32_t (&p)[4], const uint32_t (&words)[C::kWords],
                            const typename C::Zero& zero) const {
    C::pairs(p, words, zero, {});
  }
};

template <DType kType>
struct CodePairs<Format::nf4, kType> {
  using C = Codes<Format::nf4, kType>;
  static constexpr int kLineBytes = kWarp * 4, kTableBytes = 256 * kLineBytes;
  const uint8_t* table;
  uint32_t bank;

  QK_DEVICE CodePairs(uint8_t* shared, const LevelBytes& levels)
      : table(shared), bank(threadIdx.x % kWarp * 4) {
    const auto level = [&](int i) {
      const int shift = i % 4 * 8;
      return (levels.low[i / 4] >> shift & 0xff) | (levels.high[i / 4] >> shift & 0xff) << 8;
    };
    const int step = static_cast<int>(blockDim.x) / 8;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 8; i < 256; i += step) {
      const uint32_t pair = level(i % 16) | level(i / 16) << 16;
      store_shared_128(shared + i * kLineBytes + threadIdx.x % 8 * 16,
                       make_uint4(pair, pair, pair, pair));
    }
    __syncthreads();
  }

  // The bytes of a word are e0 and e2, e4 and e6, e1 and e3, e5 and e7.
  QK_DEVICE void operator()(uint32_t (&p)[4], const uint32_t (&words)[1],
                            const typename C::Zero&) const {
    constexpr uint32_t kMask = 255 * kLineBytes;
    const uint32_t w = words[0];
    const uint32_t at[4] = {w << 7, w >> 1, w >> 9, w >> 17};
    uint32_t found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      found[i] = load_shared_32(table + lop3<kAndOr>(at[i], kMask, bank));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[j] = prmt(found[j / 2], found[j / 2 + 2], j % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

}  // namespace qkernels::cuda
