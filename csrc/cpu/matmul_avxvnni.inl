// Dot products of a tile for vpdpbusd on 256 bits; matmul_avx512.inl has the same policies. Two ymm
// hold the 16 output features of a block.
//
// CPUs start two of these instructions and two loads or more per cycle, and have 16 registers. A
// tile of 6x16 keeps 12 sums in them, more than the ten that hide a latency of five cycles, and its
// 2 weights and 6 broadcasts are 8 loads for 12 products. Where rows are fewer, blocks are more.

SIMD I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
SIMD I load_half(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SIMD I broadcast_unit(const uint8_t* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return splat(unit);
}

// Four products of an unsigned and a signed byte, added to an int32 without saturation. The
// compiler is not told of the instruction, so that both encodings give the same code around it.
SIMD void dot4(I& sum, I unsigned_bytes, I signed_bytes) {
  asm(QK_VPDPBUSD " %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
}

// Asks for the codes that a tile of so many rows will use soon. Few rows wait for the memory, which
// wants to know early; with more, the codes come from the L2 cache as a rule.
template <int Rows>
SIMD void prefetch(const uint8_t* p) {
  constexpr int64_t kAhead = Rows <= 3 ? 4096 : 512;
  _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
}

// Adds the products of a unit of each row, x(row), and of four k of each vector of outputs,
// weight(vector). Those that are fewer stay in registers, the others are loaded one by one.
template <class Tile, int Rows, int Vectors, class X, class Weight>
SIMD void add_products(I (&sums)[Vectors][Rows], const X& x, const Weight& weight) {
  if constexpr (Rows < Vectors) {
    I units[Rows];
    unroll<Rows>([&](int r) INLINE { units[r] = x(r); });
    unroll<Vectors>([&](int v) INLINE {
      const I w = weight(v);
      unroll<Rows>([&](int r) INLINE { Tile::dot(sums[v][r], units[r], w); });
    });
  } else {
    I w[Vectors];
    unroll<Vectors>([&](int v) INLINE { w[v] = weight(v); });
    unroll<Rows>([&](int r) INLINE {
      const I unit = x(r);
      unroll<Vectors>([&](int v) INLINE { Tile::dot(sums[v][r], unit, w[v]); });
    });
  }
}

constexpr int blocks_of(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// int8 weights are the signed operand. The activations' top bit is flipped, which adds 128 to each
// code; `start` takes 128 times the sum of the weights away.
struct W8A8 {
  static constexpr Format kFormat = Format::int8;
  static constexpr int kRows = 6, kBlocks = 4, kWideRows = 0;
  static constexpr int kUnit = 4;  // k per unit
  static constexpr int blocks(int rows) { return blocks_of(rows); }
  static const char* name(int64_t rows) {
    if (rows == 1) return "matmul_w8a8_avxvnni_1x64";
    return rows <= 3 ? "matmul_w8a8_avxvnni_3x32" : "matmul_w8a8_avxvnni_6x16";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = true;

  static INLINE void dot(I& sum, I x, I weight) { dot4(sum, x, weight); }

  static INLINE void store_units(uint8_t* out, I codes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out),
                     _mm_xor_si128(low_bytes(codes), _mm_set1_epi8(-128)));
  }
  // sums + the codes of a unit.
  static INLINE I add_units(I sums, I units) {
    dot4(sums, units, _mm256_set1_epi8(1));
    return sub(sums, splat(4 * 0x80));
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate(I (&sums)[Vectors][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    for (int64_t line = 0; line < steps * 2; ++line) {
      unroll<Vectors / 2>([&](int b) INLINE { prefetch<Rows>(codes[b] + line * kLine); });
      add_products<W8A8>(
          sums, [&](int r) INLINE { return broadcast_unit(panel + (line * Rows + r) * 4); },
          [&](int v) INLINE { return load_half(codes[v / 2] + line * kLine + v % 2 * 32); });
    }
  }

  // Convolution: a tile's rows are anywhere in an image of codes, flipped on the way.
  static constexpr int kConvBlocks = 1;
  static constexpr int conv_rows(int) { return kRows; }
  static constexpr bool kConvCodes = true;
  static constexpr const char* kConvName = "conv_w8a8_avxvnni_6x16";
  static constexpr const char* kDepthwiseName = "conv_depthwise_w8a8_avxvnni_2x32";

  template <int Rows, int Vectors>
  static INLINE void accumulate_run(I (&sums)[Vectors][Rows], const uint8_t* const (&x)[Rows],
                                    int64_t offset, const uint8_t* const* codes, int64_t line,
                                    int64_t units) {
    const I flip = splat(static_cast<int32_t>(0x80808080));
    for (int64_t u = 0; u < units; ++u) {
      add_products<W8A8>(
          sums, [&](int r) INLINE { return bit_xor(flip, broadcast_unit(x[r] + offset + u * 4)); },
          [&](int v) INLINE { return load_half(codes[v / 2] + line + u * kLine + v % 2 * 32); });
    }
  }
};

// int4 weights: nibbles are the unsigned operand, activations the signed one.
struct W4A8 {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kRows = 6, kBlocks = 4, kWideRows = 0;
  static constexpr int kUnit = 4;
  static constexpr int blocks(int rows) { return blocks_of(rows); }
  static const char* name(int64_t rows) {
    if (rows == 1) return "matmul_w4a8_avxvnni_1x64";
    return rows <= 3 ? "matmul_w4a8_avxvnni_3x32" : "matmul_w4a8_avxvnni_6x16";
  }
  using Sum = I;
  static constexpr bool kFloat = false, kFlipped = false;
  static constexpr uint64_t kMask = 0x0f0f0f0f0f0f0f0f;

  static INLINE void dot(I& sum, I x, I weight) { dot4(sum, weight, x); }

  static INLINE void store_units(uint8_t* out, I codes) { store_i8(out, codes); }
  static INLINE I add_units(I sums, I units) {
    dot4(sums, _mm256_set1_epi8(1), units);
    return sums;
  }

  // Many rows leave no register for the mask, so it stays in memory.
  static INLINE I low_nibbles(I bytes) {
    alignas(32) static constexpr uint64_t kLow[4] = {kMask, kMask, kMask, kMask};
    I result;
    asm("vpand %2, %1, %0" : "=x"(result) : "x"(bytes), "m"(kLow));
    return result;
  }

  template <int Rows, int Vectors>
  static INLINE void accumulate(I (&sums)[Vectors][Rows], const uint8_t* panel,
                                const uint8_t* const* codes, int64_t steps) {
    for (int64_t line = 0; line < steps; ++line) {
      unroll<Vectors / 2>([&](int b) INLINE { prefetch<Rows>(codes[b] + line * kLine); });
      const auto bytes = [&](int v)
                             INLINE { return load_half(codes[v / 2] + line * kLine + v % 2 * 32); };
      const auto unit = [&](int half, int r) INLINE {
        return broadcast_unit(panel + ((line * 2 + half) * Rows + r) * 4);
      };
      if constexpr (Rows < 3) {
        const I mask = _mm256_set1_epi8(0xf);
        I units[2][Rows];
        unroll<2>([&](int half) INLINE {
          unroll<Rows>([&](int r) INLINE { units[half][r] = unit(half, r); });
        });
        unroll<Vectors>([&](int v) INLINE {
          const I both = bytes(v);
          const I low = bit_and(both, mask), high = bit_and(_mm256_srli_epi16(both, 4), mask);
          unroll<Rows>([&](int r) INLINE { dot(sums[v][r], units[0][r], low); });
          unroll<Rows>([&](int r) INLINE { dot(sums[v][r], units[1][r], high); });
        });
      } else {
        unroll<2>([&](int half) INLINE {
          add_products<W4A8>(
              sums, [&](int r) INLINE { return unit(half, r); },
              [&](int v) INLINE {
                return low_nibbles(half == 0 ? bytes(v) : _mm256_srli_epi16(bytes(v), 4));
              });
        });
      }
    }
  }
};

template <class Body>
inline auto with_tile(const Layout& layout, Activation, const Body& body) {
  if (layout.format == Format::int8) return body(W8A8{});
  return layout.symmetric ? body(W4A8{}) : body(LateZero<W4A8>{});
}
