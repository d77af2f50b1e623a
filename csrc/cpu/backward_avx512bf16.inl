// dx for bfloat16 dy: two n at a time by vdpbf16ps, weights rounded to bfloat16.

struct Pairs {
  static constexpr int kN = 2;
  static constexpr bool kTurnsLines = true;
  static INLINE void add_product(F& sum, F dy, F weight) { dot2_bf16(sum, bits(dy), bits(weight)); }
  static INLINE F join(const F (&weights)[kN]) {
    const I order = pair_words(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
    return floats(_mm512_permutexvar_epi16(order, round_words(weights[0], weights[1])));
  }
  // The words of `low`, then those of `high`.
  static INLINE I round_words(F low, F high) {
    I words;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(low), "v"(high));
    return words;
  }
  template <Format Fmt>
  static void turn_lines(const PackedRows& w, int64_t n, int64_t count, Span columns, float* panel);
};

// Lines of 16 outputs and 16 k as rows of the panel: row p has, for each k, outputs 2p and 2p + 1.
constexpr int kPairRows = kLanes / 2;

// Loads spread and widen for nothing what GCC would take out of registers by shuffles.
template <class T>
SIMD void keep_in_memory(T& x) {
  asm("" : "+m"(x));
}

// A 4-bit code of a group stands for one of 16 numbers, so 32 words are all that the codes of two
// outputs can become. They are dequantized and rounded once; after that the words of a row come by
// index: the code, and 16 more for the second output.
template <Format Fmt>
struct Turn {
  I numbers[kPairRows];

  INLINE void start(F scales, I zeros) {
    alignas(64) float scale[kLanes];
    alignas(64) int32_t zero[kLanes];
    store(scale, scales);
    store(zero, zeros);
    keep_in_memory(scale);
    keep_in_memory(zero);
    const I codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto all = [&](int lane) INLINE {
      return decode(make_decoder<Fmt>(scale[lane], zero[lane]), codes);
    };
    unroll<kPairRows>([&](int p)
                          INLINE { numbers[p] = Pairs::round_words(all(2 * p), all(2 * p + 1)); });
  }

  INLINE void lines(const uint8_t* codes, float* row) const {
    // Four outputs of a line are 16 bytes of eight k; twice the same, once for the high nibbles.
    const I shifts = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    const I second = _mm512_set1_epi64(0x1010101000000000);
    const I order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15));
    const I line0 = load_line(codes), line1 = load_line(codes + kLine);
    unroll<4>([&](auto four) INLINE {
      const I quarter = _mm512_shuffle_i32x4(line0, line1, decltype(four)::value * 0x55);
      const I nibbles = bit_and(_mm512_srlv_epi64(quarter, shifts), _mm512_set1_epi8(0xf));
      // Words of a k: outputs 0 and 2 in one, 1 and 3 in the other.
      const I index = _mm512_shuffle_epi8(bit_or(nibbles, second), order);
      const int p = 2 * four;
      store(row + p * kStrip, floats(_mm512_permutexvar_epi16(index, numbers[p])));
      store(row + (p + 1) * kStrip,
            floats(_mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), numbers[p + 1])));
    });
  }
};

// The numbers of eight k and two outputs, the outputs in turns, are rounded with those of the next
// eight k, which leaves each word at its place.
template <>
struct Turn<Format::int8> {
  F scale[kPairRows];
  I zero[kPairRows];

  INLINE void start(F scales, I zeros) {
    alignas(64) int64_t scale_pairs[kPairRows], zero_pairs[kPairRows];
    _mm512_store_ps(scale_pairs, scales);
    _mm512_store_si512(zero_pairs, zeros);
    keep_in_memory(scale_pairs);
    keep_in_memory(zero_pairs);
    unroll<kPairRows>([&](int p) INLINE {
      scale[p] = floats(_mm512_set1_epi64(scale_pairs[p]));
      zero[p] = _mm512_set1_epi64(zero_pairs[p]);
    });
  }

  INLINE void lines(const uint8_t* codes, float* row) const {
    const I order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    alignas(64) uint8_t pieces[4][kLine];  // eight k and two outputs are 16 bytes
    unroll<2>([&](int half) INLINE {
      const I even = load_line(codes + 2 * half * kLine);
      const I odd = load_line(codes + (2 * half + 1) * kLine);
      store_all(pieces[half], _mm512_shuffle_epi8(_mm512_unpacklo_epi32(even, odd), order));
      store_all(pieces[2 + half], _mm512_shuffle_epi8(_mm512_unpackhi_epi32(even, odd), order));
    });
    keep_in_memory(pieces);
    unroll<kPairRows>([&](int p) INLINE {
      const auto number = [&](int half) INLINE {
        const I code = load_i8(pieces[p % 2 * 2 + half] + p / 2 * 16);
        return mul(to_float(sub(code, zero[p])), scale[p]);
      };
      store(row + p * kStrip, floats(Pairs::round_words(number(0), number(1))));
    });
  }
};

// W[n .. n + count)[columns] into the panel; n and columns.begin are multiples of 16.
template <Format Fmt>
void Pairs::turn_lines(const PackedRows& w, int64_t n, int64_t count, Span columns, float* panel) {
  const BlockShape& s = w.shape;
  for (int64_t i = 0; i < count; i += kLanes) {
    const uint8_t* const packed = w.packed + (n + i) / kLanes * s.bytes;
    float* const row = panel + i / kN * kStrip;
    for (int64_t k = columns.begin; k < columns.end;) {
      const int64_t g = k / s.group_size;
      Turn<Fmt> turn;
      turn.start(load_scale(w, packed, g * kLanes), load_zero(w, packed, g * kLanes));
      const int64_t group_end = (g + 1) * s.group_size;
      const int64_t end = group_end < columns.end ? group_end : columns.end;
      for (; k < end; k += kWidth) {
        const uint8_t* const codes = packed + code_offset(Fmt, k, 0);
        // The same columns of the next 16 outputs: far off in memory, and soon needed.
        unroll<Fmt == Format::int8 ? 4 : 2>(
            [&](int line) INLINE { ask_for(codes + s.bytes + line * kLine); });
        turn.lines(codes, row + panel_column<Pairs>(k - columns.begin));
      }
    }
  }
}
