// Attention. Scores lie as [key][row]: a vector holds rows of q, so that softmax needs no
// reductions, and keys and weights are broadcast from where they are. With very few rows a vector
// holds keys. All sums go over ascending features or keys, one fma each, which gives the bits of
// scalar_transformer.cpp.

constexpr int kTileVectors = 2;
constexpr int kTileRows = kTileVectors * kWidth;   // rows of q in a tile
constexpr int kBroadcasts = kWidth == 16 ? 8 : 4;  // rows of a register tile
constexpr int64_t kKeyBlock = 64;  // keys whose k, or v and weights, stay in the first cache
constexpr int64_t kFewRows = 4;    // with fewer, vectors of keys are faster

// A tile of rows of one head.
struct AttentionTile {
  int64_t batch, head, row;
  int rows;      // of this tile
  int64_t keys;  // that any of them sees
  bool first;    // of its head, as far as this thread knows: k and v are not in its caches
  // Scratch.
  float* q;        // [head_size, kTileRows]
  float* weights;  // [keys, kTileRows]
  float* sums;     // [kTileRows, value_width()]
  float* block;    // [kKeyBlock, the wider of k and v]: k or v as floats
  float* mask;     // [kKeyBlock, kTileRows], or [kKeyBlock] where all rows share it

  int64_t q_at(const AttentionArgs& a) const {
    return batch * a.q_step[0] + head * a.q_step[1] + row * a.q_step[2];
  }
  int64_t k_at(const AttentionArgs& a, int64_t key) const {
    return batch * a.k_step[0] + head / a.group * a.k_step[1] + key * a.k_step[2];
  }
  int64_t v_at(const AttentionArgs& a, int64_t key) const {
    return batch * a.v_step[0] + head / a.group * a.v_step[1] + key * a.v_step[2];
  }
  int64_t y_at(const AttentionArgs& a) const {
    return batch * a.y_step[0] + head * a.y_step[1] + row * a.y_step[2];
  }
};

int64_t value_width(const AttentionArgs& a) { return round_up(a.value_size, kWidth); }
int64_t block_width(const AttentionArgs& a) {
  const int64_t keys = round_up(a.head_size, kWidth), values = value_width(a);
  return keys > values ? keys : values;
}

// ---- Loading ------------------------------------------------------------------------------------

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

// Rows become columns: out[c * kTileRows + r] for `columns` of them and all vectors of rows.
// `loaded(row, column, count)` gives a vector of a row, of `count` elements.
template <class Loaded>
SIMD void transpose_rows(int rows, int64_t columns, float* out, const Loaded& loaded) {
  for (int first_row = 0; first_row < rows; first_row += kWidth) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      const int count = static_cast<int>(columns - column < kWidth ? columns - column : kWidth);
      F x[kWidth];
      unroll<kWidth>([&](auto r) INLINE {
        const int row = first_row + r;
        x[r] = row < rows ? loaded(row, column, count) : splat(0.0f);
      });
      transpose(x);
      unroll<kWidth>([&](auto c) INLINE {
        if (c < count) store(out + (column + c) * kTileRows + first_row, x[c]);
      });
    }
  }
}

template <DType T>
void load_queries(const AttentionArgs& a, const AttentionTile& t) {
  const int64_t base = t.q_at(a);
  transpose_rows(t.rows, a.head_size, t.q, [&](int row, int64_t column, int count) INLINE {
    const int64_t at = base + row * a.q_step[2] + column;
    return count == kWidth ? load_as<T>(a.q, at) : load_as<T>(a.q, at, count);
  });
}

// What is added to the scores of keys [begin, end), into t.mask.
bool shares_mask(const AttentionArgs& a) { return a.mask == nullptr || a.mask_step[2] == 0; }

void load_mask(const AttentionArgs& a, const AttentionTile& t, int64_t begin, int64_t end) {
  if (shares_mask(a)) {
    for (int64_t j = begin; j < end; ++j) {
      t.mask[j - begin] = attention_mask(a, t.batch, t.head, t.row, j);
    }
  } else if (a.mask_step[3] == 1) {
    const int64_t base =
        t.batch * a.mask_step[0] + t.head * a.mask_step[1] + t.row * a.mask_step[2] + begin;
    if (a.mask_is_bool) {
      const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + base;
      transpose_rows(t.rows, end - begin, t.mask, [&](int row, int64_t column, int count) INLINE {
        const uint8_t* at = mask + row * a.mask_step[2] + column;
        const I x = count == kWidth ? load_i8(at) : load_i8(at, count);
        return select(equal(x, splat(0)), splat(-INFINITY), splat(0.0f));
      });
      return;
    }
    with_float_type(a.mask_type, [&](auto type) {
      constexpr DType kType = decltype(type)::value;
      transpose_rows(t.rows, end - begin, t.mask, [&](int row, int64_t column, int count) INLINE {
        const int64_t at = base + row * a.mask_step[2] + column;
        return count == kWidth ? load_as<kType>(a.mask, at) : load_as<kType>(a.mask, at, count);
      });
    });
  } else {
    for (int64_t j = begin; j < end; ++j) {
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = t.row + (r < t.rows ? r : 0);
        t.mask[(j - begin) * kTileRows + r] = attention_mask(a, t.batch, t.head, row, j);
      }
    }
  }
}

// Rows that are far apart in memory: no prefetcher of a CPU guesses the next page.
SIMD void prefetch_rows(const void* x, DType type, int64_t at, int64_t step, int64_t rows,
                        int64_t size) {
  const int64_t bytes = type == DType::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(x) + at * bytes;
  for (int64_t r = 0; r < rows; ++r, row += step * bytes) {
    for (int64_t i = 0; i < size * bytes; i += kLine) __builtin_prefetch(row + i);
  }
}

// ---- Products -----------------------------------------------------------------------------------

// sums[r][c] += a[r * a_row + i * a_step] * b[i * b_step + c] for i from `begin` to `end`.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
};

template <int Rows, int Vectors>
SIMD void multiply(const Product& p, int64_t begin, int64_t end, F (&sums)[Rows][Vectors]) {
  const float* a = p.a + begin * p.a_step;
  const float* b = p.b + begin * p.b_step;
  for (int64_t i = begin; i < end; ++i, a += p.a_step, b += p.b_step) {
    F columns[Vectors];
    unroll<Vectors>([&](auto v) INLINE { columns[v] = load(b + v * kWidth); });
    unroll<Rows>([&](auto r) INLINE {
      const F row = splat(a[r * p.a_row]);
      unroll<Vectors>([&](auto v) INLINE { sums[r][v] = fma(row, columns[v], sums[r][v]); });
    });
  }
}

// body(first, their number as a constant) over `count` things.
template <int Most, class Body>
SIMD void in_tiles(int64_t count, const Body& body, int64_t at = 0) {
  for (; at + Most <= count; at += Most) body(at, std::integral_constant<int, Most>{});
  if constexpr (Most > 1) in_tiles<Most / 2>(count, body, at);
}

// The scores of all keys into t.weights; the largest of each row.
template <DType T, int Vectors>
SIMD void score(const AttentionArgs& a, const AttentionTile& t, F (&largest)[Vectors]) {
  const F scale = splat(a.scale);
  const bool shared_mask = shares_mask(a);
  for (int64_t begin = 0; begin < t.keys; begin += kKeyBlock) {
    const int64_t end = begin + kKeyBlock < t.keys ? begin + kKeyBlock : t.keys;
    Product p{t.block, block_width(a), 1, t.q, kTileRows};
    if constexpr (T == DType::f32) {
      p.a = static_cast<const float*>(a.k) + t.k_at(a, begin);
      p.a_row = a.k_step[2];
    } else {
      widen_rows<T>(a.k, t.k_at(a, begin), a.k_step[2], end - begin, a.head_size, p.a_row, t.block);
    }
    load_mask(a, t, begin, end);
    float* weights = t.weights + begin * kTileRows;
    const float* mask = t.mask;
    in_tiles<kBroadcasts>(end - begin, [&](int64_t key, auto count) INLINE {
      constexpr int kKeys = decltype(count)::value;
      if (t.first) {
        const int64_t ahead = begin + key + 3 * kKeys;
        if (T == DType::f32 && ahead + kKeys <= t.keys) {
          prefetch_rows(a.k, T, t.k_at(a, ahead), a.k_step[2], kKeys, a.head_size);
        }
        prefetch_rows(a.v, T, t.v_at(a, begin + key), a.v_step[2], kKeys, a.value_size);
      }
      F sums[kKeys][Vectors];
      unroll<kKeys>([&](auto r) INLINE {
        unroll<Vectors>([&](auto v) INLINE { sums[r][v] = splat(0.0f); });
      });
      Product of_keys = p;
      of_keys.a += key * p.a_row;
      multiply<kKeys, Vectors>(of_keys, 0, a.head_size, sums);
      const bool hides = a.causal && begin + key + kKeys > t.row;
      unroll<kKeys>([&](auto r) INLINE {
        unroll<Vectors>([&](auto v) INLINE {
          const int64_t at = (key + r) * kTileRows + v * kWidth;
          const F added = shared_mask ? splat(mask[key + r]) : load(mask + at);
          F s = fma(sums[r][v], scale, added);
          if (hides) {  // from the rows before the key
            int64_t rows = begin + key + r - t.row - v * kWidth;
            rows = rows < 0 ? 0 : rows < kWidth ? rows : kWidth;
            s = select(first(static_cast<int>(rows)), splat(-INFINITY), s);
          }
          largest[v] = max(s, largest[v]);
          store(weights + at, s);
        });
      });
    });
  }
}

// A score minus the largest becomes a weight.
SIMD F softmax_weight(F below) {
  const F weight = exp_between(max(splat(kLowestExp), below));
  return select(less(below, splat(kLowestExp)), splat(0.0f), weight);
}

// Where every score is -Inf or NaN, nothing is subtracted.
SIMD F softmax_shift(F largest) {
  return select(greater(largest, splat(-INFINITY)), largest, splat(0.0f));
}

// Scores of keys [begin, end) become weights, which are added up.
template <int Vectors>
SIMD void exponentiate(const AttentionTile& t, int64_t begin, int64_t end,
                       const F (&largest)[Vectors], F (&total)[Vectors]) {
  float* weights = t.weights + begin * kTileRows;
  in_tiles<2>(end - begin, [&](int64_t key, auto count) INLINE {
    float* at = weights + key * kTileRows;
    unroll<decltype(count)::value>([&](auto r) INLINE {
      unroll<Vectors>([&](auto v) INLINE {
        const F weight = softmax_weight(sub(load(at + r * kTileRows + v * kWidth), largest[v]));
        total[v] = add(total[v], weight);
        store(at + r * kTileRows + v * kWidth, weight);
      });
    });
  });
}

// The sums of products with v over keys [begin, end), for Rows rows from `row` on, and at last y.
template <DType T, int Rows, int Vectors>
SIMD void weigh(const AttentionArgs& a, const AttentionTile& t, const Product& values,
                int64_t begin, int64_t end, int row, int64_t column, const float* inverse) {
  const int64_t width = value_width(a);
  float* kept = t.sums + row * width + column;
  F sums[Rows][Vectors];
  unroll<Rows>([&](auto r) INLINE {
    unroll<Vectors>([&](auto v) INLINE {
      sums[r][v] = begin == 0 ? splat(0.0f) : load(kept + r * width + v * kWidth);
    });
  });
  Product p = values;
  p.a += row;
  p.b += column;
  // Keys that the first of the rows sees, and then those that only later ones see.
  const int64_t seen = attention_keys(a, t.row + row + 1);
  const int64_t common = seen < begin ? begin : seen < end ? seen : end;
  multiply<Rows, Vectors>(p, 0, common - begin, sums);
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
  const int64_t y = t.y_at(a) + row * a.y_step[2] + column;
  unroll<Rows>([&](auto r) INLINE {
    unroll<Vectors>([&](auto v) INLINE {
      if (end < t.keys) return store(kept + r * width + v * kWidth, sums[r][v]);
      const F result = mul(sums[r][v], splat(inverse[row + r]));
      const int64_t at = y + r * a.y_step[2] + v * kWidth;
      const int64_t left = a.value_size - column - v * kWidth;
      if (left >= kWidth) {
        store_as<T>(a.y, at, result);
      } else {
        store_as<T>(a.y, at, result, static_cast<int>(left));
      }
    });
  });
}

// v of keys [begin, end) as floats in whole vectors: where it is, or copied.
template <DType T>
SIMD void load_values(const AttentionArgs& a, const AttentionTile& t, int64_t begin, int64_t end,
                      Product* p) {
  if (T == DType::f32 && a.value_size % kWidth == 0) {
    p->b = static_cast<const float*>(a.v) + t.v_at(a, begin);
    p->b_step = a.v_step[2];
  } else {
    p->b = t.block;
    p->b_step = value_width(a);
    widen_rows<T>(a.v, t.v_at(a, begin), a.v_step[2], end - begin, a.value_size, p->b_step,
                  t.block);
  }
}

template <DType T, int Vectors>
void attend(const AttentionArgs& a, const AttentionTile& t) {
  load_queries<T>(a, t);
  F largest[Vectors], total[Vectors];
  unroll<Vectors>([&](auto v) INLINE { largest[v] = splat(-INFINITY); });
  score<T, Vectors>(a, t, largest);
  unroll<Vectors>([&](auto v) INLINE {
    largest[v] = softmax_shift(largest[v]);
    total[v] = splat(0.0f);
  });
  alignas(64) float inverse[kTileRows];
  int64_t begin = 0;
  do {
    const int64_t end = begin + kKeyBlock < t.keys ? begin + kKeyBlock : t.keys;
    exponentiate<Vectors>(t, begin, end, largest, total);
    if (end == t.keys) {
      unroll<Vectors>([&](auto v) INLINE {
        // The largest weight is 1, so a sum is 0, at least that, or NaN.
        const F all = div(splat(1.0f), total[v]);
        store(inverse + v * kWidth, select(less(total[v], splat(0.5f)), splat(0.0f), all));
      });
    }
    Product p{t.weights + begin * kTileRows, 1, kTileRows, nullptr, 0};
    load_values<T>(a, t, begin, end, &p);
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

// ---- One row: vectors of keys -------------------------------------------------------------------

// The scores of all keys into t.weights, [keys]; the largest.
template <DType T>
SIMD float score_row(const AttentionArgs& a, const AttentionTile& t) {
  widen_rows<T>(a.q, t.q_at(a), 0, 1, a.head_size, 0, t.q);
  F largest = splat(-INFINITY);
  for (int64_t key = 0; key < t.keys; key += kWidth) {
    const int count = static_cast<int>(t.keys - key < kWidth ? t.keys - key : kWidth);
    F sums = splat(0.0f);
    for (int64_t d = 0; d < a.head_size; d += kWidth) {
      const int64_t left = a.head_size - d;
      F x[kWidth];
      unroll<kWidth>([&](auto r) INLINE {
        const int64_t at = t.k_at(a, key + (r < count ? r : count - 1)) + d;
        x[r] = left >= kWidth ? load_as<T>(a.k, at) : load_as<T>(a.k, at, static_cast<int>(left));
      });
      transpose(x);
      unroll<kWidth>([&](auto c) INLINE {
        if (c < left) sums = fma(x[c], splat(t.q[d + c]), sums);
      });
    }
    alignas(64) float mask[kWidth] = {};
    if (a.mask != nullptr) {
      for (int i = 0; i < count; ++i) {
        mask[i] = attention_mask(a, t.batch, t.head, t.row, key + i);
      }
    }
    const F s = fma(sums, splat(a.scale), load(mask));
    largest = max(count == kWidth ? s : select(first(count), s, splat(-INFINITY)), largest);
    store(t.weights + key, s);
  }
  return reduce_max(largest);
}

template <DType T>
void attend_row(const AttentionArgs& a, const AttentionTile& t) {
  const F largest = softmax_shift(splat(score_row<T>(a, t)));
  float total = 0.0f;
  for (int64_t key = 0; key < t.keys; key += kWidth) {
    store(t.weights + key, softmax_weight(sub(load(t.weights + key), largest)));
  }
  for (int64_t key = 0; key < t.keys; ++key) total += t.weights[key];
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  int64_t begin = 0;
  do {
    const int64_t end = begin + kKeyBlock < t.keys ? begin + kKeyBlock : t.keys;
    Product p{t.weights + begin, 0, 1, nullptr, 0};
    load_values<T>(a, t, begin, end, &p);
    in_tiles<8>(value_width(a) / kWidth, [&](int64_t vector, auto count) INLINE {
      weigh<T, 1, decltype(count)::value>(a, t, p, begin, end, 0, vector * kWidth, &inverse);
    });
    begin = end;
  } while (begin < t.keys);
}

// ---- Table entries ------------------------------------------------------------------------------

int64_t attention_tile(const AttentionArgs& a) { return a.rows < kFewRows ? 1 : kTileRows; }

int64_t attention_scratch(const AttentionArgs& a) {
  return kTileRows * (a.head_size + a.keys + value_width(a) + kKeyBlock) +
         kKeyBlock * block_width(a);
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t tile = attention_tile(a), tiles = (a.rows + tile - 1) / tile;
  AttentionTile t;
  t.q = scratch;
  t.weights = t.q + a.head_size * kTileRows;
  t.sums = t.weights + a.keys * kTileRows;
  t.mask = t.sums + value_width(a) * kTileRows;
  t.block = t.mask + kKeyBlock * kTileRows;
  for (int64_t i = begin; i < end; ++i) {
    t.row = i % tiles * tile;
    t.head = i / tiles % a.heads;
    t.batch = i / tiles / a.heads;
    t.rows = static_cast<int>(a.rows - t.row < tile ? a.rows - t.row : tile);
    t.keys = attention_keys(a, t.row + t.rows);
    t.first = i == begin || t.row == 0;
    with_float_type(a.type, [&](auto type) {
      constexpr DType kType = decltype(type)::value;
      if (tile == 1) return attend_row<kType>(a, t);
      if (t.rows <= kWidth) return attend<kType, 1>(a, t);
      attend<kType, 2>(a, t);
    });
  }
}
