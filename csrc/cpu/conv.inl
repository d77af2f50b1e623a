// Convolution with int8 weights and activations: the product of matmul.inl, without a gathered x.
// In the image the channels lie innermost and the borders are filled in, so what an output pixel
// needs of x is a few runs of consecutive codes at fixed distances from its own corner of the
// image: one run for each row of the kernel.
//
// Per output: p, the exact sum of (code(x) - zero) * code(w); y = fma(scale of x, f32(p) * scale of
// w, bias); the residual is added; activation function; conversion. As in scalar.cpp, to the bit.

// ---- The image ----------------------------------------------------------------------------------

template <class Body>
inline void with_image_type(DType type, const Body& body) {
  if (type == DType::i8) return body(Element<DType::i8>{});
  with_float_type(type, body);
}

// x[at .. at + count) as int8 codes.
template <DType X>
void image_codes(const ConvArgs& a, const ImageCodes& codes, int64_t at, int64_t count,
                 uint8_t* out) {
  if constexpr (X == DType::i8) {
    std::memcpy(out, static_cast<const uint8_t*>(a.x) + at, static_cast<size_t>(count));
  } else {
    const Affine affine{codes.scale, codes.inverse, codes.zero};
    Span span{0, count};
    if (codes.plain && a.symmetric) {
      span.begin = encode_tame_span<X, Format::int8, true>(a.x, at, affine, span, out, 0, false);
    } else if (codes.plain) {
      span.begin = encode_tame_span<X, Format::int8, false>(a.x, at, affine, span, out, 0, false);
    }
    encode_span<X, Format::int8>(a.x, at, affine, a.symmetric, span, out, 0);
  }
}

// Channels as the image has them: groups of `count`, `padded` codes apart.
struct ImageGroups {
  int64_t groups, count, padded;
};
inline ImageGroups image_groups(const ConvArgs& a) {
  if (a.depthwise) return {1, a.channels, a.pixel_codes()};
  return {a.groups, a.channels / a.groups, a.group_channels};
}

constexpr int64_t kPiece = 1024;  // codes of x that are made before they are spread

// Pixels `count` of a row of x, from x[at] on, to every step-th pixel of `out`; channels innermost
// on both sides.
template <DType X>
void spread_pixels(const ConvArgs& a, const ImageCodes& codes, int64_t at, int64_t count,
                   uint8_t* out) {
  const ImageGroups g = image_groups(a);
  const int64_t width = a.pixel_codes(), step = a.step[2] * width;
  if (width == 0) return;
  if (a.channels == width && a.step[2] == 1) {
    return image_codes<X>(a, codes, at, count * width, out);
  }
  if (a.channels > kPiece / 4) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t group = 0; group < g.groups; ++group) {
        image_codes<X>(a, codes, at + i * a.channels + group * g.count, g.count,
                       out + i * step + group * g.padded);
      }
    }
    return;
  }
  uint8_t piece[kPiece + 16];
  const int64_t fit = kPiece / a.channels;
  for (int64_t i = 0; i < count; i += fit) {
    const int64_t pixels = count - i < fit ? count - i : fit;
    image_codes<X>(a, codes, at + i * a.channels, pixels * a.channels, piece);
    const uint8_t* from = piece;
    int64_t pixel = i;
    if (a.channels == 3 && step == 4) {  // a network's first layer: four pixels at a time
      const __m128i order = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
      const __m128i fourth = _mm_set1_epi32(
          static_cast<int>(static_cast<uint32_t>(static_cast<uint8_t>(codes.zero)) << 24));
      for (; pixel + 4 <= i + pixels; pixel += 4, from += 12) {
        const __m128i three = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + pixel * 4),
                         _mm_or_si128(_mm_shuffle_epi8(three, order), fourth));
      }
    }
    for (; pixel < i + pixels; ++pixel) {
      for (int64_t group = 0; group < g.groups; ++group, from += g.count) {
        uint8_t* to = out + pixel * step + group * g.padded;
        for (int64_t c = 0; c < g.count; ++c) to[c] = from[c];
      }
    }
  }
}

// Four rows of codes to every step-th word of `out`.
void interleave_codes(const uint8_t (&rows)[4][kPiece], int64_t count, int64_t step, uint8_t* out) {
  const auto line = [&](int r, int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + i));
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i ab[2] = {_mm_unpacklo_epi8(line(0, i), line(1, i)),
                           _mm_unpackhi_epi8(line(0, i), line(1, i))};
    const __m128i cd[2] = {_mm_unpacklo_epi8(line(2, i), line(3, i)),
                           _mm_unpackhi_epi8(line(2, i), line(3, i))};
    alignas(16) uint32_t words[16];
    for (int half = 0; half < 2; ++half) {
      __m128i* to = reinterpret_cast<__m128i*>(words + half * 8);
      _mm_store_si128(to, _mm_unpacklo_epi16(ab[half], cd[half]));
      _mm_store_si128(to + 1, _mm_unpackhi_epi16(ab[half], cd[half]));
    }
    for (int j = 0; j < 16; ++j) std::memcpy(out + (i + j) * step, words + j, 4);
  }
  for (; i < count; ++i) {
    for (int r = 0; r < 4; ++r) out[i * step + r] = rows[r][i];
  }
}

// The same from an x whose pixels lie innermost; x[at] is channel 0.
template <DType X>
void gather_channels(const ConvArgs& a, const ImageCodes& codes, int64_t at, int64_t count,
                     uint8_t* out) {
  const ImageGroups g = image_groups(a);
  const int64_t width = a.pixel_codes(), step = a.step[2] * width;
  const int64_t plane = a.in[0] * a.in[1] * a.in[2];
  uint8_t rows[4][kPiece];
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t pixels = count - i < kPiece ? count - i : kPiece;
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t c = 0; c < g.padded; c += 4) {
        for (int r = 0; r < 4; ++r) {
          if (c + r < g.count) {
            image_codes<X>(a, codes, at + (group * g.count + c + r) * plane + i, pixels, rows[r]);
          } else {
            std::memset(rows[r], codes.zero, static_cast<size_t>(pixels));
          }
        }
        interleave_codes(rows, pixels, step, out + i * step + group * g.padded + c);
      }
    }
  }
}

// A row of the image as signed codes.
template <DType X>
void image_row(const ConvArgs& a, int64_t row, uint8_t* out) {
  const int64_t n = row / (a.grid[0] * a.grid[1]);
  const ImageCodes& codes = a.codes[n];
  const int64_t width = a.pixel_codes(), length = a.grid[2];
  const int64_t z = conv_source(a, 0, row / a.grid[1] % a.grid[0]);
  const int64_t y = conv_source(a, 1, row % a.grid[1]);
  // Elements [first, last) of the row of x lie in the image, from pixel `begin` on.
  const int64_t before = a.before[2], step = a.step[2];
  const int64_t first = before < 0 ? (-before + step - 1) / step : 0;
  const int64_t begin = before + first * step;
  int64_t last = begin < length ? first + (length - begin + step - 1) / step : first;
  if (last > a.in[2]) last = a.in[2];
  const auto fill = [&](int64_t from, int64_t to) {
    if (from < to)
      std::memset(out + from * width, codes.zero, static_cast<size_t>((to - from) * width));
  };
  if (z < 0 || y < 0 || first >= last) return fill(0, length);
  const bool has_gaps = step != 1 || (a.x_channels_last && a.channels != width);
  fill(0, has_gaps ? length : begin);
  if (!has_gaps) fill(begin + last - first, length);
  const int64_t pixel =
      ((n * (a.x_channels_last ? a.in[0] : 0) + z) * a.in[1] + y) * a.in[2] + first;
  if (a.x_channels_last) {
    spread_pixels<X>(a, codes, pixel * a.channels, last - first, out + begin * width);
  } else {
    const int64_t image = n * a.channels * a.in[0] * a.in[1] * a.in[2];
    gather_channels<X>(a, codes, image + pixel, last - first, out + begin * width);
  }
}

int conv_code_bytes(const ConvArgs& a) { return a.depthwise ? 1 : static_cast<int>(kBytes<W8A8>); }

// Whether a row of the image is one of x, with borders.
bool is_plain_image(const ConvArgs& a) {
  return a.x_type == DType::i8 && !a.depthwise && a.x_channels_last &&
         a.channels == a.pixel_codes() && a.step[2] == 1 && a.before[2] >= 0;
}

// A row of such an image as units.
void plain_row(const ConvArgs& a, int64_t row, uint8_t* out) {
  const int64_t n = row / (a.grid[0] * a.grid[1]);
  const int64_t width = a.channels, size = conv_code_bytes(a);
  const int64_t z = conv_source(a, 0, row / a.grid[1] % a.grid[0]);
  const int64_t y = conv_source(a, 1, row % a.grid[1]);
  const int64_t begin = a.before[2] < a.grid[2] ? a.before[2] : a.grid[2];
  const int64_t room = a.grid[2] - begin;
  const int64_t count = z < 0 || y < 0 ? 0 : room < a.in[2] ? room : a.in[2];
  const auto fill = [&](int64_t from, int64_t to) {
    const int64_t count = (to - from) * width;
    uint8_t* const units = out + from * width * size;
    // Units take the place of their codes, which lie at their end until then.
    uint8_t* const codes = units + count * (size - 1);
    std::memset(codes, a.codes[n].zero, static_cast<size_t>(count));
    W8A8::codes_to_units(codes, count, units);
  };
  fill(0, begin);
  if (count > 0) {
    const int64_t pixel = ((n * a.in[0] + z) * a.in[1] + y) * a.in[2];
    W8A8::codes_to_units(static_cast<const uint8_t*>(a.x) + pixel * width, count * width,
                         out + begin * width * size);
  }
  fill(begin + count, a.grid[2]);
}

void conv_prepare(const ConvArgs& a, int64_t begin, int64_t end) {
  if (is_plain_image(a)) {
    const int64_t bytes = a.grid[2] * a.pixel_codes() * conv_code_bytes(a);
    for (int64_t row = begin; row < end; ++row) plain_row(a, row, a.image + row * bytes);
    return;
  }
  with_image_type(a.x_type, [&](auto type) {
    const int64_t codes = a.grid[2] * a.pixel_codes();
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* out = a.image + row * codes * conv_code_bytes(a);
      // Units take the place of their codes, which lie at the end of the row until then.
      uint8_t* signed_codes = out + codes * (conv_code_bytes(a) - 1);
      image_row<decltype(type)::value>(a, row, signed_codes);
      // Depthwise kernels want bytes, for vpdpbusd flipped ones.
      if (!a.depthwise || W8A8::kFlipped) W8A8::codes_to_units(signed_codes, codes, out);
    }
  });
}

// ---- Where the rows of the product are ----------------------------------------------------------

// What a tile needs to know of its output pixels.
constexpr int64_t kConvSlab = 256;
struct Pixels {
  const uint8_t* x[kConvSlab];  // corner of the image
  float scale[kConvSlab];       // of x
  int zero[kConvSlab];
  int64_t image[kConvSlab], pixel[kConvSlab];  // of y
};

void find_pixels(const ConvArgs& a, int64_t begin, int64_t end, Pixels* pixels) {
  const int64_t bytes = a.pixel_codes() * conv_code_bytes(a);
  int64_t n = begin / a.pixels(), pixel = begin % a.pixels();
  int64_t z = pixel / (a.out[1] * a.out[2]), y = pixel / a.out[2] % a.out[1];
  int64_t x = pixel % a.out[2];
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t corner =
        (z * a.stride[0] * a.grid[1] + y * a.stride[1]) * a.grid[2] + x * a.stride[2];
    pixels->x[i] = a.image + n * a.image_codes() * conv_code_bytes(a) + corner * bytes;
    pixels->scale[i] = a.codes[n].scale;
    pixels->zero[i] = a.codes[n].zero;
    pixels->image[i] = n;
    pixels->pixel[i] = pixel;
    ++pixel;
    if (++x < a.out[2]) continue;
    x = 0;
    if (++y < a.out[1]) continue;
    y = 0;
    if (++z < a.out[0]) continue;
    z = pixel = 0;
    ++n;
  }
}

// Distance in bytes from a pixel's corner to tap `tap`.
int64_t tap_offset(const ConvArgs& a, int64_t tap) {
  const int64_t z = tap / (a.kernel[1] * a.kernel[2]), y = tap / a.kernel[2] % a.kernel[1];
  const int64_t x = tap % a.kernel[2];
  return ((z * a.dilation[0] * a.grid[1] + y * a.dilation[1]) * a.grid[2] + x * a.dilation[2]) *
         a.pixel_codes() * conv_code_bytes(a);
}

// Consecutive taps whose codes are consecutive too.
int64_t run_taps(const ConvArgs& a) {
  return a.groups == 1 && a.dilation[2] == 1 ? a.kernel[2] : 1;
}

// ---- From sums to y -----------------------------------------------------------------------------

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

// Sums of `rows` pixels, from the slab's `first` on, and of blocks from `block` on; outputs of a
// group are `outputs`, the first of them output `base` of y.
struct ConvSums {
  const int32_t* sums;  // [rows][blocks * 16]
  const Pixels* pixels;
  int64_t first, block, base, outputs;
  int rows, blocks;
  const uint8_t* weight;
};

// Scales, zero points and bias of kWidth outputs.
struct OutputScales {
  F scale, bias;
};
SIMD OutputScales output_scales(const ConvArgs& a, const ConvSums& t, int v, int count) {
  const uint8_t* weight = t.weight + v * kWidth / kLanes * a.shape.bytes;
  F scale, bias = splat(0.0f);
  with_float_type(a.scale_type, [&](auto type) INLINE {
    scale = load_as<decltype(type)::value>(weight + a.shape.scales, v * kWidth % kLanes);
  });
  if (a.bias != nullptr) {
    const int64_t o = t.base + t.block * kLanes + v * kWidth;
    with_float_type(a.bias_type, [&](auto type) INLINE {
      bias = load_as<decltype(type)::value>(a.bias, o, count);
    });
  }
  return {scale, bias};
}

SIMD F scaled(const ConvSums& t, const OutputScales& s, int v, int r) {
  const F sum = to_float(load(t.sums + r * t.blocks * kLanes + v * kWidth));
  return fma(splat(t.pixels->scale[t.first + r]), mul(sum, s.scale), s.bias);
}

// Most blocks that sums are given of: as many as fill a vector with bytes.
constexpr int kFinishBlocks = kWidth / 4;

// The epilogue, known beforehand or not.
template <Epilogue E>
struct Known {
  static constexpr bool kKnown = true, kPositive = E == Epilogue::relu;
  static INLINE F apply(const ConvArgs&, F x) { return activate<E>(x); }
};
struct AnyEpilogue {
  static constexpr bool kKnown = false, kPositive = false;
  static INLINE F apply(const ConvArgs& a, F x) { return activate(a.epilogue, x); }
};

// Whether a number below infinity is all that a finite sum can give.
SIMD bool all_finite(F x) { return reduce_max(bits(abs(x))) < 0x7f800000; }

// A pixel's codes of `Vectors` whole vectors of outputs, `at` being the first, where nothing can be
// NaN: then saturation while bytes are packed is all the clamping, but for quotients out of int32.
template <DType Residual, class Function, int Vectors>
SIMD void finish_codes(const ConvArgs& a, const int32_t* sums, const OutputScales* scales, F scale,
                       const Encoder<Format::int8>& encoder, int64_t at) {
  I codes[4];
  unroll<Vectors>([&](int v) INLINE {
    F y = fma(scale, mul(to_float(load(sums + v * kWidth)), scales[v].scale), scales[v].bias);
    if (a.residual != nullptr) y = add(y, load_output<Residual>(a, at + v * kWidth));
    F quotient = min(mul(Function::apply(a, y), encoder.inverse), encoder.high);
    if constexpr (!Function::kPositive) quotient = max(quotient, encoder.low);
    codes[v] = add(round_int(quotient), encoder.zero);
  });
  for (int v = Vectors; v < 4; ++v) codes[v] = codes[0];
  store_first<Vectors>(static_cast<int8_t*>(a.y) + at,
                       narrow(codes[0], codes[1], codes[2], codes[3]));
}

// Outputs innermost in y.
template <DType Y, DType Residual, class Function>
void finish_last(const ConvArgs& a, const ConvSums& t) {
  constexpr int kParts = kLanes / kWidth;
  constexpr int kVectors = kFinishBlocks * kParts;
  const int64_t outputs = t.outputs - t.block * kLanes;
  const int64_t lanes = outputs < t.blocks * kLanes ? outputs : t.blocks * kLanes;
  const int vectors = static_cast<int>((lanes + kWidth - 1) / kWidth);
  OutputScales scales[kVectors];
  bool finite = true;
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = lanes - v * kWidth;
    scales[v] = output_scales(a, t, v, static_cast<int>(left < kWidth ? left : kWidth));
    finite = finite && all_finite(scales[v].scale) && all_finite(scales[v].bias);
  }
  const bool tame = Y == DType::i8 && Function::kKnown && finite && lanes == t.blocks * kLanes &&
                    (a.residual == nullptr || Residual == DType::i8);
  const Encoder<Format::int8> encoder =
      make_encoder<Format::int8>(a.y_inverse, a.y_zero, /*symmetric=*/false);
  for (int r = 0; r < t.rows; ++r) {
    const int64_t begin = conv_output(a, t.pixels->image[t.first + r], t.pixels->pixel[t.first + r],
                                      t.base + t.block * kLanes);
    const float x_scale = t.pixels->scale[t.first + r];
    const F scale = splat(x_scale);
    const int32_t* sums = t.sums + r * t.blocks * kLanes;
    if constexpr (Y == DType::i8 && Function::kKnown) {
      if (tame && x_scale < INFINITY) {
        const auto codes = [&](auto blocks) INLINE {
          finish_codes<Residual, Function, decltype(blocks)::value * kParts>(a, sums, scales, scale,
                                                                             encoder, begin);
        };
        if (t.blocks == 1) {
          codes(std::integral_constant<int, 1>{});
        } else if (t.blocks == 2) {
          codes(std::integral_constant<int, 2>{});
        } else if constexpr (kFinishBlocks == 4) {
          if (t.blocks == 3) {
            codes(std::integral_constant<int, 3>{});
          } else {
            codes(std::integral_constant<int, 4>{});
          }
        }
        continue;
      }
    }
    const auto finish = [&](int v, auto... count) INLINE {
      const int64_t at = begin + v * kWidth;
      F y = fma(scale, mul(to_float(load(sums + v * kWidth)), scales[v].scale), scales[v].bias);
      if (a.residual != nullptr) y = add(y, load_output<Residual>(a, at, count...));
      y = Function::apply(a, y);
      if constexpr (Y == DType::i8) {
        store_i8(static_cast<int8_t*>(a.y) + at, encode(encoder, y), count...);
      } else {
        store_as<Y>(a.y, at, y, count...);
      }
    };
    const int64_t last = lanes - (vectors - 1) * kWidth;  // outputs of the last vector
    for (int v = 0; v < vectors - 1; ++v) finish(v);
    if (last == kWidth) {
      finish(vectors - 1);
    } else {
      finish(vectors - 1, static_cast<int>(last));
    }
  }
}

// Pixels innermost in y.
void finish_first(const ConvArgs& a, const ConvSums& t) {
  for (int v = 0; v < t.blocks * (kLanes / kWidth); ++v) {
    const int64_t o = t.block * kLanes + v * kWidth;
    if (o >= t.outputs) return;
    const int count = static_cast<int>(t.outputs - o < kWidth ? t.outputs - o : kWidth);
    const OutputScales s = output_scales(a, t, v, count);
    float y[kMaxRows][kWidth], residual[kWidth] = {};
    for (int r = 0; r < t.rows; ++r) {
      const int64_t at =
          conv_output(a, t.pixels->image[t.first + r], t.pixels->pixel[t.first + r], t.base + o);
      F sum = scaled(t, s, v, r);
      if (a.residual != nullptr) {
        for (int i = 0; i < count; ++i) residual[i] = conv_residual(a, at + i * a.pixels());
        sum = add(sum, load(residual));
      }
      store(y[r], activate(a.epilogue, sum));
    }
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < t.rows; ++r) {
        conv_store(a,
                   conv_output(a, t.pixels->image[t.first + r], t.pixels->pixel[t.first + r],
                               t.base + o + i),
                   y[r][i]);
      }
    }
  }
}

using ConvFinish = void (*)(const ConvArgs&, const ConvSums&);

template <DType Y, class Function>
ConvFinish conv_finish_last(DType residual) {
  if (residual == DType::i8) return finish_last<Y, DType::i8, Function>;
  if (residual == DType::f32) return finish_last<Y, DType::f32, Function>;
  return residual == DType::bf16 ? finish_last<Y, DType::bf16, Function>
                                 : finish_last<Y, DType::f16, Function>;
}
ConvFinish conv_finish(const ConvArgs& a) {
  if (!a.y_channels_last) return finish_first;
  ConvFinish result = nullptr;
  with_image_type(a.y_type, [&](auto type) {
    constexpr DType kY = decltype(type)::value;
    result = conv_finish_last<kY, AnyEpilogue>(a.residual_type);
    if constexpr (kY == DType::i8) {  // what a network's layers do
      if (a.epilogue == Epilogue::none) {
        result = conv_finish_last<kY, Known<Epilogue::none>>(a.residual_type);
      } else if (a.epilogue == Epilogue::relu) {
        result = conv_finish_last<kY, Known<Epilogue::relu>>(a.residual_type);
      }
    }
  });
  return result;
}

// ---- Tiles --------------------------------------------------------------------------------------

struct Runs {
  int64_t count, units;  // units of 4 codes in a run
  int64_t offsets[kConvTaps];
};

template <int Rows, int Blocks>
void conv_tile(const ConvArgs& a, const Runs& runs, const Pixels& pixels, int64_t first,
               const uint8_t* weight, int64_t x_offset, int32_t* out) {
  constexpr int kParts = kLanes / kWidth;
  constexpr int kVectors = Blocks * kParts;
  I sums[kVectors][Rows];
  unroll<kVectors>([&](int v) INLINE {
    const uint8_t* at = weight + v / kParts * a.shape.bytes + a.shape.sums;
    const I codes = load(reinterpret_cast<const int32_t*>(at) + v % kParts * kWidth);
    unroll<Rows>([&](int r) INLINE {
      const int zero = pixels.zero[first + r] + (W8A8::kFlipped ? 128 : 0);
      sums[v][r] = multiply(codes, splat(-zero));
    });
  });
  const uint8_t* x[Rows];
  unroll<Rows>([&](int r) INLINE { x[r] = pixels.x[first + r] + x_offset; });
  const uint8_t* codes[Blocks];
  unroll<Blocks>([&](int b) INLINE { codes[b] = weight + b * a.shape.bytes; });
  int64_t line = 0;
  for (int64_t run = 0; run < runs.count; ++run) {
    W8A8::accumulate_run(sums, x, runs.offsets[run], codes, line, runs.units);
    line += runs.units * kLine;
  }
  unroll<kVectors>([&](int v) INLINE {
    unroll<Rows>([&](int r) INLINE { store(out + (r * kVectors + v) * kWidth, sums[v][r]); });
  });
}

using ConvTileKernel = void (*)(const ConvArgs&, const Runs&, const Pixels&, int64_t,
                                const uint8_t*, int64_t, int32_t*);
struct ConvTiles {
  ConvTileKernel of[W8A8::kRows][W8A8::kConvBlocks];  // [rows - 1][blocks - 1]
};
template <int... Index>
constexpr ConvTiles conv_tiles(std::integer_sequence<int, Index...>) {
  return {{conv_tile<Index / W8A8::kConvBlocks + 1, Index % W8A8::kConvBlocks + 1>...}};
}

// The next of `left` items when they are cut into pieces of at most `most`, as even as can be.
int64_t even_piece(int64_t left, int64_t most) {
  const int64_t pieces = (left + most - 1) / most;
  return (left + pieces - 1) / pieces;
}

void conv_dense(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
                int64_t pixel_end) {
  static constexpr ConvTiles kTiles =
      conv_tiles(std::make_integer_sequence<int, W8A8::kRows * W8A8::kConvBlocks>{});
  const ConvFinish finish = conv_finish(a);
  Runs runs;
  const int64_t taps = run_taps(a);
  runs.count = a.taps() / taps;
  runs.units = taps * a.group_channels / 4;
  for (int64_t run = 0; run < runs.count; ++run) runs.offsets[run] = tap_offset(a, run * taps);
  alignas(64) int32_t sums[W8A8::kRows * W8A8::kConvBlocks * kLanes];
  Pixels pixels;
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += kConvSlab) {
    const int64_t count = pixel_end - slab < kConvSlab ? pixel_end - slab : kConvSlab;
    find_pixels(a, slab, slab + count, &pixels);
    for (int64_t block = block_begin; block < block_end;) {
      const int64_t group = block / a.group_blocks(), first = block % a.group_blocks();
      const int64_t group_end = (group + 1) * a.group_blocks();
      const int64_t left = (group_end < block_end ? group_end : block_end) - block;
      const int64_t blocks = even_piece(left, W8A8::kConvBlocks);
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      const int64_t x_offset = group * a.group_channels * conv_code_bytes(a);
      for (int64_t pixel = 0; pixel < count;) {
        const int64_t rows = even_piece(count - pixel, W8A8::kRows);
        kTiles.of[rows - 1][blocks - 1](a, runs, pixels, pixel, weight, x_offset, sums);
        finish(a, {sums, &pixels, pixel, first, group * a.group_outputs(), a.group_outputs(),
                   static_cast<int>(rows), static_cast<int>(blocks), weight});
        pixel += rows;
      }
      block += blocks;
    }
  }
}
