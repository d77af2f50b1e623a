// dx = dy . W, reduced over the output features n. A panel W[n block][columns] is dequantized once
// and meets all rows; each sum is one chain of fma in ascending n, as in the scalar reference, so
// neither the tile nor the way the rows are cut shows in the result. The scratch holds
//
//   sums  [kBackwardRows][kBackwardColumns]
//   panel [kBackwardPanel n][kBackwardColumns]
//   tile  [kBackwardTile][kBackwardPanel n]      rows of dy

constexpr int kBackwardTile = 6;  // rows, times vectors of columns, whose sums stay in registers
constexpr int kBackwardVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kBackwardPanel = 256;  // 64 KiB, in the L2 cache
constexpr int64_t kBackwardRows =
    (kBackwardScratch - kBackwardPanel * (kBackwardColumns + kBackwardTile)) / kBackwardColumns;
static_assert(kBackwardRows > 0 && kBackwardColumns % (kBackwardVectors * kWidth) == 0, "");

template <int Rows, int Vectors>
inline void backward_tile(const float* dy, const float* panel, int64_t count, float* sums) {
  F sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * kBackwardColumns + v * kWidth);
  }
  for (int64_t n = 0; n < count; ++n) {
    F w[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) w[v] = load(panel + n * kBackwardColumns + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F d = splat(dy[r * kBackwardPanel + n]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(d, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(sums + r * kBackwardColumns + v * kWidth, sum[r][v]);
  }
}

template <int Rows>
void backward_rows(const float* dy, const float* panel, int64_t count, int64_t columns,
                   float* sums) {
  int64_t k = 0;
  for (; k + (kBackwardVectors - 1) * kWidth < columns; k += kBackwardVectors * kWidth) {
    backward_tile<Rows, kBackwardVectors>(dy, panel + k, count, sums + k);
  }
  for (; k < columns; k += kWidth) backward_tile<Rows, 1>(dy, panel + k, count, sums + k);
}

void backward(const BackwardArgs& a, int64_t row_begin, int64_t row_end, int64_t k_begin,
              int64_t k_end, float* scratch) {
  float* const sums = scratch;
  float* const panel = sums + kBackwardRows * kBackwardColumns;
  float* const tile = panel + kBackwardPanel * kBackwardColumns;
  const PackedRows weight{a.packed, a.layout, a.shape};
  const int64_t columns = k_end - k_begin;
  if (columns % kWidth != 0) {
    // Columns that fill up the last vector are computed and dropped; they must be numbers.
    std::memset(panel, 0, sizeof(float) * kBackwardPanel * kBackwardColumns);
  }

  for (int64_t first_row = row_begin; first_row < row_end; first_row += kBackwardRows) {
    const int64_t rows = row_end - first_row < kBackwardRows ? row_end - first_row : kBackwardRows;
    for (int64_t i = 0; i < rows * kBackwardColumns; ++i) sums[i] = 0.0f;
    for (int64_t n = 0; n < a.n; n += kBackwardPanel) {
      const int64_t count = a.n - n < kBackwardPanel ? a.n - n : kBackwardPanel;
      with_format(a.layout.format, [&](auto code) {
        constexpr Format kFormat = decltype(code)::value;
        if constexpr (info(kFormat).packs) {
          for (int64_t i = 0; i < count; ++i) {
            dequantize_feature<DType::f32, kFormat>(weight, n + i, k_begin, k_end, panel,
                                                    i * kBackwardColumns);
          }
        }
      });
      for (int64_t row = 0; row < rows; row += kBackwardTile) {
        const int64_t left = rows - row;
        const int height = static_cast<int>(left < kBackwardTile ? left : kBackwardTile);
        // Rows of dy may be a multiple of 4096 bytes apart and would share a cache set.
        for (int r = 0; r < height; ++r) {
          std::memcpy(tile + r * kBackwardPanel, a.dy + (first_row + row + r) * a.n + n,
                      static_cast<size_t>(count) * sizeof(float));
        }
        using Step = void (*)(const float*, const float*, int64_t, int64_t, float*);
        constexpr Step kSteps[kBackwardTile] = {backward_rows<1>, backward_rows<2>,
                                                backward_rows<3>, backward_rows<4>,
                                                backward_rows<5>, backward_rows<6>};
        kSteps[height - 1](tile, panel, count, columns, sums + row * kBackwardColumns);
      }
    }
    with_float_type(a.dx_type, [&](auto type) {
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = sums + row * kBackwardColumns;
        const int64_t at = (first_row + row) * a.shape.k + k_begin;
        int64_t k = 0;
        for (; k + kWidth <= columns; k += kWidth) {
          store_as<decltype(type)::value>(a.dx, at + k, load(from + k));
        }
        if (k < columns) {
          store_as<decltype(type)::value>(a.dx, at + k, load(from + k),
                                          static_cast<int>(columns - k));
        }
      }
    });
  }
}
