// y = x . W, tiles of rows by blocks of 16 output features. A policy (matmul_avx2.inl,
// matmul_avx512.inl) computes a group's dot products; here they are scaled and added up in the one
// order that every ISA and every tile size keeps, per output: S = fma(sum, scale, S), group after
// group from 0.

// A sum as the int32 that int_mm wants (whose sums are integers).
SIMD I bits_of(F sum) { return bits(sum); }
SIMD I bits_of(I sum) { return sum; }

// A sum that is not finished, to memory and back.
SIMD void keep(F sum, float* to) { store(to, sum); }
SIMD void keep(I sum, float* to) { store(to, floats(sum)); }
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

// Zero points as the codes are stored, kWidth of them.
template <class Args>
SIMD I load_zero(const Args& a, const uint8_t* weight, int64_t at) {
  if (a.layout.symmetric) return splat(symmetric_zero(a.layout.format));
  return load_i8(weight + a.shape.zeros + at);
}

// Where the accumulators of `Rows` rows start: minus what their products count too much, that is
// the weight's zero point times the row's codes and the flip of those codes times the weight's.
template <class Tile, int Rows>
SIMD void start(const LinearArgs& a, const uint8_t* weight, int64_t at, const int32_t* group_sums,
                I (&out)[Rows]) {
  I first = splat(0);
  if constexpr (Tile::kFlipped) {
    const uint8_t* sums = weight + a.shape.sums;
    first = sub(first, shift_left<7>(load(reinterpret_cast<const int32_t*>(sums) + at)));
  }
  if (!a.layout.symmetric) {
    const I zero = load_i8(weight + a.shape.zeros + at);
    unroll<Rows>([&](int r) INLINE { out[r] = sub(first, multiply(zero, splat(group_sums[r]))); });
  } else if constexpr (Tile::kFormat == Format::int4) {
    unroll<Rows>([&](int r) INLINE { out[r] = splat(-kInt4Offset * group_sums[r]); });
  } else {
    unroll<Rows>([&](int r) INLINE { out[r] = first; });
  }
}

// Keeps `folded`; int_mm's sums are kept as they are.
template <class Tile>
SIMD void fold(const LinearArgs& a, typename Tile::Sum sum, F scale, bool is_first, float* total) {
  if (a.y_type == DType::i32) {
    store(reinterpret_cast<int32_t*>(total), bits_of(sum));
  } else {
    store(total, folded(float_of(sum), scale, is_first, total));
  }
}

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
  int64_t g = part.begin == 0 ? 0 : part.begin / s.group_padded;
  for (int64_t at = part.begin; at < part.end; ++g) {
    const int64_t group_begin = s.padded_begin(g);
    const int64_t group_end = group_begin + s.padded_length(g);
    const int64_t end = kCut && part.end < group_end ? part.end : group_end;
    const uint8_t* codes[Blocks];
    unroll<Blocks>(
        [&](int b) INLINE { codes[b] = weight + b * s.bytes + code_offset(Tile::kFormat, at, 0); });
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
    if (directly && g + 1 == s.groups) {
      return finish_last_group<Tile>(a, sums, scale, total, bias, row, block * kLanes);
    }
    unroll<kVectors>([&](int v) INLINE {
      unroll<Rows>([&](int r) INLINE {
        fold<Tile>(a, sums[v][r], scale[v], g == 0, total + r * kAcross + v * kWidth);
      });
    });
    at = end;
  }
  if (part.end == s.k_padded) finish(a, {total, bias, row, block, Rows, Blocks});
}

// ---- Many rows ----------------------------------------------------------------------------------
// From Tile::kWideRows rows on, the weights of Tile::kWideBlocks blocks are unpacked once for a
// slab of rows, as many k at a time as stay in the L1 cache. Of a tile's rows Tile::kWideTile are
// taken at once, so few that their totals stay in registers beside their sums. The order of the
// sums is that of `tile`.
//
// Unpacked weights are lines of 64 bytes, [k / Tile::kUnit][blocks]: what a unit of x meets.

constexpr int64_t kUnpackedBytes = kWidth == 16 ? 24 * 1024 : 16 * 1024;

template <class Tile>
struct WideScratch {
  static constexpr int64_t kSums = kSlab<Tile> * Tile::kWideBlocks * kLanes;
  alignas(64) uint8_t unpacked[kUnpackedBytes];
  // Sums of a group that goes on in the next chunk, and totals of the groups before it, in the
  // order of rows and lanes that `finish` wants.
  alignas(64) float partial[kSums];
  alignas(64) float total[kSums];
};

// Padded k [begin, end) of blocks, from group g on: several whole groups, or a part of one.
struct WideChunk {
  const uint8_t* weight;
  int64_t begin, end, g;
};

template <class Tile>
void unpack_chunk(const LinearArgs& a, const WideChunk& c, int blocks, uint8_t* unpacked) {
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* weight = c.weight + b * a.shape.bytes;
    uint8_t* out = unpacked + b * kLine;
    int64_t g = c.g;
    for (int64_t at = c.begin; at < c.end; ++g) {
      const int64_t group_end = a.shape.padded_begin(g) + a.shape.padded_length(g);
      const int64_t end = group_end < c.end ? group_end : c.end;
      I zero[kLanes / kWidth];
      for (int v = 0; v < kLanes / kWidth; ++v) {
        zero[v] = load_zero(a, weight, g * kLanes + v * kWidth);
      }
      const int64_t steps = (end - at) / kGroupPad;
      Tile::unpack(weight + code_offset(Tile::kFormat, at, 0), zero, steps, out, blocks * kLine);
      out += steps * kGroupPad / Tile::kUnit * blocks * kLine;
      at = end;
    }
  }
}

// Up to here, products of 4-bit codes with int8, their sums and what `start` takes away from them
// are exact as floats.
constexpr int64_t kExactGroup = 8192;
static_assert(kExactGroup * 15 * 128 < 1 << 24, "");

// Rows [First, First + Count) of a tile of `Rows`.
template <class Tile, int Rows, int Blocks, int First, int Count>
SIMD void wide_rows(const LinearArgs& a, const WideChunk& c, int64_t row, int64_t slab_row,
                    WideScratch<Tile>* scratch) {
  const BlockShape& s = a.shape;
  constexpr int kParts = kLanes / kWidth;
  constexpr int kVectors = Blocks * kParts;
  constexpr int kAcross = Blocks * kLanes;
  const uint8_t* panel =
      a.panel + (row * s.k_padded + c.begin * Rows) * kBytes<Tile> + First * sizeof(int32_t);
  const uint8_t* unpacked = scratch->unpacked;
  float* const partial = scratch->partial + (slab_row + First) * kAcross;
  float* const totals = scratch->total + (slab_row + First) * kAcross;
  // The weight's zero points are then taken into account when a group is finished, by an fma.
  const bool late_zero = !Tile::kFloat && !a.layout.symmetric && s.group_padded <= kExactGroup;
  F total[kVectors][Count];
  unroll<kVectors>([&](int v) INLINE {
    unroll<Count>([&](int r) INLINE {
      total[v][r] = c.g == 0 ? splat(0.0f) : load(totals + r * kAcross + v * kWidth);
    });
  });
  int64_t g = c.g;
  for (int64_t at = c.begin; at < c.end; ++g) {
    const int64_t group_begin = s.padded_begin(g);
    const int64_t group_end = group_begin + s.padded_length(g);
    const int64_t end = group_end < c.end ? group_end : c.end;
    const int32_t* group_sums = a.group_sums + row * s.groups + g * Rows + First;
    typename Tile::Sum sums[kVectors][Count];
    if (at != group_begin) {
      unroll<kVectors>([&](int v) INLINE {
        unroll<Count>([&](int r)
                          INLINE { restore(partial + r * kAcross + v * kWidth, &sums[v][r]); });
      });
    } else if (Tile::kFloat || late_zero) {
      unroll<kVectors>([&](int v)
                           INLINE { unroll<Count>([&](int r) INLINE { clear(&sums[v][r]); }); });
    } else if constexpr (!Tile::kFloat) {
      unroll<kVectors>([&](int v) INLINE {
        start<Tile>(a, c.weight + v / kParts * s.bytes, g * kLanes + v % kParts * kWidth,
                    group_sums, sums[v]);
      });
    }
    const int64_t units = (end - at) / Tile::kUnit;
    Tile::template accumulate_unpacked<Rows>(sums, panel, unpacked, units);
    panel += units * Rows * static_cast<int64_t>(sizeof(int32_t));
    unpacked += units * Blocks * kLine;
    if (end != group_end) {
      unroll<kVectors>([&](int v) INLINE {
        unroll<Count>([&](int r) INLINE { keep(sums[v][r], partial + r * kAcross + v * kWidth); });
      });
    } else {
      unroll<kVectors>([&](int v) INLINE {
        const uint8_t* weight = c.weight + v / kParts * s.bytes;
        const int64_t lane = g * kLanes + v % kParts * kWidth;
        const F scale = load_scale(a, weight, lane);
        if (late_zero) {
          const F zero = negate(to_float(load_i8(weight + s.zeros + lane)));
          unroll<Count>([&](int r) INLINE {
            const F sum = fma(zero, to_float(splat(group_sums[r])), float_of(sums[v][r]));
            total[v][r] = fma(sum, scale, total[v][r]);
          });
        } else {
          unroll<Count>(
              [&](int r) INLINE { total[v][r] = fma(float_of(sums[v][r]), scale, total[v][r]); });
        }
      });
    }
    at = end;
  }
  unroll<kVectors>([&](int v) INLINE {
    unroll<Count>([&](int r) INLINE { store(totals + r * kAcross + v * kWidth, total[v][r]); });
  });
}

template <class Tile, int Rows, int Blocks>
void wide_tile(const LinearArgs& a, const WideChunk& c, int64_t row, int64_t slab_row,
               WideScratch<Tile>* scratch) {
  constexpr int kAtOnce = Tile::kWideTile;
  constexpr int kWhole = Rows / kAtOnce;
  if constexpr (kWhole > 0) {
    unroll<kWhole>([&](auto i) INLINE {
      wide_rows<Tile, Rows, Blocks, decltype(i)::value * kAtOnce, kAtOnce>(a, c, row, slab_row,
                                                                           scratch);
    });
  }
  if constexpr (Rows % kAtOnce != 0) {
    wide_rows<Tile, Rows, Blocks, kWhole * kAtOnce, Rows % kAtOnce>(a, c, row, slab_row, scratch);
  }
}

// The end of the chunk that begins at padded k `begin`, in group g.
template <class Tile>
int64_t chunk_end(const BlockShape& s, int64_t begin, int64_t g) {
  constexpr int64_t kMost = kUnpackedBytes / (Tile::kWideBlocks * kLine) * Tile::kUnit;
  const int64_t group_end = s.padded_begin(g) + s.padded_length(g);
  if (group_end - begin > kMost) return begin + kMost / kGroupPad * kGroupPad;
  if (begin != s.padded_begin(g) || s.group_padded > kMost) return group_end;
  const int64_t whole = begin + kMost / s.group_padded * s.group_padded;
  return whole < s.k_padded ? whole : s.k_padded;
}

// Asks for a part of what the next chunk unpacks: the `part`th of `parts`, while a tile computes.
template <class Tile>
SIMD void prefetch_chunk(const LinearArgs& a, const WideChunk& c, int blocks, int64_t part,
                         int64_t parts) {
  const bool last = c.end == a.shape.k_padded;
  const uint8_t* next =
      c.weight + (last ? blocks * a.shape.bytes : code_offset(Tile::kFormat, c.end, 0));
  const int64_t lines = code_offset(Tile::kFormat, c.end - c.begin, 0) / kLine;
  for (int b = 0; b < blocks; ++b) {
    for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(next + b * a.shape.bytes + i * kLine),
                   _MM_HINT_T1);
    }
  }
}

template <class Tile>
struct WideKernels {
  void (*of[Tile::kRows][Tile::kWideBlocks])(const LinearArgs&, const WideChunk&, int64_t, int64_t,
                                             WideScratch<Tile>*);  // [rows - 1][blocks - 1]
};
template <class Tile, int... Index>
constexpr WideKernels<Tile> wide_kernels(std::integer_sequence<int, Index...>) {
  constexpr int kBlocks = Tile::kWideBlocks;
  return {{wide_tile<Tile, Index / kBlocks + 1, Index % kBlocks + 1>...}};
}

template <class Tile>
void wide(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
          int64_t row_end) {
  static constexpr WideKernels<Tile> kernels =
      wide_kernels<Tile>(std::make_integer_sequence<int, Tile::kRows * Tile::kWideBlocks>{});
  const Finish finish = finish_for(a);
  WideScratch<Tile> scratch;
  alignas(64) float bias[Tile::kWideBlocks * kLanes];
  for (int64_t slab = row_begin; slab < row_end; slab += kSlab<Tile>) {
    const int64_t end = slab + kSlab<Tile> < row_end ? slab + kSlab<Tile> : row_end;
    for (int64_t block = block_begin; block < block_end; block += Tile::kWideBlocks) {
      const int blocks = least(block_end - block, Tile::kWideBlocks);
      WideChunk c{a.packed + block * a.shape.bytes, 0, 0, 0};
      for (; c.begin < a.shape.k_padded; c.begin = c.end) {
        c.g = c.begin / a.shape.group_padded;
        c.end = chunk_end<Tile>(a.shape, c.begin, c.g);
        unpack_chunk<Tile>(a, c, blocks, scratch.unpacked);
        for (int64_t row = slab; row < end; row += Tile::kRows) {
          prefetch_chunk<Tile>(a, c, blocks, (row - slab) / Tile::kRows,
                               (end - slab + Tile::kRows - 1) / Tile::kRows);
          kernels.of[tile_rows<Tile>(a, row) - 1][blocks - 1](a, c, row, row - slab, &scratch);
        }
      }
      load_bias(a, block * kLanes, blocks * kLanes, bias);
      for (int64_t row = slab; row < end; row += Tile::kRows) {
        const float* total = scratch.total + (row - slab) * blocks * kLanes;
        finish(a, {total, bias, row, block, tile_rows<Tile>(a, row), blocks});
      }
    }
  }
}

// ---- Choosing a tile ----------------------------------------------------------------------------

using TileKernel = void (*)(const LinearArgs&, int64_t block, int64_t row, const float* bias,
                            Finish, const Part&);

template <class Tile>
struct TileKernels {
  TileKernel of[Tile::kRows][Tile::kBlocks];  // [rows - 1][blocks - 1]
};
template <class Tile, int... Index>
constexpr TileKernels<Tile> tile_kernels(std::integer_sequence<int, Index...>) {
  constexpr int kBlocks = Tile::kBlocks;
  return {{tile<Tile, Index / kBlocks + 1,
                least(Index % kBlocks + 1, Tile::blocks(Index / kBlocks + 1))>...}};
}

// How many k of columns of `blocks` blocks tiles of `rows` rows in all take at a time: as many as
// the L2 cache can keep beside those that come next.
template <class Tile>
int64_t part_length(const BlockShape& s, int64_t blocks, int64_t rows) {
  constexpr int64_t kMostBytes = 200 * 1024;
  const int64_t parts = (blocks * s.bytes + kMostBytes - 1) / kMostBytes;
  if (!kCutsColumns<Tile> || rows <= Tile::kRows || parts <= 1) return s.k_padded;
  return round_up((s.k_padded + parts - 1) / parts, kGroupPad);
}

// What a tile of `rows` rows among the `all` that have the same columns, with `before` rows before
// it, asks for. The first tile would wait for memory and the others leave it idle: so each asks for
// a part of what comes next, by its rows. A tile alone asks for what it needs itself a little
// later, and so do all where what comes next does not fit the cache.
SIMD void look_ahead(const LinearArgs& a, const uint8_t* codes, const uint8_t* next, int64_t before,
                     int64_t rows, int64_t all, bool fits, Part* part) {
  const int64_t step = code_offset(a.layout.format, kGroupPad, 0);
  if (rows == all || !fits) {
    part->next = codes + 512;
    part->share = step;
  } else {
    part->next = next + before * ((part->end - part->begin) / kGroupPad) * step / all;
    part->share = (step * rows + all - 1) / all;
  }
}

template <class Tile>
void linear_as(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
               int64_t row_end) {
  const BlockShape& s = a.shape;
  if constexpr (Tile::kWideRows > 0) {
    if (row_end - row_begin >= Tile::kWideRows && s.k_padded > 0) {
      return wide<Tile>(a, block_begin, block_end, row_begin, row_end);
    }
  }
  static constexpr TileKernels<Tile> kernels =
      tile_kernels<Tile>(std::make_integer_sequence<int, Tile::kRows * Tile::kBlocks>{});
  const Finish finish = finish_for(a);
  alignas(64) float bias[Tile::kBlocks * kLanes];
  TileScratch<Tile> scratch;
  const int step = Tile::blocks(least(a.rows, Tile::kRows));
  for (int64_t begin = row_begin; begin < row_end; begin += kSlab<Tile>) {
    const int64_t end = begin + kSlab<Tile> < row_end ? begin + kSlab<Tile> : row_end;
    const bool fits = kCutsColumns<Tile> || step * s.bytes <= 256 * 1024;
    const int64_t length = part_length<Tile>(s, step, end - begin);
    for (int64_t block = block_begin; block < block_end; block += step) {
      const int blocks = least(block_end - block, step);
      load_bias(a, block * kLanes, blocks * kLanes, bias);
      const uint8_t* const codes = a.packed + block * s.bytes;
      const bool is_last = block + step >= block_end;
      Part part{};
      do {
        part.end = part.begin + length < s.k_padded ? part.begin + length : s.k_padded;
        const uint8_t* const next = part.end < s.k_padded
                                        ? codes + code_offset(Tile::kFormat, part.end, 0)
                                        : codes + (is_last ? 0 : blocks * s.bytes);
        for (int64_t row = begin; row < end; row += Tile::kRows) {
          const int rows = tile_rows<Tile>(a, row);
          look_ahead(a, codes, next, row - begin, rows, end - begin, fits, &part);
          const int64_t kept = length < s.k_padded ? (row - begin) * blocks * kLanes : 0;
          part.sums = scratch.sums + kept;
          part.total = scratch.total + kept;
          kernels.of[rows - 1][blocks - 1](a, block, row, bias, finish, part);
        }
        part.begin = part.end;
      } while (part.begin < s.k_padded);
    }
  }
}

// ---- Table entries ------------------------------------------------------------------------------
// with_tile calls its body with the policy for a layout and an activation.

int row_tile(const LinearArgs& a) {
  return with_tile(a.layout, a.activation, [](auto tile) { return decltype(tile)::kRows; });
}

int block_tile(const LinearArgs& a) {
  return with_tile(a.layout, a.activation, [&](auto tile) {
    using Tile = decltype(tile);
    return Tile::blocks(least(a.rows, Tile::kRows));
  });
}

int64_t panel_bytes(const LinearArgs& a) {
  return with_tile(a.layout, a.activation,
                   [&](auto tile) { return a.rows * a.shape.k_padded * kBytes<decltype(tile)>; });
}

void prepare(const LinearArgs& a, int64_t begin, int64_t end) {
  with_tile(a.layout, a.activation, [&](auto tile) { prepare_as<decltype(tile)>(a, begin, end); });
}

void linear(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
            int64_t row_end) {
  with_tile(a.layout, a.activation, [&](auto tile) {
    linear_as<decltype(tile)>(a, block_begin, block_end, row_begin, row_end);
  });
}

const char* linear_name(const LinearArgs& a) {
  return with_tile(a.layout, a.activation, [&](auto tile) { return decltype(tile)::name(a.rows); });
}
