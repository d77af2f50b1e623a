// Convolution with int8 weights and activations: the product of matmul.inl, without a gathered x.
// In the image the channels lie innermost and the borders are filled in, so what an output pixel
// needs of x is a few runs of consecutive codes at fixed distances from its own corner of the
// image: one run for each row of the kernel.
//
// Per output: p, the exact sum of (code(x) - zero) * code(w); y = fma(scale of x, f32(p) * scale of
// w, bias); the residual is added; activation function; conversion. As in scalar.cpp, to the bit.

// ---- Where the rows of the product are ----------------------------------------------------------

// The slab from pixel `begin` on, which may end before `end`.
void find_pixels(const ConvArgs& a, int64_t begin, int64_t end, Pixels* pixels) {
  const int64_t bytes = a.pixel_codes() * conv_code_bytes(a);
  int64_t n = begin / a.pixels(), pixel = begin % a.pixels();
  int64_t z = pixel / (a.out[1] * a.out[2]), y = pixel / a.out[2] % a.out[1];
  int64_t x = pixel % a.out[2];
  pixels->begin = begin;
  pixels->codes = a.codes[n];
  int64_t count = 0;
  const int64_t most = end - begin < kConvSlab ? end - begin : kConvSlab;
  while (count < most) {
    const int64_t row = (z * a.stride[0] * a.grid[1] + y * a.stride[1]) * a.grid[2];
    const uint8_t* const corner =
        a.image + (n * a.image_codes() * conv_code_bytes(a)) + row * bytes;
    for (; x < a.out[2] && count < most; ++x) {
      pixels->x[count++] = corner + x * a.stride[2] * bytes;
    }
    x = 0;
    if (++y < a.out[1]) continue;
    y = 0;
    if (++z < a.out[0]) continue;
    z = 0;
    ++n;
    if (count < most && !(a.codes[n].scale == pixels->codes.scale &&
                          a.codes[n].zero == pixels->codes.zero)) {
      break;
    }
  }
  pixels->count = count;
}

// Distance in bytes from a pixel's corner to tap `tap`.
int64_t tap_offset(const ConvArgs& a, int64_t tap) {
  const int64_t z = tap / (a.kernel[1] * a.kernel[2]), y = tap / a.kernel[2] % a.kernel[1];
  const int64_t x = tap % a.kernel[2];
  return ((z * a.dilation[0] * a.grid[1] + y * a.dilation[1]) * a.grid[2] + x * a.dilation[2]) *
         a.pixel_codes() * conv_code_bytes(a);
}

// Consecutive taps whose codes are consecutive too.
int64_t run_taps(const ConvArgs& a) {
  return a.groups == 1 && a.dilation[2] == 1 ? a.kernel[2] : 1;
}

// ---- Tiles --------------------------------------------------------------------------------------

struct Runs {
  int64_t count, units;  // units of 4 codes in a run
  int64_t offsets[kConvTaps];
};

void find_runs(const ConvArgs& a, Runs* runs) {
  const int64_t taps = a.compact ? a.kernel[2] : run_taps(a);
  runs->count = a.taps() / taps;
  runs->units = a.compact ? a.row_codes() / 4 : taps * a.group_channels / 4;
  for (int64_t run = 0; run < runs->count; ++run) runs->offsets[run] = tap_offset(a, run * taps);
}

struct ConvTile {
  const Runs* runs;
  const Pixels* pixels;
  const uint8_t* weight;
  int64_t block_bytes, x_offset;
  OutputValues values;
  ToCodes to{};
};

// What becomes of a tile's sums.
enum class Give { sums, codes, codes_with_residual };
constexpr int kGive = 3;

// Pixels [first, first + Rows) of the slab; `out` takes the sums if they are wanted.
template <int Rows, int Blocks, Give What>
void conv_tile(const ConvTile& t, int64_t first, int32_t* out) {
  constexpr int kVectors = Blocks * (kLanes / kWidth);
  I sums[kVectors][Rows];
  unroll<kVectors>([&](int v) INLINE {
    const I start = load(t.values.start + v * kWidth);
    unroll<Rows>([&](int r) INLINE { sums[v][r] = start; });
  });
  const uint8_t* x[Rows];
  unroll<Rows>([&](int r) INLINE { x[r] = t.pixels->x[first + r] + t.x_offset; });
  const uint8_t* codes[Blocks];
  unroll<Blocks>([&](int b) INLINE { codes[b] = t.weight + b * t.block_bytes; });
  int64_t line = 0;
  for (int64_t run = 0; run < t.runs->count; ++run) {
    W8A8::accumulate_run(sums, x, t.runs->offsets[run], codes, line, t.runs->units);
    line += t.runs->units * kLine;
  }
  unroll<Rows>([&](int r) INLINE {
    if constexpr (What == Give::sums) {
      unroll<kVectors>([&](int v)
                           INLINE { store(out + (r * kVectors + v) * kWidth, sums[v][r]); });
    } else {
      I row[kVectors];
      unroll<kVectors>([&](int v) INLINE { row[v] = sums[v][r]; });
      store_codes<What == Give::codes_with_residual, /*Pieces=*/false>(t.values, t.to, row, first + r);
    }
  });
}

using ConvTileKernel = void (*)(const ConvTile&, int64_t, int32_t*);
template <int Rows, int Blocks, Give What>
constexpr ConvTileKernel conv_tile_kernel() {
  if constexpr (Rows <= W8A8::conv_rows(Blocks)) return conv_tile<Rows, Blocks, What>;
  return nullptr;
}
struct ConvTiles {
  ConvTileKernel of[kGive][W8A8::kRows][W8A8::kConvBlocks];  // [][rows - 1][blocks - 1]
};
template <int... Index>
constexpr ConvTiles conv_tiles(std::integer_sequence<int, Index...>) {
  constexpr int kBlocks = W8A8::kConvBlocks, kTiles = W8A8::kRows * kBlocks;
  return {{conv_tile_kernel<Index % kTiles / kBlocks + 1, Index % kBlocks + 1,
                            static_cast<Give>(Index / kTiles)>()...}};
}

// The next of `left` items when they are cut into pieces of at most `most`, as even as can be.
int64_t even_piece(int64_t left, int64_t most) {
  const int64_t pieces = (left + most - 1) / most;
  return (left + pieces - 1) / pieces;
}

void conv_dense(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
                int64_t pixel_end) {
  static constexpr ConvTiles kTiles = conv_tiles(
      std::make_integer_sequence<int, kGive * W8A8::kRows * W8A8::kConvBlocks>{});
  const ConvFinish finish = conv_finish(a);
  Runs runs;
  find_runs(a, &runs);
  alignas(64) int32_t sums[W8A8::kRows * W8A8::kConvBlocks * kLanes];
  Pixels pixels;
  ConvTile tile;
  tile.runs = &runs;
  tile.pixels = &pixels;
  tile.block_bytes = a.shape.bytes;
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += pixels.count) {
    find_pixels(a, slab, pixel_end, &pixels);
    for (int64_t block = block_begin; block < block_end;) {
      const int64_t group = block / a.group_blocks(), first = block % a.group_blocks();
      const int64_t group_end = (group + 1) * a.group_blocks();
      const int64_t left = (group_end < block_end ? group_end : block_end) - block;
      const int blocks = static_cast<int>(even_piece(left, W8A8::kConvBlocks));
      const int64_t o = group * a.group_outputs() + first * kLanes;
      const int count = least(a.group_outputs() - first * kLanes, blocks * kLanes);
      tile.weight = a.packed + block * a.shape.bytes;
      tile.x_offset = group * a.group_channels * conv_code_bytes(a);
      const bool codes =
          find_outputs(a, pixels, tile.weight, blocks, o, count, &tile.values, &tile.to);
      const Give give = !codes                ? Give::sums
                        : a.residual == nullptr ? Give::codes
                                                : Give::codes_with_residual;
      for (int64_t pixel = 0; pixel < pixels.count;) {
        const int64_t rows = even_piece(pixels.count - pixel, W8A8::conv_rows(blocks));
        kTiles.of[static_cast<int>(give)][rows - 1][blocks - 1](tile, pixel, sums);
        if (!codes) {
          finish(a, {sums, &pixels, &tile.values, pixel, o, static_cast<int>(rows), blocks, count});
        }
        pixel += rows;
      }
      block += blocks;
    }
  }
}
