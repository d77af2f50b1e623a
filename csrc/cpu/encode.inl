// Spans of consecutive numbers to codes, of which quantize.inl and conv.inl are made.

SIMD Span group_span(int64_t g, int64_t group_size, int64_t cols) {
  const int64_t begin = g * group_size;
  return {begin, begin + group_size < cols ? begin + group_size : cols};
}

// A 4-bit group that starts in the middle of a byte: its first code alone, after which k is even.
template <Format Fmt>
SIMD bool starts_inside_byte(const Span& span) {
  return info(Fmt).bits == 4 && span.begin % 2 != 0 && span.begin < span.end;
}

// A plain store first reads the line that it overwrites. Where an output of so many elements is far
// larger than a core's caches, writing past them saves that read: for int8 codes and float32
// numbers; 4-bit codes and 16-bit numbers measured slower so.
constexpr int64_t kStreamed = 1 << 20;

// Whether encode_tame may be used: 16384 is beyond every code, and far below what an int32 holds;
// nf4_guess is good a little beyond 1, where the rounding of a stored scale may lead.
template <Format Fmt>
SIMD bool is_tame(int32_t magnitude, float inverse) {
  float largest;
  std::memcpy(&largest, &magnitude, 4);
  return largest * inverse < (Fmt == Format::nf4 ? 1.01f : 16384.0f);  // false for NaN
}

// encode_span for most of a span that is_tame, 4 * kWidth codes at a time; returns the first k that
// it left. Meanwhile it asks for memory from `next` on (unless null), a `share`th of what it reads.
template <DType T, Format Fmt, bool Symmetric>
SIMD int64_t encode_tame_span(const void* x, int64_t at, const Affine& affine, Span span,
                              uint8_t* out, const char* next, int64_t share, bool streamed) {
  constexpr int kBlock = 4 * kWidth;
  const Encoder<Fmt> encoder = make_encoder<Fmt>(affine, Symmetric);
  const int64_t step = kBlock * bytes_of(T) / share;
  int64_t k = span.begin;
  for (; k + kBlock <= span.end; k += kBlock) {
    if (next != nullptr) {
      for (int64_t line = 0; line < step; line += kLine) {
        __builtin_prefetch(next + line, 0, 2);  // read, into the L2 cache
      }
      next += step;
      approach(out + k * info(Fmt).bits / 8, kBlock * info(Fmt).bits / 8);
    }
    I codes[4];
    unroll<4>([&](int i) INLINE {
      codes[i] = encode_tame<Fmt, Symmetric>(encoder, load_as<T>(x, at + k + i * kWidth));
    });
    const I bytes = clamp_bytes(narrow(codes[0], codes[1], codes[2], codes[3]),
                                code_min(Fmt, Symmetric), code_max(Fmt, Symmetric));
    if constexpr (Fmt == Format::int8) {
      if (streamed && reinterpret_cast<uintptr_t>(out + k) % kBlock == 0) {
        stream_all(out + k, bytes);
      } else {
        store_all(out + k, bytes);
      }
    } else {
      store_all_nibbles(out + k / 2, bytes);
    }
  }
  return k;
}

// x[at + k] to code k of `out`. Writing in ascending order, a group leaves the high nibble clear
// that the next one fills.
template <DType T, Format Fmt>
SIMD void encode_span(const void* x, int64_t at, const Affine& affine, bool symmetric, Span span,
                      uint8_t* out) {
  int64_t k = span.begin;
  if (starts_inside_byte<Fmt>(span)) {
    store_code(out, Fmt, k, encode(load_float(x, T, at + k), Fmt, affine, symmetric));
    ++k;
  }
  const Encoder<Fmt> encoder = make_encoder<Fmt>(affine, symmetric);
  for (; k + kWidth <= span.end; k += kWidth) {
    store_codes<Fmt>(out, k, encode(encoder, load_as<T>(x, at + k)));
  }
  if (k < span.end) {
    const int count = static_cast<int>(span.end - k);
    store_codes<Fmt>(out, k, encode(encoder, load_as<T>(x, at + k, count)), count);
  }
}
