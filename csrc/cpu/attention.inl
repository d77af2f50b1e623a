// Attention. Scores lie as [key][row]: a vector holds rows of q, so that softmax needs no
// reductions, and keys and weights are broadcast from where they are. All sums go over ascending
// features or keys, one fma each, which gives the bits of scalar_transformer.cpp.

constexpr int kTileRows = 2 * kWidth;              // rows of q in a tile
constexpr int kBroadcasts = kWidth == 16 ? 8 : 4;  // rows of a register tile, two vectors wide
constexpr int64_t kKeyBlock = 64;  // keys whose k, or v and weights, stay in the first cache

// sums[r][c] += a[r * a_row + i * a_step] * b[i * b_step + c] for `count` steps.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
};

template <int Rows, int Vectors>
SIMD void multiply(const Product& p, int64_t begin, int64_t end, F (&sums)[Rows][Vectors]) {
  for (int64_t i = begin; i < end; ++i) {
    F b[Vectors];
    unroll<Vectors>([&](auto v) INLINE { b[v] = load(p.b + i * p.b_step + v * kWidth); });
    unroll<Rows>([&](auto r) INLINE {
      const F a = splat(p.a[r * p.a_row + i * p.a_step]);
      unroll<Vectors>([&](auto v) INLINE { sums[r][v] = fma(a, b[v], sums[r][v]); });
    });
  }
}

// body(first row, their number as a constant) over `count` rows.
template <int Rows, class Body>
SIMD void in_tiles(int64_t count, const Body& body, int64_t at = 0) {
  for (; at + Rows <= count; at += Rows) body(at, std::integral_constant<int, Rows>{});
  if constexpr (Rows > 1) in_tiles<Rows / 2>(count, body, at);
}

// A tile of rows of one head.
struct AttentionTile {
  int64_t batch, head, row;
  int rows;      // of this tile, kTileRows at most
  int64_t keys;  // that any of them sees
  // Scratch.
  float* q;        // [head_size, kTileRows]
  float* weights;  // [keys, kTileRows]
  float* sums;     // [kTileRows, value_width()]
  float* block;    // [kKeyBlock, the wider of k and v]: k or v as floats
  float* mask;     // [kKeyBlock, kTileRows], or [kKeyBlock] where all rows share it
};

int64_t value_width(const AttentionArgs& a) { return round_up(a.value_size, kWidth); }
int64_t block_width(const AttentionArgs& a) {
  const int64_t keys = round_up(a.head_size, kWidth), values = value_width(a);
  return keys > values ? keys : values;
}

// Rows of x as floats, filled up with zeros to whole vectors.
template <DType T>
void widen_rows(const void* x, int64_t at, int64_t step, int64_t rows, int64_t size, int64_t width,
                float* out) {
  for (int64_t r = 0; r < rows; ++r, at += step, out += width) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(out + i, load_as<T>(x, at + i));
    if (i < size) store(out + i, load_as<T>(x, at + i, static_cast<int>(size - i)));
  }
}

// The rows of q that a tile holds, as columns; zeros where it has fewer.
template <DType T>
void load_queries(const AttentionArgs& a, const AttentionTile& t) {
  const int64_t base = t.batch * a.q_step[0] + t.head * a.q_step[1] + t.row * a.q_step[2];
  for (int first_row = 0; first_row < kTileRows; first_row += kWidth) {
    for (int64_t d = 0; d < a.head_size; d += kWidth) {
      const int64_t left = a.head_size - d;
      const int columns = static_cast<int>(left < kWidth ? left : kWidth);
      F x[kWidth];
      unroll<kWidth>([&](auto r) INLINE {
        const int row = first_row + r;
        const int64_t at = base + row * a.q_step[2] + d;
        if (row >= t.rows) {
          x[r] = splat(0.0f);
        } else if (columns == kWidth) {
          x[r] = load_as<T>(a.q, at);
        } else {
          x[r] = load_as<T>(a.q, at, columns);
        }
      });
      transpose(x);
      float* out = t.q + d * kTileRows + first_row;
      unroll<kWidth>([&](auto c) INLINE {
        if (c < columns) store(out + c * kTileRows, x[c]);
      });
    }
  }
}

// What is added to the scores of keys [begin, end), into t.mask.
void load_mask(const AttentionArgs& a, const AttentionTile& t, int64_t begin, int64_t end) {
  if (a.mask == nullptr || a.mask_step[2] == 0) {
    for (int64_t j = begin; j < end; ++j) {
      t.mask[j - begin] = attention_mask(a, t.batch, t.head, t.row, j);
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    float* out = t.mask + (j - begin) * kTileRows;
    for (int r = 0; r < t.rows; ++r) {
      out[r] = attention_mask(a, t.batch, t.head, t.row + r, j);
    }
    for (int r = t.rows; r < kTileRows; ++r) out[r] = 0.0f;
  }
}

// The scores of all keys into t.weights; the largest of each row.
template <DType T>
SIMD void score(const AttentionArgs& a, const AttentionTile& t, F (&largest)[2]) {
  const int64_t base = t.batch * a.k_step[0] + t.head / a.group * a.k_step[1];
  const bool shared_mask = a.mask == nullptr || a.mask_step[2] == 0;
  for (int64_t begin = 0; begin < t.keys; begin += kKeyBlock) {
    const int64_t end = begin + kKeyBlock < t.keys ? begin + kKeyBlock : t.keys;
    const int64_t at = base + begin * a.k_step[2];
    Product p{t.block, block_width(a), 1, t.q, kTileRows};
    if constexpr (T == DType::f32) {
      p.a = static_cast<const float*>(a.k) + at;
      p.a_row = a.k_step[2];
    } else {
      widen_rows<T>(a.k, at, a.k_step[2], end - begin, a.head_size, p.a_row, t.block);
    }
    load_mask(a, t, begin, end);
    in_tiles<kBroadcasts>(end - begin, [&](int64_t first_key, auto count) INLINE {
      constexpr int kKeys = decltype(count)::value;
      F sums[kKeys][2];
      unroll<kKeys>([&](auto r) INLINE { sums[r][0] = sums[r][1] = splat(0.0f); });
      Product of_keys = p;
      of_keys.a += first_key * p.a_row;
      multiply<kKeys, 2>(of_keys, 0, a.head_size, sums);
      unroll<kKeys>([&](auto r) INLINE {
        const int64_t j = first_key + r;
        const int64_t hidden = a.causal ? begin + j - t.row : 0;  // rows that do not see the key
        unroll<2>([&](auto v) INLINE {
          const F added =
              shared_mask ? splat(t.mask[j]) : load(t.mask + j * kTileRows + v * kWidth);
          F s = fma(sums[r][v], splat(a.scale), added);
          if (hidden > v * kWidth) {
            const int64_t lanes = hidden - v * kWidth;
            s = select(first(static_cast<int>(lanes < kWidth ? lanes : kWidth)), splat(-INFINITY),
                       s);
          }
          largest[v] = max(s, largest[v]);
          store(t.weights + (begin + j) * kTileRows + v * kWidth, s);
        });
      });
    });
  }
}

// The rows' sums of products with v over keys [begin, end), Rows rows from `row` on, and then y.
template <DType T, int Rows, int Vectors>
SIMD void weigh(const AttentionArgs& a, const AttentionTile& t, const Product& values,
                int64_t begin, int64_t end, int row, int64_t column, const float* inverse) {
  F sums[Rows][Vectors];
  float* kept = t.sums + row * value_width(a) + column;
  unroll<Rows>([&](auto r) INLINE {
    unroll<Vectors>([&](auto v) INLINE {
      sums[r][v] = begin == 0 ? splat(0.0f) : load(kept + r * value_width(a) + v * kWidth);
    });
  });
  Product p = values;
  p.a += row;
  p.b += column;
  // Keys that the first of the rows sees, and then those that only later ones see.
  const int64_t seen = attention_keys(a, t.row + row + 1);
  const int64_t common = seen < begin ? begin : seen < end ? seen : end;
  multiply<Rows, Vectors>(p, 0, common - begin, sums);
  if (common < end) {
    const int64_t last = attention_keys(a, t.row + row + Rows);
    for (int64_t j = common; j < (last < end ? last : end); ++j) {
      unroll<Rows>([&](auto r) INLINE {
        if (j > t.row + row + r) return;
        const F weight = splat(p.a[r + (j - begin) * kTileRows]);
        unroll<Vectors>([&](auto v) INLINE {
          sums[r][v] = fma(weight, load(p.b + (j - begin) * p.b_step + v * kWidth), sums[r][v]);
        });
      });
    }
  }
  if (end < t.keys) {
    unroll<Rows>([&](auto r) INLINE {
      unroll<Vectors>([&](auto v)
                          INLINE { store(kept + r * value_width(a) + v * kWidth, sums[r][v]); });
    });
    return;
  }
  const int64_t y = t.batch * a.y_step[0] + t.head * a.y_step[1] + (t.row + row) * a.y_step[2];
  unroll<Rows>([&](auto r) INLINE {
    const F scale = splat(inverse[row + r]);
    unroll<Vectors>([&](auto v) INLINE {
      const int64_t at = y + r * a.y_step[2] + column + v * kWidth;
      const int64_t left = a.value_size - column - v * kWidth;
      if (left >= kWidth) {
        store_as<T>(a.y, at, mul(sums[r][v], scale));
      } else {
        store_as<T>(a.y, at, mul(sums[r][v], scale), static_cast<int>(left));
      }
    });
  });
}

// Scores of keys [begin, end) become weights, which are added up.
SIMD void exponentiate(const AttentionTile& t, int64_t begin, int64_t end, const F (&largest)[2],
                       F (&total)[2]) {
  for (int64_t j = begin; j < end; ++j) {
    unroll<2>([&](auto v) INLINE {
      float* at = t.weights + j * kTileRows + v * kWidth;
      const F below = sub(load(at), largest[v]);
      const F weight = select(less(below, splat(kLowestExp)), splat(0.0f), exp_poly(below));
      total[v] = add(total[v], weight);
      store(at, weight);
    });
  }
}

template <DType T>
void attend(const AttentionArgs& a, const AttentionTile& t) {
  load_queries<T>(a, t);
  F largest[2] = {splat(-INFINITY), splat(-INFINITY)};
  score<T>(a, t, largest);
  F total[2];
  unroll<2>([&](auto v) INLINE {
    largest[v] = select(greater(largest[v], splat(-INFINITY)), largest[v], splat(0.0f));
    total[v] = splat(0.0f);
  });
  alignas(64) float inverse[kTileRows];
  const int64_t base = t.batch * a.v_step[0] + t.head / a.group * a.v_step[1];
  int64_t begin = 0;
  do {
    const int64_t end = begin + kKeyBlock < t.keys ? begin + kKeyBlock : t.keys;
    exponentiate(t, begin, end, largest, total);
    if (end == t.keys) {
      unroll<2>([&](auto v) INLINE {
        // The largest weight is 1, so a sum is 0, at least that, or NaN.
        const F all = div(splat(1.0f), total[v]);
        store(inverse + v * kWidth, select(less(total[v], splat(0.5f)), splat(0.0f), all));
      });
    }
    const int64_t at = base + begin * a.v_step[2];
    Product p{t.weights + begin * kTileRows, 1, kTileRows, t.block, value_width(a)};
    if (T == DType::f32 && a.value_size % kWidth == 0) {
      p.b = static_cast<const float*>(a.v) + at;
      p.b_step = a.v_step[2];
    } else {
      widen_rows<T>(a.v, at, a.v_step[2], end - begin, a.value_size, p.b_step, t.block);
    }
    in_tiles<kBroadcasts>(t.rows, [&](int64_t row, auto count) INLINE {
      constexpr int kRows = decltype(count)::value;
      int64_t column = 0;
      for (; column + kWidth < a.value_size; column += 2 * kWidth) {
        weigh<T, kRows, 2>(a, t, p, begin, end, static_cast<int>(row), column, inverse);
      }
      if (column < a.value_size) {
        weigh<T, kRows, 1>(a, t, p, begin, end, static_cast<int>(row), column, inverse);
      }
    });
    begin = end;
  } while (begin < t.keys);
}

// ---- Table entries ------------------------------------------------------------------------------

int64_t attention_tile(const AttentionArgs&) { return kTileRows; }

int64_t attention_scratch(const AttentionArgs& a) {
  return kTileRows * (a.head_size + a.keys + value_width(a) + kKeyBlock) +
         kKeyBlock * block_width(a);
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  AttentionTile t;
  t.q = scratch;
  t.weights = t.q + a.head_size * kTileRows;
  t.sums = t.weights + a.keys * kTileRows;
  t.mask = t.sums + value_width(a) * kTileRows;
  t.block = t.mask + kKeyBlock * kTileRows;
  for (int64_t i = begin; i < end; ++i) {
    t.row = i % tiles * kTileRows;
    t.head = i / tiles % a.heads;
    t.batch = i / tiles / a.heads;
    t.rows = static_cast<int>(a.rows - t.row < kTileRows ? a.rows - t.row : kTileRows);
    t.keys = attention_keys(a, t.row + t.rows);
    with_float_type(a.type, [&](auto type) { attend<decltype(type)::value>(a, t); });
  }
}
