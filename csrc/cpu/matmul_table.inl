// y = x . W: choosing tiles, and the entries of the table.

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
