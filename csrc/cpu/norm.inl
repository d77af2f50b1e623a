// LayerNorm and RMSNorm, row by row. Sums go through kNormLanes lanes, which gives the bits of
// scalar_transformer.cpp.

constexpr int kNormVectors = kNormLanes / kWidth;

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
  alignas(64) float values[kNormLanes];
  unroll<kNormVectors>([&](auto v) INLINE { store(values + v * kWidth, lanes[v]); });
  return sum_norm_lanes(values);
}

template <DType T, DType W>
void norm_row(const NormArgs& a, int64_t row) {
  const int64_t at = row * a.cols;
  // Where x + residual is, rounded: y has room for it until it is overwritten.
  void* const kept = a.sum != nullptr ? a.sum : a.y;
  const bool adds = a.residual != nullptr || a.sum != nullptr;
  const void* const s = adds ? kept : a.x;
  F lanes[kNormVectors];
  unroll<kNormVectors>([&](auto v) INLINE { lanes[v] = splat(0.0f); });
  if (adds) {
    in_norm_lanes(a.cols, [&](int64_t i, auto, auto count) INLINE {
      F x = load_some<T>(a.x, at + i, count);
      if (a.residual != nullptr) x = add(x, load_some<T>(a.residual, at + i, count));
      store_some<T>(kept, at + i, x, count);
    });
  }
  float mean = 0.0f;
  if (!a.rms) {
    in_norm_lanes(a.cols, [&](int64_t i, auto v, auto count)
                              INLINE { lanes[v] = add(lanes[v], load_some<T>(s, at + i, count)); });
    mean = sum_of(lanes) / static_cast<float>(a.cols);
    unroll<kNormVectors>([&](auto v) INLINE { lanes[v] = splat(0.0f); });
  }
  in_norm_lanes(a.cols, [&](int64_t i, auto v, auto count) INLINE {
    F centered = sub(load_some<T>(s, at + i, count), splat(mean));
    if constexpr (std::is_same_v<decltype(count), int>) {
      centered = zero_unless(first(count), centered);
    }
    lanes[v] = fma(centered, centered, lanes[v]);
  });
  const F inverse = splat(norm_inverse(a, sum_of(lanes)));
  in_norm_lanes(a.cols, [&](int64_t i, auto, auto count) INLINE {
    const F unit = mul(sub(load_some<T>(s, at + i, count), splat(mean)), inverse);
    const F weight = a.weight == nullptr ? splat(1.0f) : load_some<W>(a.weight, i, count);
    const F bias = a.bias == nullptr ? splat(0.0f) : load_some<W>(a.bias, i, count);
    store_some<T>(a.y, at + i, fma(unit, weight, bias), count);
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
