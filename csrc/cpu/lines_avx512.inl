// What the AVX-512 policies read: lines of a packed weight and units of a panel.
SIMD I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
SIMD I load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
SIMD I broadcast_unit(const uint8_t* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return splat(unit);
}

// How far ahead of the codes in use the next ones are asked for, in bytes.
constexpr int64_t kPrefetch = 512;
SIMD void ask_for(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
SIMD void prefetch(const uint8_t* p) { ask_for(p + kPrefetch); }
