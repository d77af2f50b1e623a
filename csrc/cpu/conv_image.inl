// The image that a convolution slides over: x as int8 codes, channels innermost, borders filled in.

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
      span.begin =
          encode_tame_span<X, Format::int8, true>(a.x, at, affine, span, out, nullptr, 1, false);
    } else if (codes.plain) {
      span.begin =
          encode_tame_span<X, Format::int8, false>(a.x, at, affine, span, out, nullptr, 1, false);
    }
    encode_span<X, Format::int8>(a.x, at, affine, a.symmetric, span, out);
  }
}

// Channels as the image has them: groups of `count`, `padded` codes apart.
struct ImageGroups {
  int64_t groups, count, padded;
};
inline ImageGroups image_groups(const ConvArgs& a) {
  if (a.depthwise || a.compact) return {1, a.channels, a.pixel_codes()};
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
    for (int64_t pixel = i; pixel < i + pixels; ++pixel) {
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
        uint8_t* const to = out + i * step + group * g.padded + c;
        // The fourth byte of a compact pixel is the next one's first.
        const int64_t words = a.compact ? pixels - 1 : pixels;
        interleave_codes(rows, words, step, to);
        for (int r = 0; words < pixels && r < g.count; ++r) to[words * step + r] = rows[r][words];
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

// Whether the image holds codes, as opposed to the units of `linear`.
bool conv_reads_codes(const ConvArgs& a) { return a.depthwise || W8A8::kConvCodes; }

int conv_code_bytes(const ConvArgs& a) {
  return conv_reads_codes(a) ? 1 : static_cast<int>(kBytes<W8A8>);
}

// Codes as the image holds them. They may lie where the image's are to end.
template <class Tile>
void put_codes(const ConvArgs& a, const uint8_t* codes, int64_t count, uint8_t* out) {
  if constexpr (!Tile::kConvCodes) {
    if (!a.depthwise) return Tile::codes_to_units(codes, count, out);
  }
  if (codes != out) std::memcpy(out, codes, static_cast<size_t>(count));
}

// Whether a row of the image is one of x, with borders.
bool is_plain_image(const ConvArgs& a) {
  return a.x_type == DType::i8 && a.x_channels_last && a.channels == a.pixel_codes() &&
         a.step[2] == 1 && a.before[2] >= 0;
}

// A row of such an image.
void plain_row(const ConvArgs& a, int64_t row, uint8_t* out) {
  const int64_t n = row / (a.grid[0] * a.grid[1]);
  const int64_t width = a.channels, size = conv_code_bytes(a);
  const int64_t z = conv_source(a, 0, row / a.grid[1] % a.grid[0]);
  const int64_t y = conv_source(a, 1, row % a.grid[1]);
  const int64_t begin = a.before[2] < a.grid[2] ? a.before[2] : a.grid[2];
  const int64_t room = a.grid[2] - begin;
  const int64_t count = z < 0 || y < 0 ? 0 : room < a.in[2] ? room : a.in[2];
  const auto fill = [&](int64_t from, int64_t to) {
    const int64_t codes = (to - from) * width;
    uint8_t* const units = out + from * width * size;
    uint8_t* const at = units + codes * (size - 1);
    std::memset(at, a.codes[n].zero, static_cast<size_t>(codes));
    put_codes<W8A8>(a, at, codes, units);
  };
  fill(0, begin);
  if (count > 0) {
    const int64_t pixel = ((n * a.in[0] + z) * a.in[1] + y) * a.in[2];
    put_codes<W8A8>(a, static_cast<const uint8_t*>(a.x) + pixel * width, count * width,
                    out + begin * width * size);
  }
  fill(begin + count, a.grid[2]);
}

void conv_prepare(const ConvArgs& a, uint8_t* image, int64_t begin, int64_t end) {
  const int64_t codes = a.grid[2] * a.pixel_codes(), size = conv_code_bytes(a);
  if (is_plain_image(a)) {
    for (int64_t row = begin; row < end; ++row) plain_row(a, row, image + row * codes * size);
    return;
  }
  with_image_type(a.x_type, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* out = image + row * codes * size;
      uint8_t* signed_codes = out + codes * (size - 1);
      image_row<decltype(type)::value>(a, row, signed_codes);
      put_codes<W8A8>(a, signed_codes, codes, out);
    }
  });
}
