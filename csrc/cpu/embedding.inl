// Rows of a packed weight, one output feature at a time: embedding reads all of a row, backward a
// range of columns.

// A packed weight and what reads it.
struct PackedRows {
  const uint8_t* packed;
  const Layout& layout;
  const BlockShape& shape;
};

// Codes from `p` on, k on a line boundary. A load may run past the end of its group: by 3 lines at
// most, which belong to the same row (an int8 row has scales, sums and bias behind its codes, a
// 4-bit one at least scales).
template <Format Fmt>
SIMD I load_lane(const uint8_t* p) {
  if constexpr (Fmt == Format::int8) return load_lane_i8(p);
  return load_lane_u4(p);
}

// W[n][k_begin .. k_end) to y[at ..).
template <DType T, Format Fmt>
SIMD void dequantize_feature(const PackedRows& w, int64_t n, int64_t k_begin, int64_t k_end,
                             void* y, int64_t at) {
  if (k_begin >= k_end) return;
  constexpr int64_t kPerLine = Fmt == Format::int8 ? 4 : 8;
  const BlockShape& shape = w.shape;
  const uint8_t* row = w.packed + n / kLanes * shape.bytes;
  const int lane = static_cast<int>(n % kLanes);
  at -= k_begin;  // y[at + k] is W[n][k]
  int64_t k = k_begin;
  for (int64_t g = k_begin / shape.group_size; k < k_end; ++g) {
    const float scale = packed_scale(row, w.layout, shape, g, lane);
    const int zero = packed_zero(row, w.layout, shape, g, lane);
    const int64_t padding = shape.padded_begin(g) - shape.group_begin(g);
    const int64_t group_end = shape.group_begin(g) + shape.group_length(g);
    const int64_t end = group_end < k_end ? group_end : k_end;
    for (; k < end && (k + padding) % kPerLine != 0; ++k) {
      store_float(y, T, at + k, decode(packed_code(row, Fmt, k + padding, lane), Fmt, scale, zero));
    }
    const Decoder<Fmt> decoder = make_decoder<Fmt>(scale, zero);
    for (; k < end; k += kWidth) {
      const I codes = load_lane<Fmt>(row + code_offset(Fmt, k + padding, lane));
      if (end - k >= kWidth) {
        store_as<T>(y, at + k, decode(decoder, codes));
      } else {
        store_as<T>(y, at + k, decode(decoder, codes), static_cast<int>(end - k));
      }
    }
    k = end;
  }
}

[[maybe_unused]] void embedding(const EmbeddingArgs& a, int64_t begin, int64_t end) {
  const PackedRows weight{a.packed, a.layout, a.shape};
  with_float_type(a.y_type, [&](auto type) {
    with_format(a.layout.format, [&](auto code) {
      constexpr Format kFormat = decltype(code)::value;
      if constexpr (info(kFormat).packs) {
        for (int64_t row = begin; row < end; ++row) {
          dequantize_feature<decltype(type)::value, kFormat>(weight, a.indices[row], 0, a.shape.k,
                                                             a.y, row * a.shape.k);
        }
      }
    });
  });
}
