// quantize, quantize_with, range and dequantize: storage layout, group after group along a row.

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
// it left.
template <DType T, Format Fmt, bool Symmetric>
SIMD int64_t encode_tame_span(const void* x, int64_t at, const Affine& affine, Span span,
                              uint8_t* out, int64_t ahead, bool streamed) {
  constexpr int kBlock = 4 * kWidth;
  constexpr bool kHasZero = !(Symmetric && Fmt == Format::int8);
  const Encoder<Fmt> encoder = make_encoder<Fmt>(affine, Symmetric);
  const char* next = static_cast<const char*>(x) + (at + ahead) * bytes_of(T);
  int64_t k = span.begin;
  for (; k + kBlock <= span.end; k += kBlock) {
    if (ahead != 0) {
      for (int64_t line = 0; line < kBlock * bytes_of(T); line += kLine) {
        __builtin_prefetch(next + k * bytes_of(T) + line, 0, 2);  // read, into the L2 cache
      }
    }
    I codes[4];
    unroll<4>([&](int i) INLINE {
      codes[i] = encode_tame<Fmt, kHasZero>(encoder, load_as<T>(x, at + k + i * kWidth));
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
// that the next one fills. Prefetches x `ahead` elements further on, unless 0.
template <DType T, Format Fmt>
SIMD void encode_span(const void* x, int64_t at, const Affine& affine, bool symmetric, Span span,
                      uint8_t* out, int64_t ahead) {
  int64_t k = span.begin;
  if (starts_inside_byte<Fmt>(span)) {
    store_code(out, Fmt, k, encode(load_float(x, T, at + k), Fmt, affine, symmetric));
    ++k;
  }
  const Encoder<Fmt> encoder = make_encoder<Fmt>(affine, symmetric);
  if (ahead != 0) {
    constexpr int64_t kPerLine = kLine / bytes_of(T);
    const char* next = static_cast<const char*>(x) + (at + ahead) * bytes_of(T);
    for (; k + kPerLine <= span.end; k += kPerLine) {
      __builtin_prefetch(next + k * bytes_of(T), 0, 2);  // read, into the L2 cache
      for (int64_t i = k; i < k + kPerLine; i += kWidth) {
        store_codes<Fmt>(out, i, encode(encoder, load_as<T>(x, at + i)));
      }
    }
  }
  for (; k + kWidth <= span.end; k += kWidth) {
    store_codes<Fmt>(out, k, encode(encoder, load_as<T>(x, at + k)));
  }
  if (k < span.end) {
    const int count = static_cast<int>(span.end - k);
    store_codes<Fmt>(out, k, encode(encoder, load_as<T>(x, at + k, count)), count);
  }
}

// Ranges of a few groups, then their scales side by side, then the codes while the groups are still
// in the cache: one pass over memory, and no group waits for the divisions of the one before.
template <DType T, Format Fmt, bool Symmetric>
SIMD void quantize_rows(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kInCache = 4096;  // elements
  const int64_t fit = a.group_size * kWidth <= kInCache ? kWidth : kInCache / a.group_size;
  const int64_t batch = fit < 1 ? 1 : fit;
  // Memory would be idle while the cache is worked on, so the next groups are asked for then: a
  // long one while this one's range is taken, short ones while codes are made. Each measured best.
  const int64_t next = batch * a.group_size;
  const int64_t ahead_of_range = batch == 1 ? next : 0;
  const int64_t ahead_of_codes = batch == 1 ? 0 : next;
  const bool streamed = (row_end - row_begin) * a.cols >= kStreamed;
  float least[kWidth] = {}, most[kWidth] = {}, scale[kWidth], inverse[kWidth];
  int32_t magnitude[kWidth] = {}, zero[kWidth];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t at = row * a.cols;
    uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
    for (int64_t g = 0; g < a.groups; g += batch) {
      const int count = static_cast<int>(a.groups - g < batch ? a.groups - g : batch);
      for (int i = 0; i < count; ++i) {
        const Span span = group_span(g + i, a.group_size, a.cols);
        const Range r =
            range_of<T, !Symmetric>(a.x, at + span.begin, at + span.end, ahead_of_range);
        least[i] = r.min;
        most[i] = r.max;
        magnitude[i] = static_cast<int32_t>(r.magnitude);
      }
      const Affines affines =
          choose_affines<Fmt, Symmetric>({load(least), load(most), load(magnitude)}, a.scale_type);
      store(scale, affines.scale);
      store(inverse, affines.inverse);
      store(zero, affines.zero_point);
      const int64_t first_scale = row * a.groups + g;
      with_float_type(a.scale_type, [&](auto type) {
        store_as<decltype(type)::value>(a.scale, first_scale, affines.scale, count);
      });
      if constexpr (!Symmetric) {
        store_codes<Fmt == Format::int16 ? Format::int16 : Format::int8>(
            static_cast<uint8_t*>(a.zero_point), first_scale, affines.zero_point, count);
      }
      for (int i = 0; i < count; ++i) {
        Span span = group_span(g + i, a.group_size, a.cols);
        const Affine affine{scale[i], inverse[i], zero[i]};
        if constexpr (Fmt != Format::int16) {
          if (is_tame<Fmt>(magnitude[i], inverse[i]) && !starts_inside_byte<Fmt>(span)) {
            span.begin = encode_tame_span<T, Fmt, Symmetric>(a.x, at, affine, span, out,
                                                             ahead_of_codes, streamed);
          }
        }
        encode_span<T, Fmt>(a.x, at, affine, Symmetric, span, out, ahead_of_codes);
      }
    }
  }
  if (streamed) _mm_sfence();  // streamed stores become visible before the caller goes on
}

template <DType T, Format Fmt>
SIMD void quantize_rows_with(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t i = a.shared_scale ? 0 : row * a.groups + g;
      const float scale = load_float(a.scale, a.scale_type, i);
      const int zero = a.symmetric ? symmetric_zero(Fmt) : load_zero_point(a.zero_point, Fmt, i);
      encode_span<T, Fmt>(a.x, row * a.cols, {scale, 1.0f / scale, zero}, a.symmetric,
                          group_span(g, a.group_size, a.cols), out, 0);
    }
  }
}

// Code k of `codes` to y[at + k], past the caches if `streamed`.
template <DType T, Format Fmt>
SIMD void decode_span(const uint8_t* codes, float scale, int zero, Span span, void* y, int64_t at,
                      bool streamed) {
  int64_t k = span.begin;
  if (starts_inside_byte<Fmt>(span)) {
    store_float(y, T, at + k, decode(load_code(codes, Fmt, k), Fmt, scale, zero));
    ++k;
  }
  const Decoder<Fmt> decoder = make_decoder<Fmt>(scale, zero);
  if constexpr (T == DType::f32) {
    float* out = static_cast<float*>(y) + at;
    if (streamed && reinterpret_cast<uintptr_t>(out + k) % kLine == 0) {
      for (; k + kWidth <= span.end; k += kWidth) {
        stream(out + k, decode(decoder, load_codes<Fmt>(codes, k)));
      }
    }
  }
  for (; k + kWidth <= span.end; k += kWidth) {
    store_as<T>(y, at + k, decode(decoder, load_codes<Fmt>(codes, k)));
  }
  if (k < span.end) {
    const int count = static_cast<int>(span.end - k);
    store_as<T>(y, at + k, decode(decoder, load_codes<Fmt>(codes, k, count)), count);
  }
}

template <DType T, Format Fmt>
SIMD void dequantize_rows(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const bool streamed = (row_end - row_begin) * a.cols >= kStreamed;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint8_t* codes = static_cast<const uint8_t*>(a.data) + row * a.row_bytes;
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t i = a.shared_scale ? 0 : row * a.groups + g;
      const float scale = load_float(a.scale, a.scale_type, i);
      const int zero =
          a.zero_point == nullptr ? symmetric_zero(Fmt) : load_zero_point(a.zero_point, Fmt, i);
      decode_span<T, Fmt>(codes, scale, zero, group_span(g, a.group_size, a.cols), a.y,
                          row * a.cols, streamed);
    }
  }
  if (streamed) _mm_sfence();  // streamed stores become visible before the caller goes on
}

// ---- Table entries ------------------------------------------------------------------------------

void quantize(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  with_float_type(a.x_type, [&](auto type) {
    with_format(a.format, [&](auto code) {
      constexpr DType kType = decltype(type)::value;
      constexpr Format kFormat = decltype(code)::value;
      if constexpr (info(kFormat).has_zero_point) {
        if (!a.symmetric) return quantize_rows<kType, kFormat, false>(a, row_begin, row_end);
      }
      quantize_rows<kType, kFormat, true>(a, row_begin, row_end);
    });
  });
}

void quantize_with(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  with_float_type(a.x_type, [&](auto type) {
    with_format(a.format, [&](auto code) {
      quantize_rows_with<decltype(type)::value, decltype(code)::value>(a, row_begin, row_end);
    });
  });
}

Range range(const void* x, DType type, int64_t begin, int64_t end) {
  Range result;
  with_float_type(type,
                  [&](auto t) { result = range_of<decltype(t)::value, true>(x, begin, end); });
  return result;
}

void dequantize(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  with_float_type(a.y_type, [&](auto type) {
    with_format(a.format, [&](auto code) {
      dequantize_rows<decltype(type)::value, decltype(code)::value>(a, row_begin, row_end);
    });
  });
}
