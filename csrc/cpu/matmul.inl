// y = x . W, tiles of rows by blocks of 16 output features. A policy (matmul_avx2.inl,
// matmul_avx512.inl) computes a group's dot products; here they are scaled and added up in the one
// order that every ISA and every tile size keeps, per output: S = fma(sum, scale, S), group after
// group from 0.

// A sum as a float, and as the int32 that int_mm wants (whose sums are integers).
SIMD F float_of(F sum) { return sum; }
SIMD F float_of(I sum) { return to_float(sum); }
SIMD I bits_of(F sum) { return bits(sum); }
SIMD I bits_of(I sum) { return sum; }

// kWidth scales of group and lane `at` on.
SIMD F load_scale(const LinearArgs& a, const uint8_t* weight, int64_t at) {
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
SIMD I load_zero(const LinearArgs& a, const uint8_t* weight, int64_t at) {
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

// The lines of y that a tile will write, so that they arrive while it computes.
SIMD void prefetch_output(const LinearArgs& a, int64_t row, int rows, int64_t block, int blocks) {
  const int64_t size = bytes_of(a.y_type);
  for (int r = 0; r < rows; ++r) {
    const char* line = static_cast<const char*>(a.y) + ((row + r) * a.n + block * kLanes) * size;
    for (int64_t i = 0; i < blocks * kLanes * size; i += kLine) _mm_prefetch(line + i, _MM_HINT_T0);
  }
}

// Adds a group's finished sum to the total of the groups before it, or to 0.
template <class Tile>
SIMD void fold(const LinearArgs& a, typename Tile::Sum sum, F scale, bool is_first, float* total) {
  if (a.y_type == DType::i32) {
    store(reinterpret_cast<int32_t*>(total), bits_of(sum));
  } else {
    store(total, fma(float_of(sum), scale, is_first ? splat(0.0f) : load(total)));
  }
}

template <class Tile, int Rows, int Blocks>
void tile(const LinearArgs& a, int64_t block, int64_t row, const float* bias, Finish finish) {
  const BlockShape& s = a.shape;
  const uint8_t* weight = a.packed + block * s.bytes;
  const uint8_t* panel = a.panel + row * s.k_padded * kBytes<Tile>;
  const int32_t* group_sums = a.group_sums + row * s.groups;
  constexpr int kParts = kLanes / kWidth;  // vectors of a block
  constexpr int kVectors = Blocks * kParts;
  alignas(64) float total[Rows][Blocks * kLanes];
  if (s.groups == 0) std::memset(total, 0, sizeof(total));
  prefetch_output(a, row, Rows, block, Blocks);
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t begin = s.padded_begin(g);
    const uint8_t* codes[Blocks];
    unroll<Blocks>([&](int b) INLINE {
      codes[b] = weight + b * s.bytes + code_offset(Tile::kFormat, begin, 0);
    });
    const int64_t steps = s.padded_length(g) / kGroupPad;
    typename Tile::Sum sums[kVectors][Rows];
    if constexpr (Tile::kFloat) {
      I zero[kVectors];
      unroll<kVectors>([&](int v) INLINE {
        zero[v] = load_zero(a, weight + v / kParts * s.bytes, g * kLanes + v % kParts * kWidth);
        unroll<Rows>([&](int r) INLINE { sums[v][r] = splat(0.0f); });
      });
      Tile::accumulate(sums, zero, panel + begin * Rows * kBytes<Tile>, codes, steps);
    } else {
      unroll<kVectors>([&](int v) INLINE {
        start<Tile>(a, weight + v / kParts * s.bytes, g * kLanes + v % kParts * kWidth,
                    group_sums + g * Rows, sums[v]);
      });
      Tile::accumulate(sums, panel + begin * Rows * kBytes<Tile>, codes, steps);
    }
    unroll<kVectors>([&](int v) INLINE {
      const int64_t at = g * kLanes + v % kParts * kWidth;
      const F scale = load_scale(a, weight + v / kParts * s.bytes, at);
      unroll<Rows>([&](int r)
                       INLINE { fold<Tile>(a, sums[v][r], scale, g == 0, &total[r][v * kWidth]); });
    });
  }
  finish(a, {&total[0][0], bias, row, block, Rows, Blocks});
}

// ---- Many rows ----------------------------------------------------------------------------------
// Where turning codes into floats takes a good part of a tile's time, from Tile::kWideRows rows on,
// a block's weights are unpacked once for a slab of rows, as many k at a time as stay in the L1
// cache. The order of the sums is that of `tile`.

constexpr int64_t kUnpackedBytes = 16 * 1024;

// So many rows at a time that their panel stays in the cache while the weights stream by.
template <class Tile>
constexpr int64_t kSlab = 32 * Tile::kRows;

template <class Tile>
struct WideScratch {
  alignas(64) uint8_t unpacked[kUnpackedBytes];
  alignas(64) float scales[kUnpackedBytes / kLanes / kGroupPad][kLanes];  // of groups
  alignas(64) float partial[kSlab<Tile>][kLanes];  // sums of a group that goes on in the next chunk
  alignas(64) float total[kSlab<Tile>][kLanes];
};

// Padded k [begin, end) of a block, from group g on: several whole groups, or a part of one.
struct WideChunk {
  const uint8_t* weight;
  int64_t begin, end, g;
};

template <class Tile>
void unpack_chunk(const LinearArgs& a, const WideChunk& c, WideScratch<Tile>* scratch) {
  uint8_t* out = scratch->unpacked;
  int64_t g = c.g;
  for (int64_t at = c.begin; at < c.end; ++g) {
    const int64_t group_end = a.shape.padded_begin(g) + a.shape.padded_length(g);
    const int64_t end = group_end < c.end ? group_end : c.end;
    I zero[kLanes / kWidth];
    for (int v = 0; v < kLanes / kWidth; ++v) {
      const int64_t lane = g * kLanes + v * kWidth;
      store(scratch->scales[g - c.g] + v * kWidth, load_scale(a, c.weight, lane));
      zero[v] = load_zero(a, c.weight, lane);
    }
    const int64_t steps = (end - at) / kGroupPad;
    Tile::unpack(c.weight + code_offset(Tile::kFormat, at, 0), zero, steps, out);
    out += steps * kGroupPad * kLanes * kBytes<Tile>;
    at = end;
  }
}

template <class Tile, int Rows>
void wide_tile(const LinearArgs& a, const WideChunk& c, int64_t row, int64_t slab_row,
               WideScratch<Tile>* scratch) {
  const BlockShape& s = a.shape;
  constexpr int kParts = kLanes / kWidth;
  const uint8_t* panel = a.panel + (row * s.k_padded + c.begin * Rows) * kBytes<Tile>;
  const uint8_t* unpacked = scratch->unpacked;
  int64_t g = c.g;
  for (int64_t at = c.begin; at < c.end; ++g) {
    const int64_t group_begin = s.padded_begin(g);
    const int64_t group_end = group_begin + s.padded_length(g);
    const int64_t end = group_end < c.end ? group_end : c.end;
    F sums[kParts][Rows];
    unroll<kParts>([&](int v) INLINE {
      unroll<Rows>([&](int r) INLINE {
        sums[v][r] =
            at == group_begin ? splat(0.0f) : load(scratch->partial[slab_row + r] + v * kWidth);
      });
    });
    const int64_t steps = (end - at) / kGroupPad;
    Tile::accumulate_unpacked(sums, panel, unpacked, steps);
    panel += steps * kGroupPad * Rows * kBytes<Tile>;
    unpacked += steps * kGroupPad * kLanes * kBytes<Tile>;
    unroll<kParts>([&](int v) INLINE {
      const F scale = load(scratch->scales[g - c.g] + v * kWidth);
      unroll<Rows>([&](int r) INLINE {
        if (end != group_end) {
          store(scratch->partial[slab_row + r] + v * kWidth, sums[v][r]);
        } else {
          fold<Tile>(a, sums[v][r], scale, g == 0, scratch->total[slab_row + r] + v * kWidth);
        }
      });
    });
    at = end;
  }
}

// The end of the chunk that begins at padded k `begin`, in group g.
template <class Tile>
int64_t chunk_end(const BlockShape& s, int64_t begin, int64_t g) {
  constexpr int64_t kMost = kUnpackedBytes / (kLanes * kBytes<Tile>);
  const int64_t group_end = s.padded_begin(g) + s.padded_length(g);
  if (group_end - begin > kMost) return begin + kMost;
  if (begin != s.padded_begin(g) || s.group_padded > kMost) return group_end;
  const int64_t whole = begin + kMost / s.group_padded * s.group_padded;
  return whole < s.k_padded ? whole : s.k_padded;
}

template <class Tile, int... Index>
void wide(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
          int64_t row_end, std::integer_sequence<int, Index...>) {
  using Kernel =
      void (*)(const LinearArgs&, const WideChunk&, int64_t, int64_t, WideScratch<Tile>*);
  static constexpr Kernel kKernels[] = {wide_tile<Tile, Index + 1>...};
  const Finish finish = finish_for(a);
  WideScratch<Tile> scratch;
  alignas(64) float bias[kLanes];
  for (int64_t slab = row_begin; slab < row_end; slab += kSlab<Tile>) {
    const int64_t end = slab + kSlab<Tile> < row_end ? slab + kSlab<Tile> : row_end;
    for (int64_t block = block_begin; block < block_end; ++block) {
      WideChunk c{a.packed + block * a.shape.bytes, 0, 0, 0};
      for (; c.begin < a.shape.k_padded; c.begin = c.end) {
        c.g = c.begin / a.shape.group_padded;
        c.end = chunk_end<Tile>(a.shape, c.begin, c.g);
        unpack_chunk<Tile>(a, c, &scratch);
        for (int64_t row = slab; row < end; row += Tile::kRows) {
          kKernels[tile_rows<Tile>(a, row) - 1](a, c, row, row - slab, &scratch);
        }
      }
      load_bias(a, block * kLanes, kLanes, bias);
      for (int64_t row = slab; row < end; row += Tile::kRows) {
        finish(a, {scratch.total[row - slab], bias, row, block, tile_rows<Tile>(a, row), 1});
      }
    }
  }
}

// ---- Choosing a tile ----------------------------------------------------------------------------

using TileKernel = void (*)(const LinearArgs&, int64_t block, int64_t row, const float* bias,
                            Finish);

constexpr int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

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

template <class Tile>
void linear_as(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
               int64_t row_end) {
  if constexpr (Tile::kWideRows > 0) {
    if (row_end - row_begin >= Tile::kWideRows && a.shape.k_padded > 0) {
      return wide<Tile>(a, block_begin, block_end, row_begin, row_end,
                        std::make_integer_sequence<int, Tile::kRows>{});
    }
  }
  static constexpr TileKernels<Tile> kernels =
      tile_kernels<Tile>(std::make_integer_sequence<int, Tile::kRows * Tile::kBlocks>{});
  const Finish finish = finish_for(a);
  alignas(64) float bias[Tile::kBlocks * kLanes];
  const int step = Tile::blocks(least(a.rows, Tile::kRows));
  for (int64_t begin = row_begin; begin < row_end; begin += kSlab<Tile>) {
    const int64_t end = begin + kSlab<Tile> < row_end ? begin + kSlab<Tile> : row_end;
    for (int64_t block = block_begin; block < block_end; block += step) {
      const int blocks = least(block_end - block, step);
      load_bias(a, block * kLanes, blocks * kLanes, bias);
      for (int64_t row = begin; row < end; row += Tile::kRows) {
        const int rows = tile_rows<Tile>(a, row);
        for (int b = 0; b < blocks; b += Tile::blocks(rows)) {
          const int width = least(blocks - b, Tile::blocks(rows));
          kernels.of[rows - 1][width - 1](a, block + b, row, bias + b * kLanes, finish);
        }
      }
    }
  }
}

// ---- Table entries ------------------------------------------------------------------------------

template <class Body>
inline auto with_tile(const Layout& layout, Activation activation, const Body& body) {
  const bool is_float = activation == Activation::float_;
  switch (layout.format) {
    case Format::int8:
      return is_float ? body(A16<Format::int8>{}) : body(W8A8{});
    case Format::int4:
      return is_float ? body(A16<Format::int4>{}) : body(W4A8{});
    default:
      return body(A16<Format::nf4>{});
  }
}

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

const char* linear_name(const Layout& layout, Activation activation, int64_t rows) {
  return with_tile(layout, activation, [&](auto tile) { return decltype(tile)::name(rows); });
}
