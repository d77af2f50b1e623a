// LayerNorm and RMSNorm, row by row. Sums go through kNormLanes lanes, which gives the bits of
// scalar_transformer.cpp.

constexpr int kNormVectors = kNormLanes / kWidth;

template <DType T>
constexpr int64_t kFloatBytes = T == DType::f32 ? 4 : 2;

// body(index, vector of the lanes, elements there) over a row.
template <class Body>
SIMD void in_norm_lanes(int64_t cols, const Body& body) {
  int64_t i = 0;
  for (; i + kNormLanes <= cols; i += kNormLanes) {
    unroll<kNormVectors>(
        [&](auto v) INLINE { body(i + v * kWidth, v, std::integral_constant<int, kWidth>{}); });
  }
  unroll<kNormVectors>([&](auto v) INLINE {
    const int64_t left = cols - i - v * kWidth;
    if (left >= kWidth) {
      body(i + v * kWidth, v, std::integral_constant<int, kWidth>{});
    } else if (left > 0) {
      body(i + v * kWidth, v, static_cast<int>(left));
    }
  });
}

// The whole vector when `count` is the constant, or else the first `count` elements.
template <DType T>
SIMD F load_some(const void* data, int64_t i, std::integral_constant<int, kWidth>) {
  return load_as<T>(data, i);
}
template <DType T>
SIMD F load_some(const void* data, int64_t i, int count) {
  return load_as<T>(data, i, count);
}
template <DType T>
SIMD void store_some(void* data, int64_t i, F x, std::integral_constant<int, kWidth>) {
  store_as<T>(data, i, x);
}
template <DType T>
SIMD void store_some(void* data, int64_t i, F x, int count) {
  store_as<T>(data, i, x, count);
}

SIMD float sum_of(const F (&lanes)[kNormVectors]) {
  constexpr int kQuarter = kNormVectors / 4;
  F quarters[kQuarter];
  unroll<kQuarter>([&](auto v) INLINE {
    quarters[v] = add(add(lanes[v], lanes[v + kQuarter]),
                      add(lanes[v + 2 * kQuarter], lanes[v + 3 * kQuarter]));
  });
  if constexpr (kQuarter == 2) quarters[0] = add(quarters[0], quarters[1]);
  return sum_halves(quarters[0]);
}

template <DType T, DType W>
void norm_row(const NormArgs& a, int64_t row) {
  const int64_t at = row * a.cols, cols = a.cols;
  // Where x + residual is, rounded: y has room for it until it is overwritten.
  void* const kept = a.sum != nullptr ? a.sum : a.y;
  const void *const x = a.x, *const residual = a.residual;
  const void* s = x;
  if (residual != nullptr) {
    s = kept;
    in_norm_lanes(cols, [&](int64_t i, auto, auto count) INLINE {
      const F sum = add(load_some<T>(x, at + i, count), load_some<T>(residual, at + i, count));
      store_some<T>(kept, at + i, sum, count);
    });
  } else if (a.sum != nullptr) {
    std::memcpy(static_cast<uint8_t*>(kept) + at * kFloatBytes<T>,
                static_cast<const uint8_t*>(x) + at * kFloatBytes<T>,
                static_cast<size_t>(cols * kFloatBytes<T>));
  }
  F lanes[kNormVectors];
  F mean = splat(0.0f);
  if (!a.rms) {
    unroll<kNormVectors>([&](auto v) INLINE { lanes[v] = splat(0.0f); });
    in_norm_lanes(cols, [&](int64_t i, auto v, auto count)
                            INLINE { lanes[v] = add(lanes[v], load_some<T>(s, at + i, count)); });
    mean = splat(sum_of(lanes) / static_cast<float>(cols));
  }
  unroll<kNormVectors>([&](auto v) INLINE { lanes[v] = splat(0.0f); });
  in_norm_lanes(cols, [&](int64_t i, auto v, auto count) INLINE {
    F centered = sub(load_some<T>(s, at + i, count), mean);
    if constexpr (std::is_same_v<decltype(count), int>) {
      centered = zero_unless(first(count), centered);
    }
    lanes[v] = fma(centered, centered, lanes[v]);
  });
  const F inverse = splat(norm_inverse(a, sum_of(lanes)));
  void* const y = a.y;
  const void *const weight = a.weight, *const bias = a.bias;
  in_norm_lanes(cols, [&](int64_t i, auto, auto count) INLINE {
    const F unit = mul(sub(load_some<T>(s, at + i, count), mean), inverse);
    const F factor = weight == nullptr ? splat(1.0f) : load_some<W>(weight, i, count);
    const F shift = bias == nullptr ? splat(0.0f) : load_some<W>(bias, i, count);
    store_some<T>(y, at + i, fma(unit, factor, shift), count);
  });
}

void add_norm(const NormArgs& a, int64_t begin, int64_t end) {
  with_float_type(a.type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    for (int64_t row = begin; row < end; ++row) {
      if (a.weight_type == DType::f32) {
        norm_row<kType, DType::f32>(a, row);
      } else {
        norm_row<kType, kType>(a, row);
      }
    }
  });
}
