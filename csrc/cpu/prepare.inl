// Activations into panels. A panel is a row of tiles; a tile holds Tile::kRows consecutive rows of
// x (the last one those that are left), interleaved so that the inner loop walks memory once,
// whatever the distance between the rows of x:
//
//   unit[k_padded / k per unit][rows]      a unit is 4 bytes, what one broadcast reads
//
// The tile's policy (matmul_*.inl) says what a unit holds: four int8 codes, two int16 codes or one
// float. group_sums of a tile is [groups][rows].

template <class Tile>
constexpr int64_t kBytes = 4 / Tile::kUnit;  // of a k of a row

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

// ---- Codes --------------------------------------------------------------------------------------

// Codes of `count` elements from `begin` on into units; returns their sum.
template <class Tile>
int32_t encode_piece(const LinearArgs& a, const Encoder<Format::int8>& encoder, int64_t row, int64_t begin,
                     int64_t count, uint8_t* units) {
  alignas(64) float buffer[kChunk + kWidth];
  const bool given = a.x_type == DType::i8;
  const int8_t* codes = static_cast<const int8_t*>(a.x) + row * a.shape.k + begin;
  const float* x = given ? nullptr : fetch(a, row, begin, count, buffer);
  I sum = splat(0);
  for (int64_t i = 0; i < count; i += kWidth) {
    const int left = static_cast<int>(count - i < kWidth ? count - i : kWidth);
    I code;
    if (left == kWidth) {
      code = given ? load_i8(codes + i) : encode(encoder, load(x + i));
    } else {
      code = given ? load_i8(codes + i, left)
                   : encode(encoder, load_as<DType::f32>(x, i, left));
      code = zero_unless(first(left), code);
    }
    sum = add(sum, code);
    Tile::store_units(units + i * kBytes<Tile>, code);
  }
  return reduce_add(sum);
}

// Floats into units, 0 after the last.
void copy_piece(const LinearArgs& a, int64_t row, int64_t begin, int64_t count, uint8_t* units) {
  alignas(64) float buffer[kChunk + kWidth];
  const float* x = fetch(a, row, begin, count, buffer);
  std::memcpy(units, x, static_cast<size_t>(count) * 4);
  std::memset(units + count * 4, 0, static_cast<size_t>(round_up(count, kGroupPad) - count) * 4);
}

// ---- Tiles --------------------------------------------------------------------------------------

template <class Tile>
void prepare_tile(const LinearArgs& a, int64_t row, int rows) {
  const BlockShape& s = a.shape;
  // A piece may end a vector past its padding.
  constexpr int64_t kStride = (kChunk + kWidth) * kBytes<Tile>;
  alignas(64) uint8_t units[kMaxRows * kStride];
  Affine affine[kMaxRows] = {};
  int32_t* sums = a.group_sums + row * s.groups;
  if (!Tile::kFloat) std::memset(sums, 0, static_cast<size_t>(rows * s.groups) * 4);
  const bool has_scale = !Tile::kFloat && a.x_type != DType::i8;
  const bool symmetric = a.activation == Activation::int8_symmetric;
  for (int r = 0; has_scale && r < rows; ++r) {
    const Range range = symmetric ? row_range<false>(a, row + r) : row_range<true>(a, row + r);
    affine[r] = activation_affine(a, range);
    a.row_scale[row + r] = affine[r].scale;
    a.row_zero[row + r] = static_cast<float>(affine[r].zero_point);
  }
  uint8_t* panel = a.panel + row * s.k_padded * kBytes<Tile>;
  // Chunks in padded k; a chunk holds whole groups or a part of one.
  for (int64_t chunk = 0; chunk < s.k_padded; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < s.k_padded ? chunk + kChunk : s.k_padded;
    for (int r = 0; r < rows; ++r) {
      int64_t at = chunk;
      while (at < chunk_end) {
        const int64_t last = s.groups - 1;
        const int64_t g = at / s.group_padded < last ? at / s.group_padded : last;
        const int64_t inside = at - s.padded_begin(g);
        const int64_t left = s.group_length(g) - inside;
        const int64_t count = left < chunk_end - at ? left : chunk_end - at;
        uint8_t* out = units + r * kStride + (at - chunk) * kBytes<Tile>;
        if constexpr (Tile::kFloat) {
          copy_piece(a, row + r, s.group_begin(g) + inside, count, out);
        } else {
          sums[g * rows + r] += encode_piece<Tile>(a, make_encoder<Format::int8>(affine[r], symmetric), row + r,
                                                   s.group_begin(g) + inside, count, out);
        }
        at += round_up(count, kGroupPad);
      }
    }
    interleave(reinterpret_cast<const uint32_t*>(units), kStride / 4, rows,
               (chunk_end - chunk) * kBytes<Tile> / 4, reinterpret_cast<uint32_t*>(panel));
    panel += (chunk_end - chunk) * kBytes<Tile> * rows;
  }
}

template <class Tile>
void prepare_as(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += Tile::kRows) {
    prepare_tile<Tile>(a, row, tile_rows<Tile>(a, row));
  }
}
