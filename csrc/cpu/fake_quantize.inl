// fake_quantize and its gradient: x to codes and back in one pass over memory, no code stored. A
// code minus its zero point is the clipped quotient, rounded, so the zero point is never added:
// only its fraction is, and taken away again.

// The bounds are those of a code minus its zero point, or of the NF4 levels.
template <Format Fmt>
struct Faker {
  F inverse, scale, low, high;
};
template <>
struct Faker<Format::int4> {
  F inverse, scale, low, high;
  F fraction;
};
template <>
struct Faker<Format::nf4> {
  F inverse, scale, low, high;
  Table16 middles, levels;
};

template <Format Fmt>
SIMD Faker<Fmt> make_faker(const Affine& affine, bool symmetric) {
  const F inverse = splat(affine.inverse), scale = splat(affine.scale);
  if constexpr (Fmt == Format::nf4) {
    return {
        inverse, scale, splat(-1.0f), splat(1.0f), table16(kNf4Middles.at), table16(kNf4Levels.at)};
  } else {
    const int zero = affine.zero_point;
    const F low = splat(code_value(code_min(Fmt, symmetric), Fmt, zero));
    const F high = splat(code_value(code_max(Fmt, symmetric), Fmt, zero));
    if constexpr (Fmt == Format::int4) {
      return {inverse, scale, low, high, splat(zero_parts(zero, Fmt).fraction)};
    } else {
      return {inverse, scale, low, high};
    }
  }
}

// The value of a quotient's code in units of the scale. By way of an integer, which has no -0.
template <Format Fmt>
SIMD F nearest(const Faker<Fmt>& f, F quotient) {
  if constexpr (Fmt == Format::int4) {
    const F low = add(f.low, f.fraction), high = add(f.high, f.fraction);
    const F moved = add(zero_nan(quotient), f.fraction);
    return sub(to_float(round_int(min(max(moved, low), high))), f.fraction);
  }
  const F inside = min(max(zero_nan(quotient), f.low), f.high);
  if constexpr (Fmt == Format::nf4) {
    const I guess = round_int(nf4_guess(inside));
    return lookup(f.levels, increment(guess, greater(inside, lookup(f.middles, guess))));
  } else {
    return to_float(round_int(inside));
  }
}

// fake() of core/codec.h.
template <Format Fmt>
SIMD F fake(const Faker<Fmt>& f, F x) {
  const F y = mul(nearest(f, mul(x, f.inverse)), f.scale);
  return select(less(abs(x), splat(INFINITY)), y, splat(NAN));
}

template <DType T, Format Fmt>
SIMD void fake_span(const FakeQuantizeArgs& a, int64_t begin, int64_t end, const Affine& affine,
                    bool streamed) {
  const Faker<Fmt> faker = make_faker<Fmt>(affine, a.symmetric);
  int64_t i = begin;
  if constexpr (T == DType::f32) {
    float* y = static_cast<float*>(a.y);
    if (streamed && reinterpret_cast<uintptr_t>(y + i) % kLine == 0) {
      for (; i + kWidth <= end; i += kWidth) stream(y + i, fake(faker, load_as<T>(a.x, i)));
    }
  }
  for (; i + kWidth <= end; i += kWidth) store_as<T>(a.y, i, fake(faker, load_as<T>(a.x, i)));
  if (i < end) {
    const int count = static_cast<int>(end - i);
    store_as<T>(a.y, i, fake(faker, load_as<T>(a.x, i, count)), count);
  }
}

// Elements of the groups whose ranges are taken before their values are computed.
constexpr int64_t kFakeInCache = 4096;

// As quantize_rows: ranges of a few groups, their scales side by side, and then the values.
template <DType T, Format Fmt, bool Symmetric>
SIMD void fake_rows(const FakeQuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const bool streamed = (row_end - row_begin) * a.cols >= kStreamed;
  float least[kWidth] = {}, most[kWidth] = {}, scale[kWidth], inverse[kWidth];
  int32_t magnitude[kWidth] = {}, zero[kWidth];
  const int64_t fit = kFakeInCache / (a.group_size < 1 ? 1 : a.group_size);
  const int64_t batch = fit < 1 ? 1 : fit < kWidth ? fit : kWidth;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t at = row * a.cols;
    for (int64_t g = 0; g < a.groups; g += batch) {
      const int count = static_cast<int>(a.groups - g < batch ? a.groups - g : batch);
      for (int i = 0; i < count; ++i) {
        const Span span = group_span(g + i, a.group_size, a.cols);
        const Range r = range_of<T, !Symmetric>(a.x, at + span.begin, at + span.end);
        least[i] = r.min;
        most[i] = r.max;
        magnitude[i] = static_cast<int32_t>(r.magnitude);
      }
      const Affines affines =
          choose_affines<Fmt, Symmetric>({load(least), load(most), load(magnitude)}, a.scale_type);
      store(scale, affines.scale);
      store(inverse, affines.inverse);
      store(zero, affines.zero_point);
      for (int i = 0; i < count; ++i) {
        const Span span = group_span(g + i, a.group_size, a.cols);
        fake_span<T, Fmt>(a, at + span.begin, at + span.end, {scale[i], inverse[i], zero[i]},
                          streamed);
      }
    }
  }
  if (streamed) _mm_sfence();  // streamed stores become visible before the caller goes on
}

template <DType T, Format Fmt>
SIMD void fake_rows_with(const FakeQuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const bool streamed = (row_end - row_begin) * a.cols >= kStreamed;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const Span span = group_span(g, a.group_size, a.cols);
      fake_span<T, Fmt>(a, row * a.cols + span.begin, row * a.cols + span.end,
                        given_affine(a, row, g), streamed);
    }
  }
  if (streamed) _mm_sfence();
}

// ---- Gradient -----------------------------------------------------------------------------------
// Sums go through kSumLanes lanes on every ISA, so that they are the same to the bit.

constexpr int kSumVectors = kSumLanes / kWidth;

struct FakeSums {
  F scale[kSumVectors], zero[kSumVectors];
};

// `here` holds the lanes that exist.
template <Format Fmt>
SIMD F fake_gradient(const Faker<Fmt>& f, F x, F grad, M here, F* scale_sum, F* zero_sum) {
  const F quotient = mul(x, f.inverse);
  const F value = nearest(f, quotient);
  const F none = splat(0.0f);
  // A NaN is on neither side, so it stays one.
  const M below = less(quotient, f.low), above = greater(quotient, f.high);
  const F slope = select(below, value, select(above, value, sub(value, quotient)));
  const F clipped = select(below, grad, select(above, grad, none));
  *scale_sum = select(here, fma(grad, slope, *scale_sum), *scale_sum);
  *zero_sum = select(here, add(*zero_sum, clipped), *zero_sum);
  return select(below, none, select(above, none, grad));
}

template <DType T, Format Fmt>
SIMD void fake_backward_span(const FakeBackwardArgs& a, int64_t begin, int64_t end, int64_t group,
                             const Affine& affine) {
  const Faker<Fmt> faker = make_faker<Fmt>(affine, a.symmetric);
  FakeSums sums;
  unroll<kSumVectors>([&](int v) INLINE { sums.scale[v] = sums.zero[v] = splat(0.0f); });
  int64_t i = begin;
  for (; i + kSumLanes <= end; i += kSumLanes) {
    unroll<kSumVectors>([&](int v) INLINE {
      const int64_t at = i + v * kWidth;
      const F dx = fake_gradient(faker, load_as<T>(a.x, at), load_as<T>(a.grad, at), first(kWidth),
                                 &sums.scale[v], &sums.zero[v]);
      store_as<T>(a.dx, at, dx);
    });
  }
  unroll<kSumVectors>([&](int v) INLINE {
    const int64_t at = i + v * kWidth;
    if (at >= end) return;
    const int count = static_cast<int>(end - at < kWidth ? end - at : kWidth);
    const F dx = fake_gradient(faker, load_as<T>(a.x, at, count), load_as<T>(a.grad, at, count),
                               first(count), &sums.scale[v], &sums.zero[v]);
    store_as<T>(a.dx, at, dx, count);
  });
  float lanes[kSumLanes];
  unroll<kSumVectors>([&](int v) INLINE { store(lanes + v * kWidth, sums.scale[v]); });
  a.scale_grad[group] = sum_lanes(lanes);
  if (a.zero_grad == nullptr) return;
  unroll<kSumVectors>([&](int v) INLINE { store(lanes + v * kWidth, sums.zero[v]); });
  a.zero_grad[group] = -affine.scale * sum_lanes(lanes);
}

template <DType T, Format Fmt>
SIMD void fake_backward_rows(const FakeBackwardArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const Span span = group_span(g, a.group_size, a.cols);
      fake_backward_span<T, Fmt>(a, row * a.cols + span.begin, row * a.cols + span.end,
                                 row * a.groups + g, given_affine(a, row, g));
    }
  }
}

// ---- Table entries ------------------------------------------------------------------------------

void fake_quantize(const FakeQuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  with_float_type(a.type, [&](auto type) {
    with_format(a.format, [&](auto code) {
      constexpr DType kType = decltype(type)::value;
      constexpr Format kFormat = decltype(code)::value;
      if (a.scale != nullptr) return fake_rows_with<kType, kFormat>(a, row_begin, row_end);
      if constexpr (info(kFormat).has_zero_point) {
        if (!a.symmetric) return fake_rows<kType, kFormat, false>(a, row_begin, row_end);
      }
      fake_rows<kType, kFormat, true>(a, row_begin, row_end);
    });
  });
}

void fake_quantize_backward(const FakeBackwardArgs& a, int64_t row_begin, int64_t row_end) {
  with_float_type(a.type, [&](auto type) {
    with_format(a.format, [&](auto code) {
      fake_backward_rows<decltype(type)::value, decltype(code)::value>(a, row_begin, row_end);
    });
  });
}
