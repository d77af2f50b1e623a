// AVX-512 (F, BW, DQ, VL) under the names that the .inl kernels use; simd_avx2.h has the same
// names. Include it inside the ISA's namespace and target region. Conversions equal core/codec.h to
// the bit. Everything is forced inline: a call from code of another ISA does not compile.
#define SIMD static inline __attribute__((always_inline))

constexpr int kWidth = 16;  // float lanes of a vector
using F = __m512;           // floats
using I = __m512i;          // int32
using M = __mmask16;        // one truth value per lane

// ---- Constants, bits, masks ---------------------------------------------------------------------

SIMD F splat(float x) { return _mm512_set1_ps(x); }
SIMD I splat(int32_t x) { return _mm512_set1_epi32(x); }
SIMD I bits(F x) { return _mm512_castps_si512(x); }
SIMD F floats(I x) { return _mm512_castsi512_ps(x); }

// The first `count` lanes, 0 <= count <= kWidth.
SIMD M first(int count) { return static_cast<M>((1u << count) - 1); }

// ---- Arithmetic ---------------------------------------------------------------------------------

SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// a < b ? a : b and a > b ? a : b, so a NaN in either gives b.
SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
SIMD F abs(F x) { return floats(_mm512_and_si512(bits(x), splat(0x7fffffff))); }
SIMD F negate(F x) { return floats(_mm512_xor_si512(bits(x), splat(INT32_MIN))); }

SIMD I add(I a, I b) { return _mm512_add_epi32(a, b); }
SIMD I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
SIMD I max(I a, I b) { return _mm512_max_epi32(a, b); }
SIMD I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
SIMD I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
SIMD I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int Count>
SIMD I shift_left(I x) {
  return _mm512_slli_epi32(x, Count);
}
template <int Count>
SIMD I shift_right(I x) {
  return _mm512_srli_epi32(x, Count);
}  // fills with zeros

SIMD F to_float(I x) { return _mm512_cvtepi32_ps(x); }
SIMD I round_int(F x) { return _mm512_cvtps_epi32(x); }  // half to even

// ---- Comparisons: false when an operand is NaN -------------------------------------------------

SIMD M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SIMD M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SIMD M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
SIMD M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
SIMD M is_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
SIMD F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
SIMD I select(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
SIMD F zero_unless(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
SIMD I zero_unless(M m, I x) { return _mm512_maskz_mov_epi32(m, x); }
SIMD F zero_nan(F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
SIMD I increment(I x, M m) { return _mm512_mask_add_epi32(x, m, x, splat(1)); }  // where true

// ---- Reductions ---------------------------------------------------------------------------------

SIMD float reduce_min(F x) { return _mm512_reduce_min_ps(x); }  // no NaN inside
SIMD float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
SIMD int32_t reduce_max(I x) { return _mm512_reduce_max_epi32(x); }
SIMD int32_t reduce_add(I x) { return _mm512_reduce_add_epi32(x); }

// Lanes in pairs, as sum_lanes() adds them.
SIMD float sum_halves(F x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// ---- Tables -------------------------------------------------------------------------------------

// 16 entries; an index is read modulo 16.
struct Table16 {
  F entries;
};
SIMD Table16 table16(const float* entries) { return {_mm512_loadu_ps(entries)}; }
SIMD F lookup(const Table16& t, I index) { return _mm512_permutexvar_ps(index, t.entries); }

// ---- Floats in memory ---------------------------------------------------------------------------

SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
SIMD I load(const int32_t* p) { return _mm512_loadu_si512(p); }
SIMD void store(float* p, F x) { _mm512_storeu_ps(p, x); }
SIMD void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
SIMD void stream(float* p, F x) { _mm512_stream_ps(p, x); }  // aligned, past the caches

SIMD F from_bf16(__m256i x) { return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
SIMD __m256i to_bf16(F x) {
  // Rounds by integer addition: the hardware instruction flushes subnormals.
  const I b = bits(x);
  const I odd = bit_and(shift_right<16>(b), splat(1));
  const I rounded = shift_right<16>(add(b, add(odd, splat(0x7fff))));
  const I quiet = bit_or(shift_right<16>(b), splat(0x40));
  return _mm512_cvtepi32_epi16(select(is_nan(x), quiet, rounded));
}
SIMD F from_f16(__m256i x) { return _mm512_cvtph_ps(x); }
SIMD __m256i to_f16(F x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// kWidth elements from data[i] on. T is a float type.
template <DType T>
SIMD F load_as(const void* data, int64_t i) {
  if constexpr (T == DType::f32) return load(static_cast<const float*>(data) + i);
  const __m256i half =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
  if constexpr (T == DType::bf16) return from_bf16(half);
  return from_f16(half);
}
// The first `count` of them, 0 in the other lanes; nothing past them is touched.
template <DType T>
SIMD F load_as(const void* data, int64_t i, int count) {
  if constexpr (T == DType::f32) {
    return _mm512_maskz_loadu_ps(first(count), static_cast<const float*>(data) + i);
  }
  const __m256i half =
      _mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t*>(data) + i);
  if constexpr (T == DType::bf16) return from_bf16(half);
  return from_f16(half);
}
template <DType T>
SIMD void store_as(void* data, int64_t i, F x) {
  if constexpr (T == DType::f32) return store(static_cast<float*>(data) + i, x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i),
                      T == DType::bf16 ? to_bf16(x) : to_f16(x));
}
template <DType T>
SIMD void store_as(void* data, int64_t i, F x, int count) {
  if constexpr (T == DType::f32) {
    return _mm512_mask_storeu_ps(static_cast<float*>(data) + i, first(count), x);
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + i, first(count),
                           T == DType::bf16 ? to_bf16(x) : to_f16(x));
}

// ---- Integers in memory: kWidth (or the first `count`, the others 0) as int32 -------------------

SIMD I load_i8(const void* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
SIMD I load_i8(const void* p, int count) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), p));
}
SIMD I load_i16(const void* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
SIMD I load_i16(const void* p, int count) {
  return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
}
// Two codes per byte, the even one in the low nibble.
SIMD I spread_nibbles(__m128i bytes) {
  const __m512i wide = _mm512_cvtepu8_epi64(bytes);
  return bit_and(_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28)), splat(0xf));
}
SIMD I load_u4(const void* p) {
  return spread_nibbles(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
SIMD I load_u4(const void* p, int count) {
  return spread_nibbles(_mm_maskz_loadu_epi8(first((count + 1) / 2), p));
}

// Lanes hold numbers that fit.
SIMD void store_i8(void* p, I x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
SIMD void store_i8(void* p, I x, int count) {
  _mm_mask_storeu_epi8(p, first(count), _mm512_cvtepi32_epi8(x));
}
SIMD void store_i16(void* p, I x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
SIMD void store_i16(void* p, I x, int count) {
  _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16(x));
}
SIMD __m128i join_nibbles(I x) {
  return _mm512_cvtepi64_epi8(_mm512_or_si512(x, _mm512_srli_epi64(x, 28)));
}
SIMD void store_u4(void* p, I x) { _mm_storel_epi64(static_cast<__m128i*>(p), join_nibbles(x)); }
// Writes whole bytes: an odd `count` clears the last high nibble.
SIMD void store_u4(void* p, I x, int count) {
  _mm_mask_storeu_epi8(p, first((count + 1) / 2), join_nibbles(zero_unless(first(count), x)));
}

// The low words of two lanes, side by side.
SIMD I pair_words(I low, I high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
}

// ---- 4 * kWidth codes at once -------------------------------------------------------------------

// Four vectors of int32 as bytes, in order; what does not fit becomes the nearest that does.
SIMD I join_pieces(I bytes) {
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}
SIMD I narrow(I a, I b, I c, I d) {
  return join_pieces(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}
// The same with `zero`, a byte, added in between, but for `join_pieces`: piece p, of 16 bytes, has
// the p-th four lanes of each vector.
SIMD I narrow_pieces(I a, I b, I c, I d, int zero) {
  const I zeros = _mm512_set1_epi16(static_cast<int16_t>(zero));
  return _mm512_packs_epi16(_mm512_adds_epi16(_mm512_packs_epi32(a, b), zeros),
                            _mm512_adds_epi16(_mm512_packs_epi32(c, d), zeros));
}
// The first Count * kWidth bytes, Count from 1 to 4.
template <int Count>
SIMD void store_first(void* p, I bytes) {
  __m128i* const to = static_cast<__m128i*>(p);
  if constexpr (Count == 4) return _mm512_storeu_si512(p, bytes);
  if constexpr (Count == 1) return _mm_storeu_si128(to, _mm512_castsi512_si128(bytes));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(bytes));
  if constexpr (Count == 3) _mm_storeu_si128(to + 2, _mm512_extracti32x4_epi32(bytes, 2));
}
SIMD I clamp_bytes(I x, int low, int high) {
  return _mm512_min_epi8(_mm512_max_epi8(x, _mm512_set1_epi8(static_cast<char>(low))),
                         _mm512_set1_epi8(static_cast<char>(high)));
}
SIMD I max_bytes(I a, I b) { return _mm512_max_epi8(a, b); }
SIMD I load_all(const void* p) { return _mm512_loadu_si512(p); }
// The first `count` < 4 * kWidth of them, 0 in the other lanes.
SIMD I load_all(const void* p, int count) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p);
}
SIMD void store_all(void* p, I bytes) { _mm512_storeu_si512(p, bytes); }
SIMD void store_all(void* p, I bytes, int count) {
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << count) - 1, bytes);
}
SIMD void stream_all(void* p, I bytes) { _mm512_stream_si512(static_cast<__m512i*>(p), bytes); }
SIMD void store_all_nibbles(void* p, I bytes) {
  const I pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(pairs));
}

// 256 bytes; an index is a byte.
struct Table256 {
  I words[4];
};
SIMD Table256 table256(const uint8_t* entries) {
  return {{load_all(entries), load_all(entries + 64), load_all(entries + 128),
           load_all(entries + 192)}};
}
// The instruction takes words by 6 bits: here the pair of entries for each word of `at`.
SIMD I entry_pairs(const Table256& t, I at, __mmask32 upper_half) {
  return _mm512_mask_blend_epi16(upper_half, _mm512_permutex2var_epi16(t.words[0], at, t.words[1]),
                                 _mm512_permutex2var_epi16(t.words[2], at, t.words[3]));
}
SIMD __mmask32 test_words(I x, int bit) {
  return _mm512_test_epi16_mask(x, _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
}
SIMD I lookup(const Table256& t, I index) {
  // Even and odd bytes one after the other; each ends where it began.
  const I even = entry_pairs(t, _mm512_srli_epi16(index, 1), test_words(index, 7));
  const I odd = entry_pairs(t, _mm512_srli_epi16(index, 9), _mm512_movepi16_mask(index));
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa,
                                _mm512_mask_srli_epi16(even, test_words(index, 0), even, 8),
                                _mm512_mask_slli_epi16(odd, ~test_words(index, 8), odd, 8));
}

// ---- 4 * kWidth bytes in pieces of 16 ----------------------------------------------------------

// The first `count` pieces, 0 in the others.
SIMD I load_pieces(const void* p, int count) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count * 4) - 1), p);
}
SIMD I interleave_low_bytes(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
SIMD I interleave_high_bytes(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
SIMD I interleave_low_words(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
SIMD I interleave_high_words(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
// Four vectors of bytes as words of one byte of each, in pieces: x[v] has words 4 v on of each.
SIMD void interleave_bytes(I (&x)[4]) {
  const I low = interleave_low_bytes(x[0], x[1]), high = interleave_high_bytes(x[0], x[1]);
  const I low2 = interleave_low_bytes(x[2], x[3]), high2 = interleave_high_bytes(x[2], x[3]);
  x[0] = interleave_low_words(low, low2);
  x[1] = interleave_high_words(low, low2);
  x[2] = interleave_low_words(high, high2);
  x[3] = interleave_high_words(high, high2);
}
// The first pieces of all four vectors side by side, then the second ones, and so on.
SIMD void transpose_pieces(I (&x)[4]) {
  const I a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const I c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// ---- kWidth rows of kWidth floats become columns ------------------------------------------------

SIMD void transpose(F (&x)[kWidth]) {
  F y[kWidth];
  // Squares of 4 x 4 within each quarter, then the quarters.
  for (int i = 0; i < kWidth; i += 4) {
    const F a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const F c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
    const F d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const F a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x44);
    const F b = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x44);
    const F c = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xee);
    const F d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xee);
    x[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[i + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

// ---- 2 * kWidth int16 ---------------------------------------------------------------------------

SIMD I load_words(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SIMD I add_words(I a, I b) { return _mm512_add_epi16(a, b); }
SIMD I first_words(I x) { return _mm512_cvtepi16_epi32(_mm512_castsi512_si256(x)); }
SIMD I last_words(I x) { return _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(x, 1)); }

// ---- One lane of packed lines: kWidth codes in ascending k, from 4 bytes of each 64-byte line ---

SIMD I load_lane_i8(const uint8_t* p) {
  int32_t line[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&line[i], p + i * kLine, 4);
  return _mm512_cvtepi8_epi32(_mm_setr_epi32(line[0], line[1], line[2], line[3]));
}
SIMD I load_lane_u4(const uint8_t* p) {
  int32_t line[2];
  for (int i = 0; i < 2; ++i) std::memcpy(&line[i], p + i * kLine, 4);
  const I both = _mm512_mask_set1_epi32(splat(line[0]), 0xff00, line[1]);
  const I shifts = _mm512_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28, 0, 8, 16, 24, 4, 12, 20, 28);
  return bit_and(_mm512_srlv_epi32(both, shifts), splat(0xf));
}
