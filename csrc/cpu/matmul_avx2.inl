// Dot products of a tile for AVX2; matmul_avx512.inl has the same policies. Two ymm hold the 16
// output features of a block. vpmaddubsw saturates, so the int8 weights do not use it and the int4
// weights only as often as a 16-bit sum can take.

SIMD I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
SIMD I load_half(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SIMD I broadcast_unit(const uint8_t* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return splat(unit);
}

// Two products of int16 added to an int32, and two of an unsigned and a signed byte added to an
// int16. Inline assembly because GCC 12 reorders the additions and then runs out of registers.
SIMD void dot2_words(I& sum, I x, I weight) {
  I product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=x"(product) : "x"(x), "x"(weight));
}
SIMD void dot2_bytes(I& sum, I unsigned_bytes, I signed_bytes) {
  I product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(sum), "=x"(product)
      : "x"(unsigned_bytes), "x"(signed_bytes));
}

// How far ahead of the codes in use the next ones are asked for, in bytes.
constexpr int64_t kPrefetch = 512;
SIMD void ask_for(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
SIMD void prefetch(const uint8_t* p) { ask_for(p + kPrefetch); }

// int8 weights, widened to int16: first the even bytes of a line meet vpmaddwd, then the odd ones,
// so that a lane keeps its four k. Units are the int16 codes of k 0, 2 and of k 1, 3.
struct W8A8 {
  static constexpr Format kFormat = Format::int8;
  static constexpr int kRows = 6, kBlocks = 4, kWideRows = 0;
  static constexpr int kUnit = 2;  // k per unit
  // Blocks of a tile of `rows`. Few rows are limited by memory, which likes several streams.
  static constexpr int blocks(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
  static const char* name(int64_t rows) {
    if (rows == 1) return "matmul_w8a8_avx2_1x64";
    return rows == 2 ? "matmul_w8a8_avx2_2x32" : "matmul_w8a8_avx2_6x16";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = false, kLooksAhead = true;

  static INLINE void store_units(uint8_t* out, I codes) {
    const __m128i words = signed_words(codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
  }
  // sums + the codes of a unit.
  static INLINE I add_units(I sums, I units) {
    dot2_words(sums, units, _mm256_set1_epi16(1));
    return sums;
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate(I (&sums)[Vectors][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps, const uint8_t* next,
                                int64_t part) {
    for (int64_t line = 0; line < steps * 2; ++line) {
      unroll<Vectors / 2>([&](int b)
                              INLINE { ask_for(next + (codes[b] - codes[0]) + line % 2 * 64); });
      next += line % 2 * part;
      unroll<2>([&](int odd) INLINE {
        I weight[Vectors];
        unroll<Vectors>([&](int v) INLINE {
          const I bytes = load_half(codes[v / 2] + line * 64 + v % 2 * 32);
          weight[v] = _mm256_srai_epi16(odd ? bytes : _mm256_slli_epi16(bytes, 8), 8);
        });
        unroll<Rows>([&](int r) INLINE {
          const I x = broadcast_unit(panel + ((line * 2 + odd) * Rows + r) * 4);
          unroll<Vectors>([&](int v) INLINE { dot2_words(sums[v][r], x, weight[v]); });
        });
      });
    }
  }

  // Convolution: a tile's rows are anywhere in an image of units.
  static constexpr int kConvBlocks = 1;
  static constexpr int conv_rows(int) { return kRows; }
  static constexpr bool kConvCodes = false;
  static constexpr const char* kConvName = "conv_w8a8_avx2_6x16";
  static constexpr const char* kDepthwiseName = "conv_depthwise_w8a8_avx2_4x16";

  // `codes` may be the second half of `out`: reading stays ahead of writing.
  static void codes_to_units(const uint8_t* codes, int64_t count, uint8_t* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const I words =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      store_all(out + i * 2, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
    }
    for (; i < count; i += 4) {
      int32_t four;
      std::memcpy(&four, codes + i, 4);
      const __m128i words = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(four));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i * 2), _mm_shufflelo_epi16(words, 0xd8));
    }
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate_run(I (&sums)[Vectors][Rows], const uint8_t* const (&x)[Rows],
                                    int64_t offset, const uint8_t* const* codes, int64_t line,
                                    int64_t units) {
    for (int64_t u = 0; u < units; ++u) {
      unroll<2>([&](int odd) INLINE {
        I weight[Vectors];
        unroll<Vectors>([&](int v) INLINE {
          const I bytes = load_half(codes[v / 2] + line + u * kLine + v % 2 * 32);
          weight[v] = _mm256_srai_epi16(odd ? bytes : _mm256_slli_epi16(bytes, 8), 8);
        });
        unroll<Rows>([&](int r) INLINE {
          const I xr = broadcast_unit(x[r] + offset + u * 8 + odd * 4);
          unroll<Vectors>([&](int v) INLINE { dot2_words(sums[v][r], xr, weight[v]); });
        });
      });
    }
  }
};

// int4 weights: nibbles are vpmaddubsw's unsigned operand. A product of it is at most
// 2 * 15 * 128 = 3840, so eight of them, 32 k, fit an int16.
struct W4A8 {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kRows = 6, kBlocks = 4, kWideRows = 0;
  static constexpr int kUnit = 4;
  static constexpr int blocks(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
  static const char* name(int64_t rows) {
    if (rows == 1) return "matmul_w4a8_avx2_1x64";
    return rows == 2 ? "matmul_w4a8_avx2_2x32" : "matmul_w4a8_avx2_6x16";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = false;

  static INLINE void store_units(uint8_t* out, I codes) { store_i8(out, codes); }
  static INLINE I add_units(I sums, I units) {
    const I pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), units);
    dot2_words(sums, pairs, _mm256_set1_epi16(1));
    return sums;
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate(I (&sums)[Vectors][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    const I low = _mm256_set1_epi8(0xf);
    for (int64_t begin = 0; begin < steps; begin += 4) {
      const int64_t end = begin + 4 < steps ? begin + 4 : steps;
      I words[Vectors][Rows] = {};
      for (int64_t line = begin; line < end; ++line) {
        unroll<Vectors / 2>([&](int b) INLINE { prefetch(codes[b] + line * 64); });
        unroll<2>([&](int half) INLINE {
          I weight[Vectors];
          unroll<Vectors>([&](int v) INLINE {
            const I bytes = load_half(codes[v / 2] + line * 64 + v % 2 * 32);
            weight[v] = bit_and(half == 0 ? bytes : _mm256_srli_epi16(bytes, 4), low);
          });
          unroll<Rows>([&](int r) INLINE {
            const I x = broadcast_unit(panel + ((line * 2 + half) * Rows + r) * 4);
            unroll<Vectors>([&](int v) INLINE { dot2_bytes(words[v][r], weight[v], x); });
          });
        });
      }
      unroll<Vectors>([&](int v) INLINE {
        unroll<Rows>([&](int r)
                         INLINE { dot2_words(sums[v][r], words[v][r], _mm256_set1_epi16(1)); });
      });
    }
  }
};

// Weights as exact small floats for activations that stay floats.
template <Format Fmt>
struct A16 {
  static constexpr Format kFormat = Fmt;
  static constexpr int kRows = 6, kBlocks = 4, kWideRows = Fmt == Format::int8 ? 24 : 12;
  static constexpr int kWideBlocks = 1, kWideTile = 6;
  static constexpr int kUnit = 1;
  // The sums of an output wait for each other; with few rows, more blocks fill the gaps.
  static constexpr int blocks(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  static const char* name(int64_t rows) {
    constexpr const char* kNames[][3] = {
        {"matmul_w8a16_avx2_6x16", "matmul_w8a16_avx2_3x32", "matmul_w8a16_avx2_1x64"},
        {"matmul_w4a16_avx2_6x16", "matmul_w4a16_avx2_3x32", "matmul_w4a16_avx2_1x64"},
        {"matmul_nf4a16_avx2_6x16", "matmul_nf4a16_avx2_3x32", "matmul_nf4a16_avx2_1x64"}};
    return kNames[static_cast<int>(Fmt)][rows == 1 ? 2 : rows <= 3];
  }
  using Sum = F;
  static constexpr bool kFloat = true;

  // The weights of k of half a line, from its codes and zero points.
  static INLINE F weight(I half, int k, const Table16& levels, I zero) {
    if constexpr (Fmt == Format::int8) {
      return to_float(sub(_mm256_srai_epi32(_mm256_slli_epi32(half, 24 - k * 8), 24), zero));
    }
    const I code = _mm256_srli_epi32(half, k % 4 * 8 + k / 4 * 4);
    if constexpr (Fmt == Format::nf4) return lookup(levels, code);
    return sub(to_float(bit_and(code, splat(0xf))), floats(zero));
  }

  // Zero points as `weight` takes them away: of int4, codes as floats.
  static INLINE I spread_zero(I zero) {
    if constexpr (Fmt != Format::int4) return zero;
    return bits(mul(to_float(zero), splat(1.0f / info(Fmt).zero_steps)));
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate(F (&sums)[Vectors][Rows], I (&zero)[Vectors], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    constexpr int kPerLine = Fmt == Format::int8 ? 4 : 8;
    const float* x = reinterpret_cast<const float*>(panel);
    const Table16 levels = table16(kNf4Levels.at);
    unroll<Vectors>([&](int v) INLINE { zero[v] = spread_zero(zero[v]); });
    for (int64_t line = 0; line < steps * 8 / kPerLine; ++line) {
      unroll<Vectors / 2>([&](int b) INLINE { prefetch(codes[b] + line * 64); });
      unroll<kPerLine>([&](int k) INLINE {
        F w[Vectors];
        unroll<Vectors>([&](int v) INLINE {
          w[v] = weight(load_half(codes[v / 2] + line * 64 + v % 2 * 32), k, levels, zero[v]);
        });
        unroll<Rows>([&](int r) INLINE {
          const F xk = splat(x[(line * kPerLine + k) * Rows + r]);
          unroll<Vectors>([&](int v) INLINE { sums[v][r] = fma(xk, w[v], sums[v][r]); });
        });
      });
    }
  }

  // Unpacked: float[k][16 outputs].
  static INLINE void unpack(const uint8_t* codes, const I (&zero)[2], int64_t steps, uint8_t* out,
                            int64_t) {
    constexpr int kPerLine = Fmt == Format::int8 ? 4 : 8;
    const Table16 levels = table16(kNf4Levels.at);
    float* to = reinterpret_cast<float*>(out);
    const I spread[2] = {spread_zero(zero[0]), spread_zero(zero[1])};
    for (int64_t line = 0; line < steps * 8 / kPerLine; ++line) {
      unroll<2>([&](int v) INLINE {
        const I half = load_half(codes + line * 64 + v * 32);
        unroll<kPerLine>([&](int k) INLINE {
          store(to + (line * kPerLine + k) * kLanes + v * kWidth,
                weight(half, k, levels, spread[v]));
        });
      });
    }
  }

  template <int, int Rows>
  static INLINE void accumulate_unpacked(F (&sums)[2][Rows], const uint8_t* panel,
                                         const uint8_t* unpacked, int64_t units) {
    const float* x = reinterpret_cast<const float*>(panel);
    const float* w = reinterpret_cast<const float*>(unpacked);
    for (int64_t k = 0; k < units; ++k) {
      const F weight[2] = {load(w + k * kLanes), load(w + k * kLanes + kWidth)};
      unroll<Rows>([&](int r) INLINE {
        const F xk = splat(x[k * Rows + r]);
        unroll<2>([&](int v) INLINE { sums[v][r] = fma(xk, weight[v], sums[v][r]); });
      });
    }
  }
};
