// Depthwise convolution for vpdpbusd. Four taps of 4 * kWidth channels are interleaved into what it
// multiplies: a lane is a channel, its four bytes are taps. Interleaving works on 16 bytes of a
// vector, so piece p of vector v holds channels 16 p + 4 v .. + 3. Weights, scales and biases are
// brought into the same order, and narrowing to bytes undoes it.
//
// Where the kernel moves by one pixel and its rows have 3 (or 7, ...) taps, the pixels that one
// output needs, and one more, are all that its right neighbour needs too: both multiply the same
// interleaved pixels, with weights that are one place apart.

constexpr int kDepthwiseBlocks = kWidth / 4;  // of 16 channels
constexpr int kDepthwiseRows = kWidth / 4;    // whose sums take half of the registers
constexpr int64_t kVector = 4 * kWidth;       // bytes
constexpr int64_t kMostQuads = (kDepthwiseTaps + 2) / 3;

// Taps by fours; those that fill up the last four, of all or of each row, have weight 0.
struct Quads {
  int64_t count;
  bool shared;
  int64_t pixel;                                        // from pixel to pixel in the image
  int64_t offsets[kMostQuads][4];                       // where x has the taps
  alignas(64) uint8_t weights[kMostQuads][4][kVector];  // of all blocks
  alignas(64) uint8_t right[kMostQuads][4][kVector];    // of the neighbour, if shared
};

void find_quads(const ConvArgs& a, Quads* quads) {
  quads->pixel = a.pixel_codes();
  quads->shared = a.kernel[2] % 4 == 3 && a.dilation[2] == 1 && a.stride[2] == 1;
  if (quads->shared) {
    const int64_t rows = a.taps() / a.kernel[2], in_row = (a.kernel[2] + 1) / 4;
    quads->count = rows * in_row;
    for (int64_t i = 0; i < quads->count * 4; ++i) {
      quads->offsets[i / 4][i % 4] = tap_offset(a, i / 4 / in_row * a.kernel[2]) +
                                     (i / 4 % in_row * 4 + i % 4) * quads->pixel;
    }
    return;
  }
  quads->count = (a.taps() + 3) / 4;
  for (int64_t i = 0; i < quads->count * 4; ++i) {
    quads->offsets[i / 4][i % 4] = tap_offset(a, i < a.taps() ? i : 0);
  }
}

void load_quads(const ConvArgs& a, const uint8_t* weight, int blocks, Quads* quads) {
  const size_t bytes = static_cast<size_t>(quads->count) * 4 * kVector;
  std::memset(quads->weights, 0, bytes);
  if (quads->shared) std::memset(quads->right, 0, bytes);
  const int64_t in_row = (a.kernel[2] + 1) / 4;
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = weight + b * a.shape.bytes;
    if (!quads->shared) {
      for (int64_t i = 0; i < quads->count; ++i) {
        for (int v = 0; v < 4; ++v) {
          std::memcpy(quads->weights[i][v] + b * 16, block + i * kLine + v * 16, 16);
        }
      }
      continue;
    }
    for (int64_t tap = 0; tap < a.taps(); ++tap) {
      const int64_t row = tap / a.kernel[2] * in_row, x = tap % a.kernel[2];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t code = block[code_offset(Format::int8, tap, lane)];
        const int64_t to = b * 16 + lane % 4 * 4;
        quads->weights[row + x / 4][lane / 4][to + x % 4] = code;
        quads->right[row + (x + 1) / 4][lane / 4][to + (x + 1) % 4] = code;
      }
    }
  }
}

// From the order of channels to that of pieces.
template <class T>
void order_pieces(T (&values)[OutputValues::kMost]) {
  T from[OutputValues::kMost];
  std::memcpy(from, values, sizeof(from));
  for (int i = 0; i < kVector; ++i) {
    values[i] = from[i % kWidth / 4 * kLanes + i / kWidth * 4 + i % 4];
  }
}

struct DepthwiseTile {
  Quads quads;
  Pixels pixels;
  OutputValues values;
  ToCodes to{};
  int64_t channel;
  int blocks;
};

SIMD I depthwise_codes(const DepthwiseTile& t, const uint8_t* x) {
  return bit_xor(load_pieces(x, t.blocks), splat(static_cast<int32_t>(0x80808080)));
}

template <int Rows, bool Codes>
SIMD void finish_depthwise(const DepthwiseTile& t, I (&sums)[Rows][4], int64_t first,
                           int32_t* out) {
  unroll<Rows>([&](int r) INLINE {
    if constexpr (Codes) {
      store_codes<false, /*Pieces=*/true>(t.values, t.to, sums[r], first + r);
    } else {
      transpose_pieces(sums[r]);
      for (int v = 0; v < t.blocks * kLanes / kWidth; ++v) {
        store(out + r * t.blocks * kLanes + v * kWidth, sums[r][v]);
      }
    }
  });
}

// Pixels [first, first + Rows), wherever they are in the image.
template <int Rows, bool Codes>
void depthwise_tile(const DepthwiseTile& t, int64_t first, int32_t* out) {
  I sums[Rows][4];
  const uint8_t* x[Rows];
  unroll<Rows>([&](int r) INLINE {
    unroll<4>([&](int v) INLINE { sums[r][v] = load(t.values.start + v * kWidth); });
    x[r] = t.pixels.x[first + r] + t.channel;
  });
  for (int64_t i = 0; i < t.quads.count; ++i) {
    const int64_t* at = t.quads.offsets[i];
    unroll<Rows>([&](int r) INLINE {
      I tap[4];
      unroll<4>([&](int j) INLINE { tap[j] = depthwise_codes(t, x[r] + at[j]); });
      interleave_bytes(tap);
      unroll<4>([&](int v) INLINE { dot4(sums[r][v], tap[v], load_all(t.quads.weights[i][v])); });
    });
  }
  finish_depthwise<Rows, Codes>(t, sums, first, out);
}

// The same of pixels side by side.
template <int Rows, bool Codes>
void depthwise_shared_tile(const DepthwiseTile& t, int64_t first, int32_t* out) {
  constexpr int kPairs = Rows / 2;
  I sums[Rows][4];
  unroll<Rows>([&](int r) INLINE {
    unroll<4>([&](int v) INLINE { sums[r][v] = load(t.values.start + v * kWidth); });
  });
  const uint8_t* const corner = t.pixels.x[first] + t.channel;
  for (int64_t i = 0; i < t.quads.count; ++i) {
    const uint8_t* x = corner + t.quads.offsets[i][0];
    I low[kPairs + 1], high[kPairs + 1];  // of two pixels each
    unroll<kPairs + 1>([&](int p) INLINE {
      const I even = depthwise_codes(t, x + 2 * p * t.quads.pixel);
      const I odd = depthwise_codes(t, x + (2 * p + 1) * t.quads.pixel);
      low[p] = interleave_low_bytes(even, odd);
      high[p] = interleave_high_bytes(even, odd);
    });
    unroll<kPairs>([&](int p) INLINE {
      const I quad[4] = {interleave_low_words(low[p], low[p + 1]),
                         interleave_high_words(low[p], low[p + 1]),
                         interleave_low_words(high[p], high[p + 1]),
                         interleave_high_words(high[p], high[p + 1])};
      unroll<4>([&](int v) INLINE {
        dot4(sums[2 * p][v], quad[v], load_all(t.quads.weights[i][v]));
        dot4(sums[2 * p + 1][v], quad[v], load_all(t.quads.right[i][v]));
      });
    });
  }
  finish_depthwise<Rows, Codes>(t, sums, first, out);
}

using DepthwiseKernel = void (*)(const DepthwiseTile&, int64_t, int32_t*);
struct DepthwiseTiles {
  DepthwiseKernel apart[kDepthwiseRows], shared[kDepthwiseRows / 2];  // [rows - 1], [rows / 2 - 1]
};
template <bool Codes, int... Rows, int... Pairs>
constexpr DepthwiseTiles depthwise_tiles(std::integer_sequence<int, Rows...>,
                                         std::integer_sequence<int, Pairs...>) {
  return {{depthwise_tile<Rows + 1, Codes>...},
          {depthwise_shared_tile<2 * Pairs + 2, Codes>...}};
}
template <bool Codes>
constexpr DepthwiseTiles kDepthwiseTiles =
    depthwise_tiles<Codes>(std::make_integer_sequence<int, kDepthwiseRows>{},
                           std::make_integer_sequence<int, kDepthwiseRows / 2>{});

// Pixels from `first` on that lie side by side in the image, at most `most`.
int side_by_side(const Pixels& pixels, int64_t first, int most, int64_t pixel) {
  int count = 1;
  while (count < most && first + count < pixels.count &&
         pixels.x[first + count] == pixels.x[first] + count * pixel) {
    ++count;
  }
  return count;
}

void conv_depthwise(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
                    int64_t pixel_end) {
  const ConvFinish finish = conv_finish(a);
  DepthwiseTile t;
  find_quads(a, &t.quads);
  alignas(64) int32_t sums[kDepthwiseRows * kDepthwiseBlocks * kLanes];
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += t.pixels.count) {
    find_pixels(a, slab, pixel_end, &t.pixels);
    for (int64_t block = block_begin; block < block_end; block += kDepthwiseBlocks) {
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      const int64_t o = block * kLanes;
      t.channel = o;
      t.blocks = least(block_end - block, kDepthwiseBlocks);
      const int count = least(a.out_channels - o, t.blocks * kLanes);
      load_quads(a, weight, t.blocks, &t.quads);
      const bool codes =
          find_outputs(a, t.pixels, weight, t.blocks, o, count, &t.values, &t.to) &&
          a.residual == nullptr;
      order_pieces(t.values.start);
      if (codes) {
        order_pieces(t.values.scale);
        order_pieces(t.values.bias);
      }
      const DepthwiseTiles& tiles = codes ? kDepthwiseTiles<true> : kDepthwiseTiles<false>;
      for (int64_t pixel = 0; pixel < t.pixels.count;) {
        int rows = static_cast<int>(even_piece(t.pixels.count - pixel, kDepthwiseRows));
        if (t.quads.shared) {
          rows = side_by_side(t.pixels, pixel, kDepthwiseRows, t.quads.pixel);
          if (rows > 1) rows -= rows % 2;
        }
        (t.quads.shared && rows > 1 ? tiles.shared[rows / 2 - 1] : tiles.apart[rows - 1])(t, pixel,
                                                                                          sums);
        if (!codes) finish(a, {sums, &t.pixels, &t.values, pixel, o, rows, t.blocks, count});
        pixel += rows;
      }
    }
  }
}
