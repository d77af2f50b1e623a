// y = x . W with many rows. From Tile::kWideRows rows on, the weights of Tile::kWideBlocks blocks
// are unpacked once for a slab of rows, as many k at a time as stay in the L1 cache. Of a tile's
// rows Tile::kWideTile are taken at once, so few that their totals stay in registers beside their
// sums. The order of the sums is that of `tile`.
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
  const bool from_zero = starts_from_zero<Tile>(a);
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
    } else if (Tile::kFloat || from_zero) {
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
      const Values<Tile, kVectors> value(a, c.weight, g, group_sums);
      unroll<kVectors>([&](int v) INLINE {
        const uint8_t* weight = c.weight + v / kParts * s.bytes;
        const F scale = load_scale(a, weight, g * kLanes + v % kParts * kWidth);
        unroll<Count>(
            [&](int r) INLINE { total[v][r] = fma(value(sums[v][r], v, r), scale, total[v][r]); });
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
