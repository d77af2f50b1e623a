// Dot products of a tile for bfloat16 activations that stay floats, by vdpbf16ps: two products
// added to a float32. A code of int8 minus its zero point, or of int4 minus 8, is a whole number
// below 256 in magnitude, which bfloat16 holds exactly, so weights lose nothing; only the levels of
// nf4 are rounded.

SIMD void dot2_bf16(F& sum, I x, I weight) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
}

// The bfloat16 of an integer that it holds exactly, or of an nf4 level.
constexpr uint16_t bf16_of(float x) {
  const uint32_t b = __builtin_bit_cast(uint32_t, x);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// What a 4-bit code stands for, at an index of five bits: the highest is the lowest of another
// code.
template <Format Fmt>
struct Words32 {
  alignas(64) uint16_t of[32];
};
template <Format Fmt>
constexpr Words32<Fmt> words32() {
  Words32<Fmt> t{};
  for (int i = 0; i < 32; ++i) {
    t.of[i] = bf16_of(Fmt == Format::nf4 ? kNf4Levels.at[i % 16]
                                         : static_cast<float>(i % 16 - kInt4Offset));
  }
  return t;
}

// The two bytes of the bfloat16 of 1 to 127. Index 0 stands for 128, of which |code| & 127 is 0.
struct Bytes128 {
  alignas(64) uint8_t low[128], high[128];
};
constexpr Bytes128 bytes128() {
  Bytes128 t{};
  for (int i = 0; i < 128; ++i) {
    const uint16_t word = bf16_of(static_cast<float>(i == 0 ? 128 : i));
    t.low[i] = static_cast<uint8_t>(word);
    t.high[i] = static_cast<uint8_t>(word >> 8);
  }
  return t;
}

// table[index & 127]; AVX512_VBMI.
SIMD I lookup(const uint8_t* table, I index) {
  const I below = _mm512_load_si512(table), above = _mm512_load_si512(table + 64);
  asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(below), "v"(above));
  return index;
}
SIMD I lookup(const uint8_t* table, I index, __mmask64 there) {  // 0 elsewhere
  const I below = _mm512_load_si512(table), above = _mm512_load_si512(table + 64);
  asm("vpermi2b %2, %1, %0%{%3%}%{z%}" : "+v"(index) : "v"(below), "v"(above), "Yk"(there));
  return index;
}

// A unit of x holds two k, and so does a line of unpacked weights: of each eight, k and k + 2 for
// k = 0, 1, 4, 5, because that is where the bytes of a packed line put them. `ByTable` is for int8
// without zero points on CPUs with AVX512_VBMI: the bits are the same, it is faster.
template <Format Fmt, bool ByTable = false>
struct A16 {
  static constexpr Format kFormat = Fmt;
  static constexpr int kRows = 8, kBlocks = 6, kWideRows = Fmt == Format::int8 ? 48 : 96;
  static constexpr int kWideBlocks = 3, kWideTile = 4;
  static constexpr int kUnit = 2;
  static constexpr int blocks(int rows) { return rows <= 2 ? 6 : 3; }
  static const char* name(int64_t rows) {
    constexpr const char* kNames[][2] = {
        {"matmul_w8a16_avx512bf16_8x48", "matmul_w8a16_avx512bf16_2x96"},
        {"matmul_w4a16_avx512bf16_8x48", "matmul_w4a16_avx512bf16_2x96"},
        {"matmul_nf4a16_avx512bf16_8x48", "matmul_nf4a16_avx512bf16_2x96"}};
    return kNames[static_cast<int>(Fmt)][rows <= 2];
  }
  using Sum = F;
  static constexpr bool kFloat = true;
  static constexpr int kPairs = Fmt == Format::int8 ? 2 : 4;  // units that a packed line holds
  // Of them that `weights` makes. A `vpermi2b` takes the time of 2.6 products: with more rows the
  // other way costs less.
  static constexpr int at_once(int rows) { return ByTable && rows <= 6 ? 2 : 1; }
  static constexpr Words32<Fmt> kWords = words32<Fmt>();
  static constexpr Bytes128 kBytes128 = bytes128();

  // Words of x as units; 0 up to the next multiple of 8 k.
  static void copy_units(const uint16_t* x, int64_t count, uint8_t* units) {
    const I order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int64_t i = 0; i < count; i += 2 * kWidth) {
      const int64_t left = count - i < 2 * kWidth ? count - i : 2 * kWidth;
      const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      const __mmask32 padded =
          static_cast<__mmask32>((uint64_t{1} << round_up(left, kGroupPad)) - 1);
      const I words = _mm512_maskz_loadu_epi16(there, x + i);
      _mm512_mask_storeu_epi16(units + i * 2, padded, _mm512_shuffle_epi8(words, order));
    }
  }

  // sums + the numbers of a unit.
  static INLINE F add_units(F sums, I units) {
    dot2_bf16(sums, units, _mm512_set1_epi16(bf16_of(1.0f)));
    return sums;
  }

  // Units of a packed line from `pair` on; `zero` as words, of int8 alone.
  template <int Count>
  static INLINE void weights(I line, int pair, I words, I zero, I (&out)[Count]) {
    if constexpr (Count == 2) {
      const I order = _mm512_broadcast_i32x4(
          _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
      const I code = _mm512_shuffle_epi8(line, order);
      const I size = _mm512_abs_epi8(code);
      const I low = lookup(kBytes128.low, size);
      const I high = lookup(kBytes128.high, size, _mm512_test_epi8_mask(code, code));
      const I with_sign =  // high | (code & 0x80)
          _mm512_ternarylogic_epi32(high, code, splat(static_cast<int32_t>(0x80808080)), 0xf8);
      out[0] = _mm512_unpacklo_epi8(low, with_sign);
      out[1] = _mm512_unpackhi_epi8(low, with_sign);
    } else {
      out[0] = weight(line, pair, words, zero);
    }
  }
  static INLINE I weight(I line, int pair, I words, I zero) {
    if constexpr (Fmt == Format::int8) {
      const I code = _mm512_srai_epi16(pair == 0 ? _mm512_slli_epi16(line, 8) : line, 8);
      const I number = _mm512_sub_epi16(code, zero);
      const F low = to_float(_mm512_srai_epi32(_mm512_slli_epi32(number, 16), 16));
      const F high = to_float(_mm512_srai_epi32(number, 16));
      return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits(low), 16), bits(high));
    }
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(line, pair % 2 * 8 + pair / 2 * 4), words);
  }

  template <int Rows, int Blocks>
  static INLINE void accumulate(F (&sums)[Blocks][Rows], I (&zero)[Blocks], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    constexpr int kAtOnce = at_once(Rows);
    const I words = _mm512_load_si512(kWords.of);
    unroll<Blocks>([&](int b) INLINE { zero[b] = pair_words(zero[b], zero[b]); });
    for (int64_t line = 0; line < steps * 4 / kPairs; ++line) {
      unroll<Blocks>([&](int b) INLINE { prefetch(codes[b] + line * 64); });
      unroll<kPairs / kAtOnce>([&](int part) INLINE {
        const int pair = part * kAtOnce;
        I w[Blocks][kAtOnce];
        unroll<Blocks>([&](int b) INLINE {
          weights(load_line(codes[b] + line * 64), pair, words, zero[b], w[b]);
        });
        unroll<kAtOnce>([&](int p) INLINE {
          const uint8_t* x = panel + (line * kPairs + pair + p) * Rows * 4;
          unroll<Rows>([&](int r) INLINE {
            const I unit = broadcast_unit(x + r * 4);
            unroll<Blocks>([&](int b) INLINE { dot2_bf16(sums[b][r], unit, w[b][p]); });
          });
        });
      });
    }
  }

  static INLINE void unpack(const uint8_t* codes, const I (&zero)[1], int64_t steps, uint8_t* out,
                            int64_t stride) {
    constexpr int kAtOnce = at_once(1);
    const I words = _mm512_load_si512(kWords.of);
    const I spread = pair_words(zero[0], zero[0]);
    for (int64_t line = 0; line < steps * 4 / kPairs; ++line) {
      const I bytes = load_line(codes + line * 64);
      prefetch(codes + line * 64);
      unroll<kPairs / kAtOnce>([&](int part) INLINE {
        const int pair = part * kAtOnce;
        I w[kAtOnce];
        weights(bytes, pair, words, spread, w);
        unroll<kAtOnce>([&](int p) INLINE {
          _mm512_store_si512(out + (line * kPairs + pair + p) * stride, w[p]);
        });
      });
    }
  }

  // A tile has `Rows` rows; the sums are those of some of them.
  template <int Rows, int Count, int Blocks>
  static INLINE void accumulate_unpacked(F (&sums)[Blocks][Count], const uint8_t* panel,
                                         const uint8_t* unpacked, int64_t units) {
    for (int64_t u = 0; u < units; ++u) {
      I w[Blocks];
      unroll<Blocks>([&](int b) INLINE { w[b] = load_line(unpacked + (u * Blocks + b) * 64); });
      unroll<Count>([&](int r) INLINE {
        const I x = broadcast_unit(panel + (u * Rows + r) * 4);
        unroll<Blocks>([&](int b) INLINE { dot2_bf16(sums[b][r], x, w[b]); });
      });
    }
  }
};

template <class Body>
inline auto with_tile(const Layout& layout, Activation, const Body& body) {
  switch (layout.format) {
    case Format::int8:
      if (layout.symmetric && has_vbmi()) return body(A16<Format::int8, true>{});
      return body(A16<Format::int8>{});
    case Format::int4:
      if (layout.symmetric) return body(A16<Format::int4>{});
      return body(LateZero<A16<Format::int4>>{});
    default:
      return body(A16<Format::nf4>{});
  }
}
