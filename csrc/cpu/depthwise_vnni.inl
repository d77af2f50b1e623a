// Depthwise convolution for vpdpbusd. Four taps of 4 * kWidth channels are interleaved into what it
// multiplies: a lane is a channel, its four bytes are taps. Interleaving works on 16 bytes of a
// vector, so piece p of vector v holds channels 16 p + 4 v .. + 3; the weights are brought into the
// same order, and the sums back into that of the channels.

constexpr int kDepthwiseBlocks = kWidth / 4;  // of 16 channels
constexpr int kDepthwiseRows = kWidth / 4;    // whose sums take half of the registers
constexpr int64_t kVector = 4 * kWidth;       // bytes
constexpr int64_t kMostQuads = (kDepthwiseTaps + 3) / 4;

// Taps by fours; those that fill up the last four have weight 0.
struct Quads {
  int64_t count;
  int64_t offsets[kMostQuads][4];                       // where x has the taps
  alignas(64) uint8_t weights[kMostQuads][4][kVector];  // of all blocks
  alignas(64) int32_t sums[kDepthwiseBlocks * kLanes];  // of a channel's weights
};

void find_quads(const ConvArgs& a, Quads* quads) {
  const int64_t taps = a.taps();
  quads->count = (taps + 3) / 4;
  for (int64_t i = 0; i < quads->count * 4; ++i) {
    quads->offsets[i / 4][i % 4] = tap_offset(a, i < taps ? i : 0);
  }
}

void load_quads(const ConvArgs& a, const uint8_t* weight, int blocks, Quads* quads) {
  std::memset(quads->weights, 0, static_cast<size_t>(quads->count) * 4 * kVector);
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = weight + b * a.shape.bytes;
    std::memcpy(quads->sums + b * kLanes, block + a.shape.sums, kLanes * sizeof(int32_t));
    for (int64_t i = 0; i < quads->count; ++i) {
      for (int v = 0; v < 4; ++v) {
        std::memcpy(quads->weights[i][v] + b * 16, block + i * kLine + v * 16, 16);
      }
    }
  }
}

// Sums of `Rows` pixels and of all blocks, of which `blocks` are there.
template <int Rows>
void depthwise_tile(const Quads& quads, const Pixels& pixels, int64_t first, int64_t channel,
                    int blocks, int32_t* out) {
  I sums[Rows][4];
  const uint8_t* x[Rows];
  unroll<Rows>([&](int r) INLINE {
    unroll<4>([&](int v) INLINE { sums[r][v] = splat(0); });
    x[r] = pixels.x[first + r] + channel;
  });
  for (int64_t i = 0; i < quads.count; ++i) {
    const int64_t* at = quads.offsets[i];
    unroll<Rows>([&](int r) INLINE {
      I tap[4];
      unroll<4>([&](int t) INLINE { tap[t] = load_pieces(x[r] + at[t], blocks); });
      interleave_bytes(tap);
      unroll<4>([&](int v) INLINE { dot4(sums[r][v], tap[v], load_all(quads.weights[i][v])); });
    });
  }
  unroll<Rows>([&](int r) INLINE {
    transpose_pieces(sums[r]);
    const I zero = splat(pixels.zero[first + r] + 128);
    for (int v = 0; v < blocks * kLanes / kWidth; ++v) {
      store(out + r * blocks * kLanes + v * kWidth,
            sub(sums[r][v], multiply(load(quads.sums + v * kWidth), zero)));
    }
  });
}

struct DepthwiseTiles {
  void (*of[kDepthwiseRows])(const Quads&, const Pixels&, int64_t, int64_t, int,
                             int32_t*);  // [rows - 1]
};
template <int... Index>
constexpr DepthwiseTiles depthwise_tiles(std::integer_sequence<int, Index...>) {
  return {{depthwise_tile<Index + 1>...}};
}

void conv_depthwise(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
                    int64_t pixel_end) {
  static constexpr DepthwiseTiles kTiles =
      depthwise_tiles(std::make_integer_sequence<int, kDepthwiseRows>{});
  const ConvFinish finish = conv_finish(a);
  Quads quads;
  find_quads(a, &quads);
  alignas(64) int32_t sums[kDepthwiseRows * kDepthwiseBlocks * kLanes];
  Pixels pixels;
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += kConvSlab) {
    const int64_t count = pixel_end - slab < kConvSlab ? pixel_end - slab : kConvSlab;
    find_pixels(a, slab, slab + count, &pixels);
    for (int64_t block = block_begin; block < block_end; block += kDepthwiseBlocks) {
      const int blocks = least(block_end - block, kDepthwiseBlocks);
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      load_quads(a, weight, blocks, &quads);
      for (int64_t pixel = 0; pixel < count;) {
        const int64_t rows = even_piece(count - pixel, kDepthwiseRows);
        kTiles.of[rows - 1](quads, pixels, pixel, block * kLanes, blocks, sums);
        finish(a, {sums, &pixels, pixel, block, 0, a.out_channels, static_cast<int>(rows), blocks,
                   weight});
        pixel += rows;
      }
    }
  }
}
