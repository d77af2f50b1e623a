// Dot products of a tile for AVX-512 VNNI. One zmm holds the 16 output features of a block, so
// nothing is ever summed across lanes. A policy says what the activations' units hold and how large
// a tile is, and adds the products of 8 k at a time to the accumulators.

// vpdpbusd: four products of an unsigned and a signed byte, added to an int32 without saturation.
// Inline assembly because GCC 12 moves the intrinsic's accumulators through the stack.
SIMD void dot4(I& sum, I unsigned_bytes, I signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// Two products of int16 added to an int32.
SIMD void dot2_words(I& sum, I x, I weight) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
}

template <int Blocks, int Rows>
SIMD void add_sums(I (&sums)[Blocks][Rows], const I (&more)[Blocks][Rows]) {
  unroll<Blocks>([&](int b) INLINE {
    unroll<Rows>([&](int r) INLINE { sums[b][r] = add(sums[b][r], more[b][r]); });
  });
}

// int8 weights are the signed operand. The activations' top bit is flipped, which adds 128 to each
// code; `start` takes 128 times the sum of the weights away.
struct W8A8 {
  static constexpr Format kFormat = Format::int8;
  static constexpr int kRows = 8, kBlocks = 6, kWideRows = 0;
  static constexpr int kUnit = 4;  // k per unit
  // Blocks of a tile of `rows`. Few rows are limited by memory, which likes six streams best.
  static constexpr int blocks(int rows) { return rows <= 4 ? 6 : 3; }
  static const char* name(int64_t rows) {
    return rows <= 4 ? "matmul_w8a8_avx512_4x96" : "matmul_w8a8_avx512_8x48";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = true, kLooksAhead = true, kCutsColumns = true;

  static INLINE void store_units(uint8_t* out, I codes) {
    store_i8(out, bit_xor(codes, splat(0x80)));
  }
  // sums + the codes of a unit.
  static INLINE I add_units(I sums, I units) {
    dot4(sums, units, _mm512_set1_epi8(1));
    return sub(sums, splat(4 * 0x80));
  }

  template <int Rows, int Blocks>
  static INLINE void accumulate(I (&sums)[Blocks][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps, const uint8_t* next,
                                int64_t part) {
    // With few accumulators a second set hides the latency.
    constexpr bool kTwo = Rows * Blocks < 8;
    I more[Blocks][Rows] = {};
    for (int64_t step = 0; step < steps; ++step, next += part) {
      unroll<2>([&](int half) INLINE {
        I weight[Blocks];
        unroll<Blocks>([&](int b) INLINE {
          weight[b] = load_line(codes[b] + step * 128 + half * 64);
          ask_for(next + (codes[b] - codes[0]) + half * 64);
        });
        unroll<Rows>([&](int r) INLINE {
          const I x = broadcast_unit(panel + ((step * 2 + half) * Rows + r) * 4);
          unroll<Blocks>([&](int b) INLINE {
            dot4(kTwo && half == 1 ? more[b][r] : sums[b][r], x, weight[b]);
          });
        });
      });
    }
    if constexpr (kTwo) add_sums(sums, more);
  }

  // Convolution: a tile's rows are anywhere in an image of codes, flipped on the way.
  static constexpr int kConvBlocks = 4;
  static constexpr int conv_rows(int blocks) { return blocks == 4 ? 6 : 8; }
  static constexpr bool kConvCodes = true;
  static constexpr const char* kConvName = "conv_w8a8_avx512_6x64";
  static constexpr const char* kDepthwiseName = "conv_depthwise_w8a8_avx512_4x64";

  template <int Rows, int Blocks>
  static INLINE void accumulate_run(I (&sums)[Blocks][Rows], const uint8_t* const (&x)[Rows],
                                    int64_t offset, const uint8_t* const* codes, int64_t line,
                                    int64_t units) {
    const I flip = splat(static_cast<int32_t>(0x80808080));
    for (int64_t u = 0; u < units; ++u) {
      I weight[Blocks];
      unroll<Blocks>([&](int b) INLINE { weight[b] = load_line(codes[b] + line + u * kLine); });
      unroll<Rows>([&](int r) INLINE {
        const I xr = bit_xor(flip, broadcast_unit(x[r] + offset + u * 4));
        unroll<Blocks>([&](int b) INLINE { dot4(sums[b][r], xr, weight[b]); });
      });
    }
  }
};

// int4 weights: nibbles are the unsigned operand, activations the signed one.
struct W4A8 {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kRows = 8, kBlocks = 6, kWideRows = 128;
  static constexpr int kWideBlocks = 3, kWideTile = 4;
  static constexpr int kUnit = 4;
  static constexpr int blocks(int rows) { return rows <= 4 ? 6 : 3; }
  static const char* name(int64_t rows) {
    return rows <= 4 ? "matmul_w4a8_avx512_4x96" : "matmul_w4a8_avx512_8x48";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = false, kLooksAhead = true, kCutsColumns = true;

  static INLINE void store_units(uint8_t* out, I codes) { store_i8(out, codes); }
  static INLINE I add_units(I sums, I units) {
    dot4(sums, _mm512_set1_epi8(1), units);
    return sums;
  }

  template <int Rows, int Blocks>
  static INLINE void accumulate(I (&sums)[Blocks][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps, const uint8_t* next,
                                int64_t part) {
    constexpr bool kTwo = Rows * Blocks < 8;
    I more[Blocks][Rows] = {};
    const I low = _mm512_set1_epi8(0xf);
    for (int64_t step = 0; step < steps; ++step, next += part) {
      unroll<2>([&](int half) INLINE {
        I weight[Blocks];
        unroll<Blocks>([&](int b) INLINE {
          const I bytes = load_line(codes[b] + step * 64);
          weight[b] = bit_and(half == 0 ? bytes : _mm512_srli_epi16(bytes, 4), low);
          if (half == 0) ask_for(next + (codes[b] - codes[0]));
        });
        unroll<Rows>([&](int r) INLINE {
          const I x = broadcast_unit(panel + ((step * 2 + half) * Rows + r) * 4);
          unroll<Blocks>([&](int b) INLINE {
            dot4(kTwo && half == 1 ? more[b][r] : sums[b][r], weight[b], x);
          });
        });
      });
    }
    if constexpr (kTwo) add_sums(sums, more);
  }

  // Unpacked: a byte for each code, in the order of int8 weights.
  static INLINE void unpack(const uint8_t* codes, const I (&)[1], int64_t steps, uint8_t* out,
                            int64_t stride) {
    const I low = _mm512_set1_epi8(0xf);
    for (int64_t step = 0; step < steps; ++step) {
      const I bytes = load_line(codes + step * 64);
      prefetch(codes + step * 64);
      _mm512_store_si512(out + step * 2 * stride, bit_and(bytes, low));
      _mm512_store_si512(out + (step * 2 + 1) * stride, bit_and(_mm512_srli_epi16(bytes, 4), low));
    }
  }

  // A tile has `Rows` rows; the sums are those of some of them.
  template <int Rows, int Count, int Blocks>
  static INLINE void accumulate_unpacked(I (&sums)[Blocks][Count], const uint8_t* panel,
                                         const uint8_t* unpacked, int64_t units) {
    for (int64_t u = 0; u < units; ++u) {
      I weight[Blocks];
      unroll<Blocks>([&](int b)
                         INLINE { weight[b] = load_line(unpacked + (u * Blocks + b) * 64); });
      unroll<Count>([&](int r) INLINE {
        const I x = broadcast_unit(panel + (u * Rows + r) * 4);
        unroll<Blocks>([&](int b) INLINE { dot4(sums[b][r], weight[b], x); });
      });
    }
  }
};

// Weights as exact small floats for activations that stay floats.
template <Format Fmt>
struct A16 {
  static constexpr Format kFormat = Fmt;
  static constexpr int kRows = 8, kBlocks = 4, kWideRows = 0;
  static constexpr int kUnit = 1;
  static constexpr int blocks(int rows) { return rows == 1 ? 4 : 3; }
  static const char* name(int64_t rows) {
    constexpr const char* kNames[][2] = {
        {"matmul_w8a16_avx512_8x48", "matmul_w8a16_avx512_1x64"},
        {"matmul_w4a16_avx512_8x48", "matmul_w4a16_avx512_1x64"},
        {"matmul_nf4a16_avx512_8x48", "matmul_nf4a16_avx512_1x64"}};
    return kNames[static_cast<int>(Fmt)][rows == 1];
  }
  using Sum = F;
  static constexpr bool kFloat = true;

  // The weights of k of a line, from its codes and zero points (int4: as floats, from 2^20 on).
  static INLINE F weight(I line, int k, const Table16& levels, I zero) {
    if constexpr (Fmt == Format::int8) {
      return to_float(sub(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - k * 8), 24), zero));
    }
    const int at = k % 4 * 8 + k / 4 * 4;
    if constexpr (Fmt == Format::nf4) return lookup(levels, _mm512_srli_epi32(line, at));
    // The lowest bits of 2^20 are eighths, as zero points count: with a code three bits up it is
    // the float 2^20 + code, and the difference is exact.
    const I code = at == 0 ? _mm512_slli_epi32(line, 3) : _mm512_srli_epi32(line, at - 3);
    const I number = _mm512_ternarylogic_epi32(code, splat(0x78), splat(k2To20), 0xea);
    return sub(floats(number), floats(zero));
  }
  static constexpr int32_t k2To20 = 0x49800000;
  static_assert(info(Format::int4).zero_steps == 8, "");

  template <int Rows, int Blocks>
  static INLINE void accumulate(F (&sums)[Blocks][Rows], I (&zero)[Blocks], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    constexpr int kPerLine = Fmt == Format::int8 ? 4 : 8;
    const float* x = reinterpret_cast<const float*>(panel);
    const Table16 levels = table16(kNf4Levels.at);
    if (Fmt == Format::int4) {
      unroll<Blocks>([&](int b) INLINE { zero[b] = bit_or(zero[b], splat(k2To20)); });
    }
    for (int64_t line = 0; line < steps * 8 / kPerLine; ++line) {
      unroll<Blocks>([&](int b) INLINE { prefetch(codes[b] + line * 64); });
      unroll<kPerLine>([&](int k) INLINE {
        F w[Blocks];
        unroll<Blocks>([&](int b) INLINE {
          w[b] = weight(load_line(codes[b] + line * 64), k, levels, zero[b]);
        });
        unroll<Rows>([&](int r) INLINE {
          const F xk = splat(x[(line * kPerLine + k) * Rows + r]);
          unroll<Blocks>([&](int b) INLINE { sums[b][r] = fma(xk, w[b], sums[b][r]); });
        });
      });
    }
  }
};
