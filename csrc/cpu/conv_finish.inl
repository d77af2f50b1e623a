// From a convolution's sums to y, in the steps of scalar.cpp.

SIMD F activate(Epilogue epilogue, F x) {
  switch (epilogue) {
    case Epilogue::none:
      return x;
    case Epilogue::relu:
      return activate<Epilogue::relu>(x);
    case Epilogue::gelu:
      return activate<Epilogue::gelu>(x);
    case Epilogue::gelu_tanh:
      return activate<Epilogue::gelu_tanh>(x);
    case Epilogue::silu:
      return activate<Epilogue::silu>(x);
    case Epilogue::relu6:
      return activate<Epilogue::relu6>(x);
    case Epilogue::hardswish:
      break;
  }
  return activate<Epilogue::hardswish>(x);
}

// kWidth elements (or the first `count`) from `at` on, as floats.
template <DType T, class... Count>
SIMD F load_output(const ConvArgs& a, int64_t at, Count... count) {
  if constexpr (T == DType::i8) {
    const I code = load_i8(static_cast<const int8_t*>(a.residual) + at, count...);
    return mul(to_float(sub(code, splat(a.residual_zero))), splat(a.residual_scale));
  } else {
    return load_as<T>(a.residual, at, count...);
  }
}

// What a tile needs to know of its output pixels: consecutive ones, whose x have the same scale and
// zero point.
constexpr int64_t kConvSlab = 256;
struct Pixels {
  int64_t begin, count;         // of batch * pixels()
  ImageCodes codes;             // of x
  const uint8_t* x[kConvSlab];  // corners in the image
};

// ---- Codes straight from registers --------------------------------------------------------------

// What a tile's outputs have of their own. `start` is what the sums begin with: it undoes the zero
// point of x, and the flip.
struct OutputValues {
  static constexpr int kMost = 64;
  alignas(64) int32_t start[kMost];
  alignas(64) float scale[kMost];
  alignas(64) float bias[kMost];
};

// From a tile's first output and its slab's first pixel on.
struct ToCodes {
  float x_scale, y_inverse, residual_scale;
  int y_zero, low, high, residual_zero;
  int64_t step;  // from pixel to pixel
  int8_t* y;
  const int8_t* residual;
  int count;  // outputs that there are
};

bool gives_codes(const ConvArgs& a) {
  return a.y_type == DType::i8 && a.y_channels_last &&
         (a.residual == nullptr || a.residual_type == DType::i8) &&
         (a.epilogue == Epilogue::none || a.epilogue == Epilogue::relu ||
          a.epilogue == Epilogue::relu6);
}

// Outputs [o, o + count) of y, from `weight` on. True when `store_codes` may make codes of them: no
// sum can give a NaN or a quotient near the ends of int32, whatever x is.
bool find_outputs(const ConvArgs& a, const Pixels& pixels, const uint8_t* weight, int blocks,
                  int64_t o, int count, OutputValues* values, ToCodes* to) {
  const int zero = pixels.codes.zero + (W8A8::kFlipped ? 128 : 0);
  const float most = static_cast<float>(a.shape.k) * (255 * 128) * pixels.codes.scale;
  const float residual = a.residual == nullptr ? 0.0f : 255 * a.residual_scale;
  I worst = splat(0);
  for (int v = 0; v < blocks * (kLanes / kWidth); ++v) {
    const uint8_t* block = weight + v * kWidth / kLanes * a.shape.bytes;
    const int lane = v * kWidth % kLanes;
    const I sums = load(reinterpret_cast<const int32_t*>(block + a.shape.sums) + lane);
    store(values->start + v * kWidth, multiply(sums, splat(-zero)));
    F scale, bias = splat(0.0f);
    with_float_type(a.scale_type, [&](auto type) INLINE {
      scale = load_as<decltype(type)::value>(block + a.shape.scales, lane);
    });
    const int left = count - v * kWidth;
    if (a.bias != nullptr && left > 0) {
      with_float_type(a.bias_type, [&](auto type) INLINE {
        bias = load_as<decltype(type)::value>(a.bias, o + v * kWidth, left < kWidth ? left : kWidth);
      });
    }
    store(values->scale + v * kWidth, scale);
    store(values->bias + v * kWidth, bias);
    const F largest = add(fma(abs(scale), splat(most), abs(bias)), splat(residual));
    worst = max(worst, bits(abs(mul(largest, splat(a.y_inverse)))));
  }
  if (!gives_codes(a) || reduce_max(worst) >= reduce_max(bits(splat(0x1p30f)))) return false;
  const int64_t at = pixels.begin * a.out_channels + o;
  to->x_scale = pixels.codes.scale;
  to->y_inverse = a.y_inverse;
  to->y_zero = a.y_zero;
  // With no NaN about, ReLU and ReLU6 are limits of the code.
  const Affine affine{1.0f, a.y_inverse, a.y_zero};
  to->low = a.epilogue == Epilogue::none ? -128 : a.y_zero;
  to->high = a.epilogue == Epilogue::relu6 ? encode_integer(6.0f, affine, -128, 127) : 127;
  to->residual_scale = a.residual_scale;
  to->residual_zero = a.residual_zero;
  to->step = a.out_channels;
  to->y = static_cast<int8_t*>(a.y) + at;
  to->residual = a.residual == nullptr ? nullptr : static_cast<const int8_t*>(a.residual) + at;
  to->count = count;
  // Residuals are read whole vectors at a time.
  return a.residual == nullptr || count == blocks * kLanes;
}

// Codes of a pixel of the slab. Saturation, when vectors are narrowed, is most of the clamping.
// With Pieces, `sums` and values are in the order that narrowing undoes.
template <bool Residual, bool Pieces, int Vectors>
SIMD void store_codes(const OutputValues& values, const ToCodes& to, const I (&sums)[Vectors],
                      int64_t pixel) {
  const int64_t at = pixel * to.step;
  I codes[4];
  unroll<Vectors>([&](int v) INLINE {
    F y = fma(splat(to.x_scale), mul(to_float(sums[v]), load(values.scale + v * kWidth)),
              load(values.bias + v * kWidth));
    if constexpr (Residual) {
      const I code = sub(load_i8(to.residual + at + v * kWidth), splat(to.residual_zero));
      y = add(y, mul(to_float(code), splat(to.residual_scale)));
    }
    codes[v] = round_int(mul(y, splat(to.y_inverse)));
  });
  for (int v = Vectors; v < 4; ++v) codes[v] = codes[v % Vectors];
  const I pieces = narrow_pieces(codes[0], codes[1], codes[2], codes[3], to.y_zero);
  const I bytes = clamp_bytes(Pieces ? pieces : join_pieces(pieces), to.low, to.high);
  if (to.count == Vectors * kWidth) {
    store_first<Vectors>(to.y + at, bytes);
  } else {
    store_all(to.y + at, bytes, to.count);
  }
}

// ---- From sums in memory ------------------------------------------------------------------------

// Sums of `rows` pixels, from the slab's `first` on, and of `blocks` blocks; their outputs are y's
// [o, o + count).
struct ConvSums {
  const int32_t* sums;  // [rows][blocks * 16]
  const Pixels* pixels;
  const OutputValues* values;
  int64_t first, o;
  int rows, blocks, count;
};

SIMD F scaled(const ConvSums& t, int v, int r) {
  const F sum = to_float(load(t.sums + r * t.blocks * kLanes + v * kWidth));
  return fma(splat(t.pixels->codes.scale), mul(sum, load(t.values->scale + v * kWidth)),
             load(t.values->bias + v * kWidth));
}

// Outputs innermost in y.
template <DType Y, DType Residual>
void finish_last(const ConvArgs& a, const ConvSums& t) {
  const Encoder<Format::int8> encoder =
      make_encoder<Format::int8>(a.y_inverse, a.y_zero, /*symmetric=*/false);
  const auto finish = [&](int v, int r, auto... count) INLINE {
    const int64_t at = (t.pixels->begin + t.first + r) * a.out_channels + t.o + v * kWidth;
    F y = scaled(t, v, r);
    if (a.residual != nullptr) y = add(y, load_output<Residual>(a, at, count...));
    y = activate(a.epilogue, y);
    if constexpr (Y == DType::i8) {
      store_i8(static_cast<int8_t*>(a.y) + at, encode(encoder, y), count...);
    } else {
      store_as<Y>(a.y, at, y, count...);
    }
  };
  const int whole = t.count / kWidth, rest = t.count % kWidth;
  for (int r = 0; r < t.rows; ++r) {
    for (int v = 0; v < whole; ++v) finish(v, r);
    if (rest != 0) finish(whole, r, rest);
  }
}

// Pixels innermost in y.
void finish_first(const ConvArgs& a, const ConvSums& t) {
  int64_t at[kMaxRows];  // of output t.o
  for (int r = 0; r < t.rows; ++r) {
    const int64_t pixel = t.pixels->begin + t.first + r;
    at[r] = conv_output(a, pixel / a.pixels(), pixel % a.pixels(), t.o);
  }
  for (int v = 0; v * kWidth < t.count; ++v) {
    const int count = least(t.count - v * kWidth, kWidth);
    const int64_t next = v * kWidth * a.pixels();
    float y[kMaxRows][kWidth], residual[kWidth] = {};
    for (int r = 0; r < t.rows; ++r) {
      F sum = scaled(t, v, r);
      if (a.residual != nullptr) {
        for (int i = 0; i < count; ++i) {
          residual[i] = conv_residual(a, at[r] + next + i * a.pixels());
        }
        sum = add(sum, load(residual));
      }
      store(y[r], activate(a.epilogue, sum));
    }
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < t.rows; ++r) conv_store(a, at[r] + next + i * a.pixels(), y[r][i]);
    }
  }
}

using ConvFinish = void (*)(const ConvArgs&, const ConvSums&);

template <DType Y>
ConvFinish conv_finish_last(DType residual) {
  if (residual == DType::i8) return finish_last<Y, DType::i8>;
  if (residual == DType::f32) return finish_last<Y, DType::f32>;
  return residual == DType::bf16 ? finish_last<Y, DType::bf16> : finish_last<Y, DType::f16>;
}
ConvFinish conv_finish(const ConvArgs& a) {
  if (!a.y_channels_last) return finish_first;
  ConvFinish result = nullptr;
  with_image_type(a.y_type, [&](auto type) {
    result = conv_finish_last<decltype(type)::value>(a.residual_type);
  });
  return result;
}
