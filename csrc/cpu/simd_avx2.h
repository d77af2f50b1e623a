// AVX2, FMA and F16C under the names that the .inl kernels use; simd_avx512.h has the same names.
// Include it inside the ISA's namespace and target region. Conversions equal core/codec.h to the
// bit. Everything is forced inline: a call from code of another ISA does not compile.
#define SIMD static inline __attribute__((always_inline))

constexpr int kWidth = 8;  // float lanes of a vector
using F = __m256;          // floats
using I = __m256i;         // int32
struct M {                 // one truth value per lane: all ones or all zeros
  __m256 lanes;
};

// ---- Constants, bits, masks ---------------------------------------------------------------------

SIMD F splat(float x) { return _mm256_set1_ps(x); }
SIMD I splat(int32_t x) { return _mm256_set1_epi32(x); }
SIMD I bits(F x) { return _mm256_castps_si256(x); }
SIMD F floats(I x) { return _mm256_castsi256_ps(x); }

// The first `count` lanes, 0 <= count <= kWidth.
SIMD M first(int count) {
  return {floats(_mm256_cmpgt_epi32(splat(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))};
}

// ---- Arithmetic ---------------------------------------------------------------------------------

SIMD F add(F a, F b) { return _mm256_add_ps(a, b); }
SIMD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SIMD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SIMD F div(F a, F b) { return _mm256_div_ps(a, b); }
SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// a < b ? a : b and a > b ? a : b, so a NaN in either gives b.
SIMD F min(F a, F b) { return _mm256_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
SIMD F abs(F x) { return floats(_mm256_and_si256(bits(x), splat(0x7fffffff))); }
SIMD F negate(F x) { return floats(_mm256_xor_si256(bits(x), splat(INT32_MIN))); }

SIMD I add(I a, I b) { return _mm256_add_epi32(a, b); }
SIMD I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
SIMD I max(I a, I b) { return _mm256_max_epi32(a, b); }
SIMD I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
SIMD I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
SIMD I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
template <int Count>
SIMD I shift_left(I x) {
  return _mm256_slli_epi32(x, Count);
}
template <int Count>
SIMD I shift_right(I x) {
  return _mm256_srli_epi32(x, Count);
}  // fills with zeros

SIMD F to_float(I x) { return _mm256_cvtepi32_ps(x); }
SIMD I round_int(F x) { return _mm256_cvtps_epi32(x); }  // half to even

// ---- Comparisons: false when an operand is NaN -------------------------------------------------

SIMD M less(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
SIMD M greater(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_GT_OQ)}; }
SIMD M greater(I a, I b) { return {floats(_mm256_cmpgt_epi32(a, b))}; }
SIMD M equal(I a, I b) { return {floats(_mm256_cmpeq_epi32(a, b))}; }
SIMD M is_nan(F x) { return {_mm256_cmp_ps(x, x, _CMP_UNORD_Q)}; }
SIMD F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m.lanes); }
SIMD I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, bits(m.lanes)); }
SIMD F zero_unless(M m, F x) { return _mm256_and_ps(m.lanes, x); }
SIMD I zero_unless(M m, I x) { return _mm256_and_si256(bits(m.lanes), x); }
SIMD F zero_nan(F x) { return _mm256_and_ps(_mm256_cmp_ps(x, x, _CMP_ORD_Q), x); }
SIMD I increment(I x, M m) { return sub(x, bits(m.lanes)); }  // where true

// ---- Reductions ---------------------------------------------------------------------------------

SIMD float reduce_min(F x) {  // no NaN inside
  __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_min_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_min_ss(y, _mm_movehdup_ps(y)));
}
SIMD float reduce_max(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
SIMD int32_t reduce_max(I x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
SIMD int32_t reduce_add(I x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// Lanes in pairs, as sum_lanes() adds them.
SIMD float sum_halves(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// ---- Tables -------------------------------------------------------------------------------------

// 16 entries; an index is read modulo 16.
struct Table16 {
  F low, high;
};
SIMD Table16 table16(const float* entries) {
  return {_mm256_loadu_ps(entries), _mm256_loadu_ps(entries + 8)};
}
SIMD F lookup(const Table16& t, I index) {
  // Bit 3 in the sign picks the half.
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index),
                          _mm256_permutevar8x32_ps(t.high, index), floats(shift_left<28>(index)));
}

// ---- Memory: AVX2 has no masks for bytes and words, so a ragged end goes through the stack ------

SIMD __m128i load_bytes(const void* p, int64_t count) {
  alignas(16) uint8_t buffer[16] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
SIMD void store_bytes(void* p, __m128i x, int64_t count) {
  alignas(16) uint8_t buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  std::memcpy(p, buffer, static_cast<size_t>(count));
}

// ---- Floats in memory ---------------------------------------------------------------------------

SIMD F load(const float* p) { return _mm256_loadu_ps(p); }
SIMD I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SIMD void store(float* p, F x) { _mm256_storeu_ps(p, x); }
SIMD void store(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
SIMD void stream(float* p, F x) { _mm256_stream_ps(p, x); }  // aligned, past the caches

// The low words of the lanes, in order.
SIMD __m128i low_words(I x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
SIMD F from_bf16(__m128i x) { return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
SIMD __m128i to_bf16(F x) {
  const I b = bits(x);
  const I odd = bit_and(shift_right<16>(b), splat(1));
  const I rounded = shift_right<16>(add(b, add(odd, splat(0x7fff))));
  const I quiet = bit_or(shift_right<16>(b), splat(0x40));
  return low_words(select(is_nan(x), quiet, rounded));
}
SIMD F from_f16(__m128i x) { return _mm256_cvtph_ps(x); }
SIMD __m128i to_f16(F x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// kWidth elements from data[i] on. T is a float type.
template <DType T>
SIMD F load_as(const void* data, int64_t i) {
  if constexpr (T == DType::f32) return load(static_cast<const float*>(data) + i);
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + i));
  if constexpr (T == DType::bf16) return from_bf16(half);
  return from_f16(half);
}
// The first `count` of them, 0 in the other lanes; nothing past them is touched.
template <DType T>
SIMD F load_as(const void* data, int64_t i, int count) {
  if constexpr (T == DType::f32) {
    return _mm256_maskload_ps(static_cast<const float*>(data) + i, bits(first(count).lanes));
  }
  const __m128i half = load_bytes(static_cast<const uint16_t*>(data) + i, count * 2);
  if constexpr (T == DType::bf16) return from_bf16(half);
  return from_f16(half);
}
template <DType T>
SIMD void store_as(void* data, int64_t i, F x) {
  if constexpr (T == DType::f32) return store(static_cast<float*>(data) + i, x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + i),
                   T == DType::bf16 ? to_bf16(x) : to_f16(x));
}
template <DType T>
SIMD void store_as(void* data, int64_t i, F x, int count) {
  if constexpr (T == DType::f32) {
    return _mm256_maskstore_ps(static_cast<float*>(data) + i, bits(first(count).lanes), x);
  }
  store_bytes(static_cast<uint16_t*>(data) + i, T == DType::bf16 ? to_bf16(x) : to_f16(x),
              count * 2);
}

// ---- Integers in memory: kWidth (or the first `count`, the others 0) as int32 -------------------

SIMD I load_i8(const void* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
SIMD I load_i8(const void* p, int count) { return _mm256_cvtepi8_epi32(load_bytes(p, count)); }
SIMD I load_i16(const void* p) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
SIMD I load_i16(const void* p, int count) {
  return _mm256_cvtepi16_epi32(load_bytes(p, count * 2));
}
// Two codes per byte, the even one in the low nibble.
SIMD I spread_nibbles(__m128i bytes) {
  const __m256i wide = _mm256_cvtepu8_epi64(bytes);
  return bit_and(_mm256_or_si256(wide, _mm256_slli_epi64(wide, 28)), splat(0xf));
}
SIMD I load_u4(const void* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return spread_nibbles(_mm_cvtsi32_si128(bytes));
}
SIMD I load_u4(const void* p, int count) { return spread_nibbles(load_bytes(p, (count + 1) / 2)); }

// Lanes hold numbers that fit.
SIMD __m128i low_bytes(I x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return _mm_packs_epi16(words, words);
}
SIMD __m128i signed_words(I x) {
  return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
SIMD void store_i8(void* p, I x) { _mm_storel_epi64(static_cast<__m128i*>(p), low_bytes(x)); }
SIMD void store_i8(void* p, I x, int count) { store_bytes(p, low_bytes(x), count); }
SIMD void store_i16(void* p, I x) { _mm_storeu_si128(static_cast<__m128i*>(p), signed_words(x)); }
SIMD void store_i16(void* p, I x, int count) { store_bytes(p, signed_words(x), count * 2); }
SIMD __m128i join_nibbles(I x) {
  // The low byte of every 64 bits; a byte shuffle and a dword shuffle bring the four together.
  const __m256i joined = _mm256_or_si256(x, _mm256_srli_epi64(x, 28));
  const __m256i pairs = _mm256_shuffle_epi8(
      joined, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                               -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  return _mm_or_si128(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
SIMD void store_u4(void* p, I x) {
  const int32_t bytes = _mm_cvtsi128_si32(join_nibbles(x));
  std::memcpy(p, &bytes, 4);
}
// Writes whole bytes: an odd `count` clears the last high nibble.
SIMD void store_u4(void* p, I x, int count) {
  store_bytes(p, join_nibbles(zero_unless(first(count), x)), (count + 1) / 2);
}

// The low words of two lanes, side by side.
SIMD I pair_words(I low, I high) {
  return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

// ---- 4 * kWidth codes at once -------------------------------------------------------------------

SIMD I join_pieces(I bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
// Four vectors of int32 as bytes, in order; what does not fit becomes the nearest that does.
SIMD I narrow(I a, I b, I c, I d) {
  return join_pieces(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
}
// The same with `zero`, a byte, added in between, but for `join_pieces`: piece p, of 16 bytes, has
// the p-th four lanes of each vector.
SIMD I narrow_pieces(I a, I b, I c, I d, int zero) {
  const I zeros = _mm256_set1_epi16(static_cast<int16_t>(zero));
  return _mm256_packs_epi16(_mm256_adds_epi16(_mm256_packs_epi32(a, b), zeros),
                            _mm256_adds_epi16(_mm256_packs_epi32(c, d), zeros));
}
// The first Count * kWidth bytes, Count 1, 2 or 4.
template <int Count>
SIMD void store_first(void* p, I bytes) {
  const __m128i low = _mm256_castsi256_si128(bytes);
  if constexpr (Count == 1) {
    _mm_storel_epi64(static_cast<__m128i*>(p), low);
  } else if constexpr (Count == 2) {
    _mm_storeu_si128(static_cast<__m128i*>(p), low);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), bytes);
  }
}
SIMD I clamp_bytes(I x, int low, int high) {
  return _mm256_min_epi8(_mm256_max_epi8(x, _mm256_set1_epi8(static_cast<char>(low))),
                         _mm256_set1_epi8(static_cast<char>(high)));
}
SIMD I max_bytes(I a, I b) { return _mm256_max_epi8(a, b); }
SIMD I load_all(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// The first `count` < 4 * kWidth of them, 0 in the other lanes.
SIMD I load_all(const void* p, int count) {
  alignas(32) uint8_t buffer[32] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}
SIMD void store_all(void* p, I bytes) { _mm256_storeu_si256(static_cast<__m256i*>(p), bytes); }
SIMD void store_all(void* p, I bytes, int count) {
  alignas(32) uint8_t buffer[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), bytes);
  std::memcpy(p, buffer, static_cast<size_t>(count));
}
SIMD void stream_all(void* p, I bytes) { _mm256_stream_si256(static_cast<__m256i*>(p), bytes); }
SIMD void store_all_nibbles(void* p, I bytes) {
  const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(_mm256_castsi256_si128(pairs),
                                                              _mm256_extracti128_si256(pairs, 1)));
}

// 256 bytes; an index is a byte.
struct Table256 {
  const uint8_t* entries;
};
SIMD Table256 table256(const uint8_t* entries) { return {entries}; }
// Rows of 16 entries: the low nibble picks from each of `Count` rows, the bits of the high nibble
// from pairs of candidates. `bits[i]` has bit 4 + i of the index in its sign.
template <int Count>
SIMD I lookup_rows(const uint8_t* rows, I low, const I (&bits)[4]) {
  if constexpr (Count == 1) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), low);
  } else {
    constexpr int kHalf = Count / 2;
    constexpr int kBit = Count == 2 ? 0 : Count == 4 ? 1 : Count == 8 ? 2 : 3;
    return _mm256_blendv_epi8(lookup_rows<kHalf>(rows, low, bits),
                              lookup_rows<kHalf>(rows + kHalf * 16, low, bits), bits[kBit]);
  }
}
SIMD I lookup(const Table256& t, I index) {
  const I twice = _mm256_add_epi8(index, index), four = _mm256_add_epi8(twice, twice);
  const I bits[4] = {_mm256_add_epi8(four, four), four, twice, index};
  return lookup_rows<16>(t.entries, _mm256_and_si256(index, _mm256_set1_epi8(0xf)), bits);
}

// ---- 4 * kWidth bytes in pieces of 16 -----------------------------------------------------------

// The first `count` pieces, 0 in the others.
SIMD I load_pieces(const void* p, int count) {
  if (count == 2) return load_all(p);
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
SIMD I interleave_low_bytes(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
SIMD I interleave_high_bytes(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
SIMD I interleave_low_words(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
SIMD I interleave_high_words(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
// Four vectors of bytes as words of one byte of each, in pieces: x[v] has words 4 v on of each.
SIMD void interleave_bytes(I (&x)[4]) {
  const I low = interleave_low_bytes(x[0], x[1]), high = interleave_high_bytes(x[0], x[1]);
  const I low2 = interleave_low_bytes(x[2], x[3]), high2 = interleave_high_bytes(x[2], x[3]);
  x[0] = interleave_low_words(low, low2);
  x[1] = interleave_high_words(low, low2);
  x[2] = interleave_low_words(high, high2);
  x[3] = interleave_high_words(high, high2);
}
// The first pieces of all four vectors side by side, then the second ones.
SIMD void transpose_pieces(I (&x)[4]) {
  const I a = _mm256_permute2x128_si256(x[0], x[1], 0x20);
  const I b = _mm256_permute2x128_si256(x[2], x[3], 0x20);
  const I c = _mm256_permute2x128_si256(x[0], x[1], 0x31);
  const I d = _mm256_permute2x128_si256(x[2], x[3], 0x31);
  x[0] = a, x[1] = b, x[2] = c, x[3] = d;
}

// ---- kWidth rows of kWidth floats become columns ------------------------------------------------

SIMD void transpose(F (&x)[kWidth]) {
  F y[kWidth];
  // Squares of 4 x 4 within each half, then the halves.
  for (int i = 0; i < kWidth; i += 4) {
    const F a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const F c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
    const F d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm256_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
}

// ---- 2 * kWidth int16 ---------------------------------------------------------------------------

SIMD I load_words(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SIMD I add_words(I a, I b) { return _mm256_add_epi16(a, b); }
SIMD I first_words(I x) { return _mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)); }
SIMD I last_words(I x) { return _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1)); }

// ---- One lane of packed lines: kWidth codes in ascending k, from 4 bytes of each 64-byte line ---

SIMD I load_lane_i8(const uint8_t* p) {
  int32_t line[2];
  for (int i = 0; i < 2; ++i) std::memcpy(&line[i], p + i * kLine, 4);
  return _mm256_cvtepi8_epi32(_mm_setr_epi32(line[0], line[1], 0, 0));
}
SIMD I load_lane_u4(const uint8_t* p) {
  int32_t line;
  std::memcpy(&line, p, 4);
  const I shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
  return bit_and(_mm256_srlv_epi32(splat(line), shifts), splat(0xf));
}
