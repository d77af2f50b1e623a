// Activations into panels. A panel is a row of tiles; a tile holds Tile::kRows consecutive rows of
// x (the last one those that are left), interleaved so that the inner loop walks memory once,
// whatever the distance between the rows of x:
//
//   unit[k_padded / k per unit][rows]      a unit is 4 bytes, what one broadcast reads
//
// The tile's policy (matmul_*.inl) says what a unit holds: four int8 codes, two int16 codes or
// bfloat16, or one float. group_sums of a tile is [groups][rows]: sums of the int8 codes, for late
// zero points as floats (whole numbers below 2^24), or of x where it stays float.

template <class Tile>
constexpr int64_t kBytes = 4 / Tile::kUnit;  // of a k of a row

// A policy for asymmetric int4 weights. Its products are those of the codes less 8, the middle;
// what zero points besides the middle add is the same for all of a group, times x, and is added
// when the group is finished. A type of its own, because symmetric weights are slower for a mere
// question.
template <class Tile>
struct LateZero : Tile {
  static constexpr bool kLateZero = true;
};
template <class Tile>
constexpr bool kLateZero = requires { Tile::kLateZero; };

template <class Tile>
int tile_rows(const LinearArgs& a, int64_t row) {
  return static_cast<int>(a.rows - row < Tile::kRows ? a.rows - row : Tile::kRows);
}

constexpr int64_t kChunk = 512;  // k that are encoded before they are interleaved
constexpr int kMaxRows = 8;      // of a tile

// source[row][stride] to out[i][rows], 0 <= i < count.
void interleave(const uint32_t* source, int64_t stride, int rows, int64_t count, uint32_t* out) {
  if (rows == 1) {
    std::memcpy(out, source, static_cast<size_t>(count) * 4);
    return;
  }
  int row = 0;
  for (; row + 4 <= rows; row += 4) {
    const uint32_t* from = source + row * stride;
    uint32_t* to = out + row;
    const auto line = [&](int r, int64_t i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride + i));
    };
    const auto put = [&](int64_t i, __m128i x) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * rows), x);
    };
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      const __m128i a = _mm_unpacklo_epi32(line(0, i), line(1, i));
      const __m128i b = _mm_unpacklo_epi32(line(2, i), line(3, i));
      const __m128i c = _mm_unpackhi_epi32(line(0, i), line(1, i));
      const __m128i d = _mm_unpackhi_epi32(line(2, i), line(3, i));
      put(i, _mm_unpacklo_epi64(a, b));
      put(i + 1, _mm_unpackhi_epi64(a, b));
      put(i + 2, _mm_unpacklo_epi64(c, d));
      put(i + 3, _mm_unpackhi_epi64(c, d));
    }
    for (; i < count; ++i) {
      for (int r = 0; r < 4; ++r) to[i * rows + r] = from[r * stride + i];
    }
  }
  for (; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) out[i * rows + row] = source[row * stride + i];
  }
}

// ---- Rows of x as the matmul sees them ----------------------------------------------------------

template <DType X>
void convert(const LinearArgs& a, int64_t row, int64_t begin, int64_t count, float* out) {
  const int64_t at = row * a.shape.k + begin;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int left = static_cast<int>(count - i < kWidth ? count - i : kWidth);
    F x = left == kWidth ? load_as<X>(a.x, at + i) : load_as<X>(a.x, at + i, left);
    if (a.premul != nullptr) {
      const float* factor = a.premul + begin;
      x = mul(x, left == kWidth ? load(factor + i) : load_as<DType::f32>(factor, i, left));
    }
    store(out + i, x);
  }
}

// Elements [begin, begin + count) of a row, count <= kChunk: where they are if they are plain
// floats, else in `buffer`, which has kWidth floats to spare.
const float* fetch(const LinearArgs& a, int64_t row, int64_t begin, int64_t count, float* buffer) {
  if (a.perm != nullptr) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = activation_at(a, row, begin + i);
  } else if (a.x_type == DType::bf16) {
    convert<DType::bf16>(a, row, begin, count, buffer);
  } else if (a.x_type == DType::f16) {
    convert<DType::f16>(a, row, begin, count, buffer);
  } else if (a.premul != nullptr) {
    convert<DType::f32>(a, row, begin, count, buffer);
  } else {
    return static_cast<const float*>(a.x) + row * a.shape.k + begin;
  }
  return buffer;
}

// min and max are needed when the scale is asymmetric.
template <bool kSigned>
Range row_range(const LinearArgs& a, int64_t row) {
  if (a.perm == nullptr && a.premul == nullptr) {
    const int64_t begin = row * a.shape.k;
    Range result;
    with_float_type(a.x_type, [&](auto type) {
      result = range_of<decltype(type)::value, kSigned>(a.x, begin, begin + a.shape.k);
    });
    return result;
  }
  alignas(64) float buffer[kChunk + kWidth];
  Range all;
  for (int64_t k = 0; k < a.shape.k; k += kChunk) {
    const int64_t count = a.shape.k - k < kChunk ? a.shape.k - k : kChunk;
    const Range part = range_of<DType::f32, kSigned>(fetch(a, row, k, count, buffer), 0, count);
    all.min = part.min < all.min ? part.min : all.min;
    all.max = part.max > all.max ? part.max : all.max;
    all.magnitude = part.magnitude > all.magnitude ? part.magnitude : all.magnitude;
  }
  return all;
}

// Asks for what `fetch` will read at the same place in the next tile: while codes are made from
// what the cache holds, memory would be idle.
void prefetch_row(const LinearArgs& a, int64_t row, int64_t begin, int64_t count) {
  if (row >= a.rows || a.perm != nullptr) return;
  const int64_t size = bytes_of(a.x_type);
  const char* next = static_cast<const char*>(a.x) + (row * a.shape.k + begin) * size;
  for (int64_t i = 0; i < count * size; i += kLine) _mm_prefetch(next + i, _MM_HINT_T1);
}

// ---- Units --------------------------------------------------------------------------------------

// `count` codes into units, 0 in what is left of the last vector. codes(i, n) are the n from i on.
template <class Tile, class Codes>
SIMD void fill_units(int64_t count, uint8_t* units, const Codes& codes) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Tile::store_units(units + i * kBytes<Tile>, codes(i, kWidth));
  }
  if (i < count) {
    const int left = static_cast<int>(count - i);
    Tile::store_units(units + i * kBytes<Tile>, zero_unless(first(left), codes(i, left)));
  }
}

// A row's codes. `plain`: the scale was chosen for its numbers and symmetric, so that no quotient
// is NaN or rounds to a code out of range.
struct RowCodes {
  Affine affine;
  bool plain;
};

template <class Tile>
void encode_piece(const LinearArgs& a, const RowCodes& codes, int64_t row, int64_t begin,
                  int64_t count, uint8_t* units) {
  if (a.x_type == DType::i8) {
    const int8_t* given = static_cast<const int8_t*>(a.x) + row * a.shape.k + begin;
    return fill_units<Tile>(count, units, [&](int64_t i, int n) INLINE {
      return n == kWidth ? load_i8(given + i) : load_i8(given + i, n);
    });
  }
  alignas(64) float buffer[kChunk + kWidth];
  const float* x = fetch(a, row, begin, count, buffer);
  const auto number = [&](int64_t i, int n) INLINE {
    return n == kWidth ? load(x + i) : load_as<DType::f32>(x, i, n);
  };
  if (codes.plain) {
    const F inverse = splat(codes.affine.inverse);
    return fill_units<Tile>(count, units, [&](int64_t i, int n) INLINE {
      return round_int(mul(number(i, n), inverse));
    });
  }
  const bool symmetric = a.activation == Activation::int8_symmetric;
  const Encoder<Format::int8> encoder = make_encoder<Format::int8>(codes.affine, symmetric);
  fill_units<Tile>(count, units,
                   [&](int64_t i, int n) INLINE { return encode(encoder, number(i, n)); });
}

// Numbers into units, 0 after the last.
template <class Tile>
void copy_piece(const LinearArgs& a, int64_t row, int64_t begin, int64_t count, uint8_t* units) {
  if constexpr (Tile::kUnit == 2) {  // two bfloat16 as they are
    uint16_t words[kChunk];
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + row * a.shape.k;
    if (a.perm != nullptr) {
      for (int64_t i = 0; i < count; ++i) words[i] = x[a.perm[begin + i]];
    }
    return Tile::copy_units(a.perm != nullptr ? words : x + begin, count, units);
  }
  alignas(64) float buffer[kChunk + kWidth];
  const float* x = fetch(a, row, begin, count, buffer);
  std::memcpy(units, x, static_cast<size_t>(count) * 4);
  std::memset(units + count * 4, 0, static_cast<size_t>(round_up(count, kGroupPad) - count) * 4);
}

// A sum as four bytes.
SIMD F raw(F sum) { return sum; }
SIMD F raw(I sum) { return floats(sum); }

// Sums of each group and row of a tile, from the finished panel.
template <class Tile>
void sum_groups(const BlockShape& s, const uint8_t* panel, int rows, int32_t* sums) {
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t units = s.padded_length(g) / Tile::kUnit;
    const float* unit =
        reinterpret_cast<const float*>(panel + s.padded_begin(g) * rows * kBytes<Tile>);
    typename Tile::Sum even{}, odd{};
    for (int64_t u = 0; u < units; u += 2) {  // groups are padded to an even number of units
      even = Tile::add_units(even, bits(load_as<DType::f32>(unit, u * rows, rows)));
      odd = Tile::add_units(odd, bits(load_as<DType::f32>(unit, (u + 1) * rows, rows)));
    }
    const typename Tile::Sum sum = add(even, odd);
    store_as<DType::f32>(sums, g * rows, kLateZero<Tile> ? float_of(sum) : raw(sum), rows);
  }
}

// ---- Tiles --------------------------------------------------------------------------------------

template <class Tile>
RowCodes choose_codes(const LinearArgs& a, int64_t row) {
  if (a.x_type == DType::i8) return {};
  const bool symmetric = a.activation == Activation::int8_symmetric;
  const Range range = symmetric ? row_range<false>(a, row) : row_range<true>(a, row);
  const Affine affine = activation_affine(a, range);
  a.row_scale[row] = affine.scale;
  a.row_zero[row] = static_cast<float>(affine.zero_point);
  return {affine, symmetric && !a.is_static && range.finite()};
}

// k of the piece that begins at `at` of the padded row: all that lies side by side in x and in the
// panel, up to `end`.
SIMD Span piece_at(const BlockShape& s, int64_t at, int64_t end) {
  if (s.group_padded == s.group_size) return {at, end < s.k ? end : s.k};
  const int64_t last = s.groups - 1;
  const int64_t g = at / s.group_padded < last ? at / s.group_padded : last;
  const int64_t begin = s.group_begin(g) + at - s.padded_begin(g);
  const int64_t group_end = s.group_begin(g) + s.group_length(g);
  return {begin, group_end - begin < end - at ? group_end : begin + end - at};
}

template <class Tile>
void prepare_tile(const LinearArgs& a, int64_t row, int rows) {
  const BlockShape& s = a.shape;
  // The last vector of a piece may go beyond its padding.
  constexpr int64_t kStride = (kChunk + kWidth) * kBytes<Tile>;
  alignas(64) uint8_t units[kMaxRows * kStride];
  RowCodes codes[kMaxRows] = {};
  if constexpr (!Tile::kFloat) {
    for (int r = 0; r < rows; ++r) codes[r] = choose_codes<Tile>(a, row + r);
  }
  uint8_t* const panel = a.panel + row * s.k_padded * kBytes<Tile>;
  for (int64_t chunk = 0; chunk < s.k_padded; chunk += kChunk) {
    const int64_t end = chunk + kChunk < s.k_padded ? chunk + kChunk : s.k_padded;
    for (int r = 0; r < rows; ++r) {
      for (int64_t at = chunk; at < end;) {
        const Span piece = piece_at(s, at, end);
        const int64_t count = piece.end - piece.begin;
        uint8_t* out = units + r * kStride + (at - chunk) * kBytes<Tile>;
        prefetch_row(a, row + Tile::kRows + r, piece.begin, count);
        if constexpr (Tile::kFloat) {
          copy_piece<Tile>(a, row + r, piece.begin, count, out);
        } else {
          encode_piece<Tile>(a, codes[r], row + r, piece.begin, count, out);
        }
        at += round_up(count, kGroupPad);
      }
    }
    interleave(reinterpret_cast<const uint32_t*>(units), kStride / 4, rows,
               (end - chunk) / Tile::kUnit,
               reinterpret_cast<uint32_t*>(panel + chunk * rows * kBytes<Tile>));
  }
  // Of symmetric weights only int4 codes that meet int8 ones have something to be taken away.
  if constexpr (!Tile::kFloat || kLateZero<Tile>) {
    if (Tile::kFormat == Format::int4 || !a.layout.symmetric) {
      sum_groups<Tile>(s, panel, rows, a.group_sums + row * s.groups);
    }
  }
}

template <class Tile>
void prepare_as(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += Tile::kRows) {
    prepare_tile<Tile>(a, row, tile_rows<Tile>(a, row));
  }
}
