// Depthwise convolution for AVX-512. Four taps of 64 channels are interleaved into what vpdpbusd
// multiplies: a lane is a channel, its four bytes are taps. Interleaving works on quarters of a
// vector, so quarter q of vector v holds channels 16 q + 4 v .. + 3; the weights are brought into
// the same order, and the sums back into that of the channels.

constexpr int kDepthwiseRows = 4;
constexpr int kDepthwiseBlocks = 4;  // of 16 channels
constexpr int64_t kMostQuads = (kDepthwiseTaps + 3) / 4;

// Taps by fours; those that fill up the last four have weight 0.
struct Quads {
  int64_t count;
  int64_t offsets[kMostQuads][4];                       // where x has the taps
  alignas(64) uint8_t weights[kMostQuads][4][kLine];    // of four blocks
  alignas(64) int32_t sums[kDepthwiseBlocks * kLanes];  // of a channel's weights
  __mmask16 words;                                      // of 64 codes, those of blocks
};

void find_quads(const ConvArgs& a, Quads* quads) {
  const int64_t taps = a.taps();
  quads->count = (taps + 3) / 4;
  for (int64_t i = 0; i < quads->count * 4; ++i) {
    quads->offsets[i / 4][i % 4] = tap_offset(a, i < taps ? i : 0);
  }
}

void load_quads(const ConvArgs& a, const uint8_t* weight, int blocks, Quads* quads) {
  quads->words = static_cast<__mmask16>((1u << blocks * 4) - 1);
  std::memset(quads->weights, 0, static_cast<size_t>(quads->count) * 4 * kLine);
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

// Quarters of four vectors, transposed.
SIMD void transpose_quarters(I (&x)[4]) {
  const I a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const I c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// Sums of `Rows` pixels and four blocks, of which `blocks` are stored.
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
    I weight[4];
    unroll<4>([&](int v) INLINE { weight[v] = load_line(quads.weights[i][v]); });
    unroll<Rows>([&](int r) INLINE {
      I tap[4];
      unroll<4>([&](int t)
                    INLINE { tap[t] = _mm512_maskz_loadu_epi32(quads.words, x[r] + at[t]); });
      const I low = _mm512_unpacklo_epi8(tap[0], tap[1]),
              high = _mm512_unpackhi_epi8(tap[0], tap[1]);
      const I low2 = _mm512_unpacklo_epi8(tap[2], tap[3]);
      const I high2 = _mm512_unpackhi_epi8(tap[2], tap[3]);
      dot4(sums[r][0], _mm512_unpacklo_epi16(low, low2), weight[0]);
      dot4(sums[r][1], _mm512_unpackhi_epi16(low, low2), weight[1]);
      dot4(sums[r][2], _mm512_unpacklo_epi16(high, high2), weight[2]);
      dot4(sums[r][3], _mm512_unpackhi_epi16(high, high2), weight[3]);
    });
  }
  unroll<Rows>([&](int r) INLINE {
    transpose_quarters(sums[r]);
    const I zero = splat(pixels.zero[first + r] + 128);
    for (int b = 0; b < blocks; ++b) {
      store(out + (r * blocks + b) * kLanes,
            sub(sums[r][b], multiply(load(quads.sums + b * kLanes), zero)));
    }
  });
}

void conv_depthwise(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
                    int64_t pixel_end) {
  using Kernel = void (*)(const Quads&, const Pixels&, int64_t, int64_t, int, int32_t*);
  static constexpr Kernel kTiles[kDepthwiseRows] = {depthwise_tile<1>, depthwise_tile<2>,
                                                    depthwise_tile<3>, depthwise_tile<4>};
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
        kTiles[rows - 1](quads, pixels, pixel, block * kLanes, blocks, sums);
        finish(a, {sums, &pixels, pixel, block, 0, a.out_channels, static_cast<int>(rows), blocks,
                   weight});
        pixel += rows;
      }
    }
  }
}
