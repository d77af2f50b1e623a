// dx = dy . W, reduced over the output features n. A panel W[n block][columns] is dequantized once
// and meets all rows; each sum is one chain of fma in ascending n, as in the scalar reference, so
// neither the tile nor the way the work is cut shows in the result. The scratch holds
//
//   sums    [kBackwardRows][kBackwardColumns]
//   panel   [kBackwardColumns / kStrip][kBackwardPanel n][kStrip]
//   tile    [kBackwardTile][kBackwardPanel n]          rows of dy
//   feature [Products::kN][kBackwardColumns + kWidth]  W[n] before it is cut into strips
//
// A policy says how many n a product takes at once (they share the four bytes of an element of
// panel and tile), how it is added, and whether it has a faster way from lines to the panel.

constexpr int kBackwardTile = 6;  // rows, times vectors of a strip, whose sums stay in registers
constexpr int kBackwardVectors = kWidth == 16 ? 4 : 2;
// Columns that lie side by side in the panel: a strip of it is read from end to end.
constexpr int64_t kStrip = kBackwardVectors * kWidth;
constexpr int64_t kBackwardPanel = 256;
constexpr int64_t kBackwardRows = 512;
static_assert(kBackwardColumns % kStrip == 0, "");
static_assert((kBackwardRows + kBackwardPanel + 2) * kBackwardColumns + 2 * kWidth +
                      kBackwardTile * kBackwardPanel <=
                  kBackwardScratch,
              "");

// One n as a float.
struct Singles {
  static constexpr int kN = 1;
  static constexpr bool kTurnsLines = false;
  static INLINE void add_product(F& sum, F dy, F weight) { sum = fma(dy, weight, sum); }
  static INLINE F join(const F (&weights)[kN]) { return weights[0]; }
};

// `count` products with a row of dy, for each of Rows rows.
template <class Products, int Rows, int Vectors>
inline void backward_tile(const float* dy, const float* strip, int64_t count, float* sums) {
  F sum[Rows][Vectors];
  unroll<Rows>([&](int r) INLINE {
    unroll<Vectors>([&](int v)
                        INLINE { sum[r][v] = load(sums + r * kBackwardColumns + v * kWidth); });
  });
  for (int64_t n = 0; n < count; ++n) {
    F w[Vectors];
    unroll<Vectors>([&](int v) INLINE { w[v] = load(strip + n * kStrip + v * kWidth); });
    unroll<Rows>([&](int r) INLINE {
      const F d = splat(dy[r * kBackwardPanel + n]);
      unroll<Vectors>([&](int v) INLINE { Products::add_product(sum[r][v], d, w[v]); });
    });
  }
  unroll<Rows>([&](int r) INLINE {
    unroll<Vectors>([&](int v)
                        INLINE { store(sums + r * kBackwardColumns + v * kWidth, sum[r][v]); });
  });
}

template <class Products, int Rows>
void backward_rows(const float* dy, const float* panel, int64_t count, int64_t columns,
                   float* sums) {
  for (int64_t k = 0; k < columns; k += kStrip) {
    const float* strip = panel + k * (kBackwardPanel / Products::kN);
    if (k + kStrip - kWidth < columns) {
      backward_tile<Products, Rows, kBackwardVectors>(dy, strip, count, sums + k);
    } else {
      for (int64_t i = 0; k + i < columns; i += kWidth) {
        backward_tile<Products, Rows, 1>(dy, strip + i, count, sums + k + i);
      }
    }
  }
}

// Where column k lies in a row of the panel.
template <class Products>
constexpr int64_t panel_column(int64_t k) {
  return k / kStrip * (kBackwardPanel / Products::kN) * kStrip + k % kStrip;
}

// W[n .. n + count)[columns] into the panel, by way of `feature`, whose floats past the last column
// stay 0: the columns that fill up a vector are computed and dropped.
template <class Products, Format Fmt>
void dequantize_features(const PackedRows& weight, int64_t n, int64_t count, Span columns,
                         float* feature, float* panel) {
  constexpr int kN = Products::kN;
  constexpr int64_t kFeature = kBackwardColumns + kWidth;
  for (int64_t i = 0; i < count; i += kN) {
    for (int j = 0; j < kN; ++j) {
      if (i + j < count) {
        dequantize_feature<DType::f32, Fmt>(weight, n + i + j, columns.begin, columns.end,
                                            feature + j * kFeature, 0);
      } else {
        std::memset(feature + j * kFeature, 0, sizeof(float) * kFeature);
      }
    }
    float* const row = panel + i / kN * kStrip;
    for (int64_t k = 0; k < columns.end - columns.begin; k += kWidth) {
      F weights[kN];
      unroll<kN>([&](int j) INLINE { weights[j] = load(feature + j * kFeature + k); });
      store(row + panel_column<Products>(k), Products::join(weights));
    }
  }
}

template <class Products>
void dequantize_panel(const BackwardArgs& a, int64_t n, int64_t count, Span columns, float* feature,
                      float* panel) {
  const PackedRows weight{a.packed, a.layout, a.shape};
  with_format(a.layout.format, [&](auto code) {
    constexpr Format kFormat = decltype(code)::value;
    if constexpr (info(kFormat).packs) {
      if constexpr (Products::kTurnsLines) {
        // Where 16 columns are all of one group.
        if (a.shape.groups == 1 || a.shape.group_size % kWidth == 0) {
          return Products::template turn_lines<kFormat>(weight, n, count, columns, panel);
        }
      }
      dequantize_features<Products, kFormat>(weight, n, count, columns, feature, panel);
    }
  });
}

// Elements of dy for the tile.
template <class Products, DType T>
void read_row(const void* from, int64_t at, int64_t count, float* to) {
  if constexpr (Products::kN == 2) {
    to[count / 2] = 0.0f;
    std::memcpy(to, static_cast<const uint16_t*>(from) + at, static_cast<size_t>(count) * 2);
    return;
  }
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load_as<T>(from, at + i));
  if (i < count) {
    const int left = static_cast<int>(count - i);
    store_as<DType::f32>(to, i, load_as<T>(from, at + i, left), left);
  }
}

template <DType T>
void write_floats(const float* from, int64_t count, void* to, int64_t at) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_as<T>(to, at + i, load(from + i));
  if (i < count) store_as<T>(to, at + i, load(from + i), static_cast<int>(count - i));
}

template <class Products, DType T>
void backward_as(const BackwardArgs& a, int64_t row_begin, int64_t row_end, int64_t k_begin,
                 int64_t k_end, float* scratch) {
  float* const sums = scratch;
  float* const panel = sums + kBackwardRows * kBackwardColumns;
  float* const tile = panel + kBackwardPanel * kBackwardColumns;
  float* const feature = tile + kBackwardTile * kBackwardPanel;
  const int64_t columns = k_end - k_begin;
  std::memset(feature, 0, sizeof(float) * Products::kN * (kBackwardColumns + kWidth));

  for (int64_t first_row = row_begin; first_row < row_end; first_row += kBackwardRows) {
    const int64_t rows = row_end - first_row < kBackwardRows ? row_end - first_row : kBackwardRows;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(rows) * kBackwardColumns);
    for (int64_t n = 0; n < a.n; n += kBackwardPanel) {
      const int64_t count = a.n - n < kBackwardPanel ? a.n - n : kBackwardPanel;
      dequantize_panel<Products>(a, n, count, {k_begin, k_end}, feature, panel);
      for (int64_t row = 0; row < rows; row += kBackwardTile) {
        const int64_t left = rows - row;
        const int height = static_cast<int>(left < kBackwardTile ? left : kBackwardTile);
        // Rows of dy may be a multiple of 4096 bytes apart and would share a cache set.
        for (int r = 0; r < height; ++r) {
          read_row<Products, T>(a.dy, (first_row + row + r) * a.n + n, count,
                                tile + r * kBackwardPanel);
        }
        using Step = void (*)(const float*, const float*, int64_t, int64_t, float*);
        constexpr Step kSteps[kBackwardTile] = {
            backward_rows<Products, 1>, backward_rows<Products, 2>, backward_rows<Products, 3>,
            backward_rows<Products, 4>, backward_rows<Products, 5>, backward_rows<Products, 6>};
        constexpr int kN = Products::kN;
        kSteps[height - 1](tile, panel, (count + kN - 1) / kN, columns,
                           sums + row * kBackwardColumns);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      write_floats<T>(sums + row * kBackwardColumns, columns, a.dx,
                      (first_row + row) * a.shape.k + k_begin);
    }
  }
}

[[maybe_unused]] void backward(const BackwardArgs& a, int64_t row_begin, int64_t row_end,
                               int64_t k_begin, int64_t k_end, float* scratch) {
  with_float_type(a.type, [&](auto type) {
    backward_as<Singles, decltype(type)::value>(a, row_begin, row_end, k_begin, k_end, scratch);
  });
}
