// quantize, quantize_with, range and dequantize: storage layout, group after group along a row.

// Ranges of a few groups, then their scales side by side, then the codes while the groups are still
// in the cache: one pass over memory, and no group waits for the divisions of the one before.
template <DType T, Format Fmt, bool Symmetric>
SIMD void quantize_rows(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kInCache = 4096;  // elements
  const int64_t fit = a.group_size * kWidth <= kInCache ? kWidth : kInCache / a.group_size;
  const int64_t batch = fit < 1 ? 1 : fit;
  // Memory would be idle while codes are made, so the next groups are asked for then: all of short
  // ones, the first half of a long one. Each measured best.
  const int64_t share = batch == 1 ? 2 : 1;
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
        const Range r = range_of<T, !Symmetric>(a.x, at + span.begin, at + span.end, true);
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
            const char* next = static_cast<const char*>(a.x) +
                               (at + span.begin + batch * a.group_size) * bytes_of(T);
            span.begin = encode_tame_span<T, Fmt, Symmetric>(a.x, at, affine, span, out, next,
                                                             share, streamed);
          }
        }
        encode_span<T, Fmt>(a.x, at, affine, Symmetric, span, out);
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
                          group_span(g, a.group_size, a.cols), out);
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
      for (; k + 4 * kWidth <= span.end; k += 4 * kWidth) {
        approach(codes + k * info(Fmt).bits / 8, 4 * kWidth * info(Fmt).bits / 8);
        approach(out + k, 4 * kWidth * sizeof(float));
        unroll<4>([&](int v) INLINE {
          const int64_t i = k + v * kWidth;
          stream(out + i, decode(decoder, load_codes<Fmt>(codes, i)));
        });
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
