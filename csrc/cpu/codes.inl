// Vector forms of core/codec.h, equal to it to the bit: ranges, encoding, decoding, and codes in
// storage.

// ---- Dispatch on an element type and a format ---------------------------------------------------

template <DType T>
using Element = std::integral_constant<DType, T>;
template <Format Fmt>
using Code = std::integral_constant<Format, Fmt>;

template <class Body>
inline void with_float_type(DType type, const Body& body) {
  switch (type) {
    case DType::f32:
      return body(Element<DType::f32>{});
    case DType::bf16:
      return body(Element<DType::bf16>{});
    default:
      return body(Element<DType::f16>{});
  }
}

template <class Body>
inline void with_format(Format format, const Body& body) {
  switch (format) {
    case Format::int8:
      return body(Code<Format::int8>{});
    case Format::int4:
      return body(Code<Format::int4>{});
    case Format::nf4:
      return body(Code<Format::nf4>{});
    case Format::int16:
      return body(Code<Format::int16>{});
  }
}

struct Span {
  int64_t begin, end;  // of neighbours in a row
};

// ---- Memory -------------------------------------------------------------------------------------

// A page that comes into use costs a walk through the page tables, and the CPU's own prefetching
// begins anew. Whoever goes through memory by steps of so many bytes asks, once a page, for a line
// a few pages further on, so that the walk is done by then. Past an array's end that is harmless.
constexpr int64_t kPage = 4096, kPagesAhead = 8;
SIMD void approach(const void* p, int64_t step) {
  if (reinterpret_cast<uintptr_t>(p) % kPage < static_cast<uintptr_t>(step)) {
    __builtin_prefetch(static_cast<const char*>(p) + kPagesAhead * kPage);
  }
}

// ---- Ranges -------------------------------------------------------------------------------------

// kWidth ranges at once. A NaN leaves min and max alone and shows in the magnitude. Lanes filled up
// with 0 change nothing. (No member initializers: GCC compiles an implicit constructor for the
// baseline target.)
struct Ranges {
  F min, max;
  I magnitude;
};
SIMD Ranges no_ranges() { return {splat(0.0f), splat(0.0f), splat(0)}; }

// A symmetric scale needs the magnitude alone; min and max then stay 0.
template <bool Signed>
SIMD void extend(Ranges* r, F x) {
  r->magnitude = max(r->magnitude, bits(abs(x)));
  if constexpr (Signed) {
    r->min = min(x, r->min);
    r->max = max(x, r->max);
  }
}

template <bool Signed>
SIMD Range reduce(const Ranges& r) {
  Range result;
  result.magnitude = static_cast<uint32_t>(reduce_max(r.magnitude));
  if constexpr (Signed) {
    result.min = reduce_min(r.min);
    result.max = reduce_max(r.max);
  }
  return result;
}

// `from_memory` says that no cache is likely to hold the numbers.
template <DType T, bool Signed>
SIMD Range range_of(const void* x, int64_t begin, int64_t end, bool from_memory = false) {
  Ranges r = no_ranges();
  int64_t i = begin;
  if (from_memory) {
    constexpr int64_t kStep = 4 * kWidth;
    for (; i + kStep <= end; i += kStep) {
      approach(static_cast<const char*>(x) + i * bytes_of(T), kStep * bytes_of(T));
      unroll<4>([&](int v) INLINE { extend<Signed>(&r, load_as<T>(x, i + v * kWidth)); });
    }
  }
  for (; i + kWidth <= end; i += kWidth) extend<Signed>(&r, load_as<T>(x, i));
  if (i < end) extend<Signed>(&r, load_as<T>(x, i, static_cast<int>(end - i)));
  return reduce<Signed>(r);
}

// ---- Scales of kWidth groups at once: choose_affine of core/codec.h, lane by lane ---------------

struct Affines {
  F scale, inverse;
  I zero_point;
};

// A positive, finite scale as its stored type holds it: neither 0 nor infinite.
SIMD F round_scale(F scale, DType type) {
  if (type == DType::bf16) return min(from_bf16(to_bf16(scale)), splat(0x1.fep127f));
  if (type == DType::f16) {
    return max(min(from_f16(to_f16(scale)), splat(65504.0f)), splat(0x1p-24f));
  }
  return scale;
}

template <Format Fmt, bool Symmetric>
SIMD Affines choose_affines(const Ranges& r, DType scale_type) {
  const FormatInfo& f = info(Fmt);
  const float steps = static_cast<float>(f.asymmetric_max - f.asymmetric_min);
  F scale = Symmetric ? div(floats(r.magnitude), splat(f.symmetric_range))
                      : sub(div(r.max, splat(steps)), div(r.min, splat(steps)));
  scale = round_scale(max(scale, splat(kSmallestScale)), scale_type);
  const M empty = equal(r.magnitude, splat(0));
  const M broken = greater(r.magnitude, splat(0x7f7fffff));  // NaN or Inf
  scale = select(empty, splat(1.0f), select(broken, splat(NAN), scale));
  const F inverse = div(splat(1.0f), scale);
  if constexpr (Symmetric) return {scale, inverse, splat(symmetric_zero(Fmt))};
  const F low = splat(static_cast<float>(f.asymmetric_min));
  const F high = splat(static_cast<float>(f.asymmetric_max));
  const I whole = round_int(min(max(sub(low, mul(r.min, inverse)), low), high));
  const I zero = Fmt == Format::int4 ? shift_left<3>(whole) : whole;
  return {scale, inverse, select(empty, splat(0), select(broken, splat(0), zero))};
}

// ---- Numbers to codes and back ------------------------------------------------------------------

// The bounds are taken before the zero point's whole code is added, and after its fraction.
template <Format Fmt>
struct Encoder {
  F inverse, low, high;
  I zero;
};
template <>
struct Encoder<Format::int4> {
  F inverse, low, high;
  I zero;
  F fraction;
};
template <>
struct Encoder<Format::nf4> {
  F inverse;
  Table16 middles;
};

// A cubic fit of level numbers: guess(middle i) rounds to i, for every i and with 0.24 to spare, so
// that the code is the rounded guess, or one more when the number lies above that middle.
SIMD F nf4_guess(F value) {
  const F slope = fma(mul(value, value), splat(-4.347f), splat(11.318f));
  return fma(value, slope, splat(6.772f));
}

template <Format Fmt>
SIMD Encoder<Fmt> make_encoder(float inverse, int zero_point, bool symmetric) {
  if constexpr (Fmt == Format::nf4) {
    return {splat(inverse), table16(kNf4Middles.at)};
  } else {
    const ZeroParts zero = zero_parts(zero_point, Fmt);
    const F low = splat(static_cast<float>(code_min(Fmt, symmetric) - zero.whole));
    const F high = splat(static_cast<float>(code_max(Fmt, symmetric) - zero.whole));
    if constexpr (Fmt == Format::int4) {
      return {splat(inverse), low, high, splat(zero.whole), splat(zero.fraction)};
    } else {
      return {splat(inverse), low, high, splat(zero.whole)};
    }
  }
}
template <Format Fmt>
SIMD Encoder<Fmt> make_encoder(const Affine& affine, bool symmetric) {
  return make_encoder<Fmt>(affine.inverse, affine.zero_point, symmetric);
}

template <Format Fmt>
SIMD I encode(const Encoder<Fmt>& e, F x) {
  // A NaN counts as 0, so its code is the zero point.
  const F quotient = zero_nan(mul(x, e.inverse));
  if constexpr (Fmt == Format::nf4) {
    const F value = min(max(quotient, splat(-1.0f)), splat(1.0f));
    const I guess = round_int(nf4_guess(value));
    return increment(guess, greater(value, lookup(e.middles, guess)));
  } else {
    F moved = quotient;
    if constexpr (Fmt == Format::int4) moved = add(quotient, e.fraction);
    return add(round_int(min(max(moved, e.low), e.high)), e.zero);
  }
}

// The same for finite numbers whose quotients are far from the ends of int32; the code is not yet
// brought into its range (nf4's always is).
template <Format Fmt, bool Symmetric>
SIMD I encode_tame(const Encoder<Fmt>& e, F x) {
  const F quotient = mul(x, e.inverse);
  if constexpr (Fmt == Format::nf4) {
    const I guess = round_int(nf4_guess(quotient));
    return increment(guess, greater(quotient, lookup(e.middles, guess)));
  } else {
    F moved = quotient;
    if constexpr (Fmt == Format::int4 && !Symmetric) moved = add(quotient, e.fraction);
    const I code = round_int(moved);
    return Symmetric && Fmt == Format::int8 ? code : add(code, e.zero);
  }
}

template <Format Fmt>
struct Decoder {
  F scale, zero;
};
template <>
struct Decoder<Format::nf4> {
  F scale;
  Table16 levels;
};

template <Format Fmt>
SIMD Decoder<Fmt> make_decoder(float scale, int zero_point) {
  if constexpr (Fmt == Format::nf4) {
    return {splat(scale), table16(kNf4Levels.at)};
  } else {
    constexpr float kStep = 1.0f / static_cast<float>(info(Fmt).zero_steps);
    return {splat(scale), splat(static_cast<float>(zero_point) * kStep)};
  }
}

template <Format Fmt>
SIMD F decode(const Decoder<Fmt>& d, I code) {
  if constexpr (Fmt == Format::nf4) {
    return mul(lookup(d.levels, code), d.scale);
  } else {
    return mul(sub(to_float(code), d.zero), d.scale);
  }
}

// ---- Codes in storage: kWidth of them from code k of a row on, or the first `count` -------------
// k is even for the 4-bit formats.

template <Format Fmt>
SIMD I load_codes(const uint8_t* row, int64_t k) {
  if constexpr (Fmt == Format::int8) return load_i8(row + k);
  if constexpr (Fmt == Format::int16) return load_i16(row + k * 2);
  return load_u4(row + (k >> 1));
}
template <Format Fmt>
SIMD I load_codes(const uint8_t* row, int64_t k, int count) {
  if constexpr (Fmt == Format::int8) return load_i8(row + k, count);
  if constexpr (Fmt == Format::int16) return load_i16(row + k * 2, count);
  return load_u4(row + (k >> 1), count);
}
template <Format Fmt>
SIMD void store_codes(uint8_t* row, int64_t k, I codes) {
  if constexpr (Fmt == Format::int8) return store_i8(row + k, codes);
  if constexpr (Fmt == Format::int16) return store_i16(row + k * 2, codes);
  return store_u4(row + (k >> 1), codes);
}
template <Format Fmt>
SIMD void store_codes(uint8_t* row, int64_t k, I codes, int count) {
  if constexpr (Fmt == Format::int8) return store_i8(row + k, codes, count);
  if constexpr (Fmt == Format::int16) return store_i16(row + k * 2, codes, count);
  return store_u4(row + (k >> 1), codes, count);
}
