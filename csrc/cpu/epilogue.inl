// From a tile's sums to y: scales, zero point, bias, activation function, conversion. Every step is
// that of rows.h and core/codec.h, so the integer paths agree with the scalar reference to the bit.

// x from -87 to 89.
SIMD F exp_between(F x) {
  const F shifted = fma(x, splat(0x1.715476p+0f), splat(0x1.8p23f));
  const F n = sub(shifted, splat(0x1.8p23f));
  F r = fma(n, splat(-0x1.62e4p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  F p = splat(0x1.6b7a7ap-10f);
  p = fma(p, r, splat(0x1.1239dap-7f));
  p = fma(p, r, splat(0x1.555a7ep-5f));
  p = fma(p, r, splat(0x1.5554dap-3f));
  p = fma(p, r, splat(0x1.fffffap-2f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, floats(shift_left<23>(add(bits(shifted), splat(127)))));
}

SIMD F exp_poly(F x) { return exp_between(min(splat(89.0f), max(splat(-87.0f), x))); }

SIMD F sigmoid_times(F x, F z) { return div(x, add(splat(1.0f), exp_poly(negate(z)))); }

SIMD F gelu(F x) {
  const F z = mul(abs(x), splat(0x1.6a09e6p-1f));
  const F t = div(splat(1.0f), fma(z, splat(0.3275911f), splat(1.0f)));
  F p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const F tail = mul(mul(splat(0.5f), mul(p, t)), exp_poly(negate(mul(z, z))));
  return mul(x, select(less(x, splat(0.0f)), tail, sub(splat(1.0f), tail)));
}

SIMD F gelu_tanh(F x) {
  const F inner = fma(mul(x, x), splat(0.044715f * 1.5957691216f), splat(1.5957691216f));
  return sigmoid_times(x, mul(x, inner));
}

SIMD F relu6(F x) { return min(splat(6.0f), max(splat(0.0f), x)); }

SIMD F hardswish(F x) { return mul(x, mul(relu6(add(x, splat(3.0f))), splat(1.0f / 6.0f))); }

template <Epilogue E>
SIMD F activate(F x) {
  if constexpr (E == Epilogue::relu) return max(splat(0.0f), x);
  if constexpr (E == Epilogue::gelu) return gelu(x);
  if constexpr (E == Epilogue::gelu_tanh) return gelu_tanh(x);
  if constexpr (E == Epilogue::silu) return sigmoid_times(x, x);
  if constexpr (E == Epilogue::relu6) return relu6(x);
  if constexpr (E == Epilogue::hardswish) return hardswish(x);
  return x;
}

constexpr int kMostBlocks = 6;  // of a tile

// What a tile hands over: sums[rows][blocks * 16], after the weight's scales.
struct TileSums {
  const float* sums;
  const float* bias;  // [blocks * 16], 0 where there is none
  int64_t row, block;
  int rows, blocks;
};
using Finish = void (*)(const LinearArgs&, const TileSums&);

// int_mm: the sums are int32 and leave as they are.
void finish_int32(const LinearArgs& a, const TileSums& t) {
  for (int r = 0; r < t.rows; ++r) {
    const int64_t column = t.block * kLanes;
    const int64_t count = a.n - column < t.blocks * kLanes ? a.n - column : t.blocks * kLanes;
    std::memcpy(static_cast<int32_t*>(a.y) + (t.row + r) * a.n + column,
                t.sums + r * t.blocks * kLanes, static_cast<size_t>(count) * 4);
  }
}

// Row after row, so that what a row has of its own is looked up once.
template <DType Y, Epilogue E>
void finish(const LinearArgs& a, const TileSums& t) {
  const bool is_float = a.activation == Activation::float_;
  const bool has_zero = a.activation == Activation::int8_asymmetric;
  const int64_t column = t.block * kLanes, width = t.blocks * kLanes;
  const int64_t there = a.n - column < width ? a.n - column : width;
  const int64_t whole = there / kWidth * kWidth;
  alignas(64) float weight_sums[kMostBlocks * kLanes];
  for (int b = 0; has_zero && b < t.blocks; ++b) {
    std::memcpy(weight_sums + b * kLanes, a.packed + (t.block + b) * a.shape.bytes + a.shape.bias,
                kLanes * sizeof(float));
  }
  for (int r = 0; r < t.rows; ++r) {
    const float* const sums = t.sums + r * width;
    const int64_t at = (t.row + r) * a.n + column;
    // Float activations have no scale: 1 * sum + bias rounds like sum + bias.
    const F scale = splat(is_float ? 1.0f : a.row_scale[t.row + r]);
    const F zero = splat(has_zero ? -a.row_zero[t.row + r] : 0.0f);
    const auto y = [&](int64_t i) INLINE {
      F sum = load(sums + i);
      if (has_zero) sum = fma(zero, load(weight_sums + i), sum);
      return activate<E>(fma(scale, sum, load(t.bias + i)));
    };
    for (int64_t i = 0; i < whole; i += kWidth) store_as<Y>(a.y, at + i, y(i));
    if (whole < there) store_as<Y>(a.y, at + whole, y(whole), static_cast<int>(there - whole));
  }
}

template <DType Y>
Finish finish_for(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return finish<Y, Epilogue::none>;
    case Epilogue::relu:
      return finish<Y, Epilogue::relu>;
    case Epilogue::gelu:
      return finish<Y, Epilogue::gelu>;
    case Epilogue::gelu_tanh:
      return finish<Y, Epilogue::gelu_tanh>;
    case Epilogue::relu6:
      return finish<Y, Epilogue::relu6>;
    case Epilogue::hardswish:
      return finish<Y, Epilogue::hardswish>;
    case Epilogue::silu:
      break;
  }
  return finish<Y, Epilogue::silu>;
}

Finish finish_for(const LinearArgs& a) {
  if (a.y_type == DType::i32) return finish_int32;
  if (a.y_type == DType::f32) return finish_for<DType::f32>(a.epilogue);
  if (a.y_type == DType::bf16) return finish_for<DType::bf16>(a.epilogue);
  return finish_for<DType::f16>(a.epilogue);
}

// Bias of the features from `column` on, as floats; 0 past the end.
void load_bias(const LinearArgs& a, int64_t column, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    const bool there = a.bias != nullptr && column + i < a.n;
    out[i] = there ? load_float(a.bias, a.bias_type, column + i) : 0.0f;
  }
}

// ---- From registers -----------------------------------------------------------------------------

SIMD F float_of(F sum) { return sum; }
SIMD F float_of(I sum) { return to_float(sum); }

// The total of a group's finished sum and of the groups before it, or of 0.
SIMD F folded(F sum, F scale, bool is_first, const float* total) {
  return fma(sum, scale, is_first ? splat(0.0f) : load(total));
}
// Whether a tile's results need no more than a scale and a bias, and all of them exist: then they
// never go through memory. With an activation function, that is the least of what it costs.
SIMD bool finishes_directly(const LinearArgs& a, int64_t block, int blocks) {
  return a.epilogue == Epilogue::none && a.activation != Activation::int8_asymmetric &&
         a.y_type != DType::i32 && a.shape.groups > 0 && (block + blocks) * kLanes <= a.n;
}

// `finish` for the sums of the last group, from registers; total[Rows][Vectors * kWidth] is that of
// the groups before it.
template <class Tile, DType Y, class Value, int Vectors, int Rows>
SIMD void finish_last_group_as(const LinearArgs& a, const typename Tile::Sum (&sums)[Vectors][Rows],
                               const Value& value, const F (&scale)[Vectors], const float* total,
                               const float* bias, int64_t row, int64_t column) {
  const bool is_first = a.shape.groups == 1;
  F add_bias[Vectors];
  unroll<Vectors>([&](int v) INLINE { add_bias[v] = load(bias + v * kWidth); });
  unroll<Rows>([&](int r) INLINE {
    const F row_scale = splat(Tile::kFloat ? 1.0f : a.row_scale[row + r]);
    unroll<Vectors>([&](int v) INLINE {
      const F sum =
          folded(value(sums[v][r], v, r), scale[v], is_first, total + (r * Vectors + v) * kWidth);
      store_as<Y>(a.y, (row + r) * a.n + column + v * kWidth, fma(row_scale, sum, add_bias[v]));
    });
  });
}

template <class Tile, class... Args>
SIMD void finish_last_group(const LinearArgs& a, const Args&... args) {
  if (a.y_type == DType::f32) return finish_last_group_as<Tile, DType::f32>(a, args...);
  if (a.y_type == DType::bf16) return finish_last_group_as<Tile, DType::bf16>(a, args...);
  finish_last_group_as<Tile, DType::f16>(a, args...);
}
