// y = x . W, tiles of rows by blocks of 16 output features. A policy (matmul_avx2.inl,
// matmul_avx512.inl) computes a group's dot products; here they are scaled and added up in the one
// order that every ISA and every tile size keeps, per output: S = fma(value, scale, S), group after
// group from 0.

// A sum that is not finished, to memory and back.
SIMD void keep(F sum, float* to) { store(to, raw(sum)); }
SIMD void keep(I sum, float* to) { store(to, raw(sum)); }
SIMD void clear(F* sum) { *sum = splat(0.0f); }
SIMD void clear(I* sum) { *sum = splat(0); }
SIMD void restore(const float* from, F* sum) { *sum = load(from); }
SIMD void restore(const float* from, I* sum) { *sum = bits(load(from)); }

constexpr int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// kWidth scales of group and lane `at` on.
template <class Args>
SIMD F load_scale(const Args& a, const uint8_t* weight, int64_t at) {
  const uint8_t* scales = weight + a.shape.scales;
  switch (a.layout.scale) {
    case DType::f32:
      return load_as<DType::f32>(scales, at);
    case DType::bf16:
      return load_as<DType::bf16>(scales, at);
    default:
      return load_as<DType::f16>(scales, at);
  }
}

// kWidth zero points, in steps of the format: codes of int8, eighths of a code of int4.
template <class Args>
SIMD I load_zero(const Args& a, const uint8_t* weight, int64_t at) {
  if (a.layout.symmetric) return splat(symmetric_zero(a.layout.format));
  return load_i8(weight + a.shape.zeros + at);
}

// Where the accumulators of `Rows` rows start: minus what their products count too much, that is
// the weight's zero point (int4: the middle, see kLateZero) times the row's codes and the flip of
// those codes times the weight's.
template <class Tile, int Rows>
SIMD void start(const LinearArgs& a, const uint8_t* weight, int64_t at, const int32_t* group_sums,
                I (&out)[Rows]) {
  I first = splat(0);
  if constexpr (Tile::kFlipped) {
    const uint8_t* sums = weight + a.shape.sums;
    first = sub(first, shift_left<7>(load(reinterpret_cast<const int32_t*>(sums) + at)));
  }
  if constexpr (kLateZero<Tile>) {
    unroll<Rows>([&](int r) INLINE {
      out[r] = splat(-kInt4Offset * static_cast<int32_t>(bit_cast<float>(group_sums[r])));
    });
  } else if constexpr (Tile::kFormat == Format::int4) {
    unroll<Rows>([&](int r) INLINE { out[r] = splat(-kInt4Offset * group_sums[r]); });
  } else if (!a.layout.symmetric) {
    const I zero = load_i8(weight + a.shape.zeros + at);
    unroll<Rows>([&](int r) INLINE { out[r] = sub(first, multiply(zero, splat(group_sums[r]))); });
  } else {
    unroll<Rows>([&](int r) INLINE { out[r] = first; });
  }
}

// Up to here products of int4 weights with int8, their sums and what zero points make of them are
// exact as floats in eighths. Then the products are those of the codes, not less 8, and need no
// `start`.
constexpr int64_t kExactGroup = 1024;
static_assert(kExactGroup * 15 * 128 * info(Format::int4).zero_steps < 1 << 24, "");

template <class Tile>
SIMD bool starts_from_zero(const LinearArgs& a) {
  return kLateZero<Tile> && !Tile::kFloat && a.shape.group_padded <= kExactGroup;
}

// From the finished sum of a group, of vector v and row r, to its value.
template <class Tile, int Vectors, bool = kLateZero<Tile>>
struct Values {
  INLINE Values(const LinearArgs&, const uint8_t*, int64_t, const int32_t*) {}
  INLINE F operator()(typename Tile::Sum sum, int, int) const { return float_of(sum); }
};
// Late zero points add their distance from the one that the products have, times the sum of x.
template <class Tile, int Vectors>
struct Values<Tile, Vectors, true> {
  F distance[Vectors];
  const float* sums_of_x;

  INLINE Values(const LinearArgs& a, const uint8_t* weight, int64_t g, const int32_t* group_sums)
      : sums_of_x(reinterpret_cast<const float*>(group_sums)) {
    const I from = splat(starts_from_zero<Tile>(a) ? 0 : symmetric_zero(Format::int4));
    unroll<Vectors>([&](int v) INLINE {
      constexpr int kParts = kLanes / kWidth;
      const uint8_t* zeros = weight + v / kParts * a.shape.bytes + a.shape.zeros;
      const I steps = sub(from, load_i8(zeros + g * kLanes + v % kParts * kWidth));
      distance[v] = mul(to_float(steps), splat(1.0f / info(Format::int4).zero_steps));
    });
  }
  INLINE F operator()(typename Tile::Sum sum, int v, int r) const {
    return fma(distance[v], splat(sums_of_x[r]), float_of(sum));
  }
};

// So many rows at a time that their panel stays in the cache while the weights stream by.
template <class Tile>
constexpr int64_t kSlab = 32 * Tile::kRows;

template <class Tile>
constexpr bool kLooksAhead = requires { Tile::kLooksAhead; };
// Long columns are cut into parts. With few registers, tiles that can do that are slower.
template <class Tile>
constexpr bool kCutsColumns = requires { Tile::kCutsColumns; };

template <class Tile>
struct TileScratch {
  static constexpr int64_t kSums = kSlab<Tile> * Tile::blocks(Tile::kRows) * kLanes;
  alignas(64) float sums[kSums];
  alignas(64) float total[kSums];
};

// Padded k [begin, end) of a tile: all of them, or a part of a column that is too long for the
// cache. Then the sums of a group that goes on in the next part, and the totals of the groups
// before it, wait in `sums` and `total`, [rows][blocks * 16] each.
//
// While it computes, a tile asks for `share` bytes of each block for every 8 k, from `next` on.
// Policies without kLooksAhead see to that themselves.
struct Part {
  int64_t begin, end;
  const uint8_t* next;
  int64_t share;
  float *sums, *total;
};

template <class Tile, int Rows, int Blocks>
void tile(const LinearArgs& a, int64_t block, int64_t row, const float* bias, Finish finish,
          const Part& part) {
  // Tiles of more blocks are those of few rows, which are alone and take all k.
  constexpr bool kCut = kCutsColumns<Tile> && Blocks <= Tile::blocks(Tile::kRows);
  const BlockShape& s = a.shape;
  const uint8_t* weight = a.packed + block * s.bytes;
  const uint8_t* panel = a.panel + row * s.k_padded * kBytes<Tile>;
  const int32_t* group_sums = a.group_sums + row * s.groups;
  constexpr int kParts = kLanes / kWidth;  // vectors of a block
  constexpr int kVectors = Blocks * kParts;
  constexpr int kAcross = Blocks * kLanes;
  alignas(64) float own[kCut ? 1 : Rows * kAcross];
  float* const total = kCut ? part.total : own;
  if (s.k_padded == 0) std::memset(total, 0, Rows * kAcross * sizeof(float));
  const bool directly = finishes_directly(a, block, Blocks);
  const bool from_zero = starts_from_zero<Tile>(a);
  int64_t g = part.begin == 0 ? 0 : part.begin / s.group_padded;
  for (int64_t at = part.begin; at < part.end; ++g) {
    const int64_t group_begin = s.padded_begin(g);
    const int64_t group_end = group_begin + s.padded_length(g);
    const int64_t end = kCut && part.end < group_end ? part.end : group_end;
    const uint8_t* codes[Blocks];
    unroll<Blocks>(
        [&](int b) INLINE { codes[b] = weight + b * s.bytes + code_offset(Tile::kFormat, at, 0); });
    if constexpr (kLateZero<Tile>) {  // needed at the end of the group, which is soon
      unroll<Blocks>([&](int b) INLINE {
        const uint8_t* const zeros = weight + b * s.bytes + s.zeros + g * kLanes;
        _mm_prefetch(reinterpret_cast<const char*>(zeros), _MM_HINT_T0);
      });
    }
    const uint8_t* x = panel + at * Rows * kBytes<Tile>;
    const int64_t steps = (end - at) / kGroupPad;
    typename Tile::Sum sums[kVectors][Rows];
    if constexpr (Tile::kFloat) {
      I zero[kVectors];
      unroll<kVectors>([&](int v) INLINE {
        zero[v] = load_zero(a, weight + v / kParts * s.bytes, g * kLanes + v % kParts * kWidth);
        unroll<Rows>([&](int r) INLINE { sums[v][r] = splat(0.0f); });
      });
      Tile::accumulate(sums, zero, x, codes, steps);
    } else {
      if (kCut && at != group_begin) {
        unroll<kVectors>([&](int v) INLINE {
          unroll<Rows>([&](int r)
                           INLINE { restore(part.sums + r * kAcross + v * kWidth, &sums[v][r]); });
        });
      } else if (from_zero) {
        unroll<kVectors>([&](int v)
                             INLINE { unroll<Rows>([&](int r) INLINE { clear(&sums[v][r]); }); });
      } else {
        unroll<kVectors>([&](int v) INLINE {
          start<Tile>(a, weight + v / kParts * s.bytes, g * kLanes + v % kParts * kWidth,
                      group_sums + g * Rows, sums[v]);
        });
      }
      if constexpr (kLooksAhead<Tile>) {
        const uint8_t* next = part.next + (at - part.begin) / kGroupPad * part.share;
        Tile::accumulate(sums, x, codes, steps, next, part.share);
      } else {
        Tile::accumulate(sums, x, codes, steps);
      }
    }
    if (kCut && end != group_end) {
      return unroll<kVectors>([&](int v) INLINE {
        unroll<Rows>([&](int r) INLINE { keep(sums[v][r], part.sums + r * kAcross + v * kWidth); });
      });
    }
    if (Tile::kFormat == Format::int8 && a.y_type == DType::i32) {  // int_mm's sums, as they are
      unroll<kVectors>([&](int v) INLINE {
        unroll<Rows>([&](int r) INLINE { keep(sums[v][r], total + r * kAcross + v * kWidth); });
      });
      at = end;
      continue;
    }
    F scale[kVectors];
    unroll<kVectors>([&](int v) INLINE {
      const int64_t lane = g * kLanes + v % kParts * kWidth;
      scale[v] = load_scale(a, weight + v / kParts * s.bytes, lane);
      // A line for each group, too far from each other to be expected: the next column's now.
      if (kCut) {
        const uint8_t* next = weight + (v / kParts + Blocks) * s.bytes + s.scales;
        _mm_prefetch(reinterpret_cast<const char*>(next + lane * bytes_of(a.layout.scale)),
                     _MM_HINT_T0);
      }
    });
    const Values<Tile, kVectors> value(a, weight, g, group_sums + g * Rows);
    if (directly && g + 1 == s.groups) {
      return finish_last_group<Tile>(a, sums, value, scale, total, bias, row, block * kLanes);
    }
    unroll<kVectors>([&](int v) INLINE {
      unroll<Rows>([&](int r) INLINE {
        float* const to = total + r * kAcross + v * kWidth;
        store(to, folded(value(sums[v][r], v, r), scale[v], g == 0, to));
      });
    });
    at = end;
  }
  if (part.end == s.k_padded) finish(a, {total, bias, row, block, Rows, Blocks});
}
