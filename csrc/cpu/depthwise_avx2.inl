// Depthwise convolution for AVX2.
//
// A lane is a channel. Taps are taken in pairs, as vpmaddwd wants them; a line of the packed weight
// holds two pairs, of its even and of its odd bytes.

constexpr int64_t kMaxPairs = kDepthwiseTaps / 2;
constexpr int kDepthwiseRows = 4;

struct Pairs {
  int64_t count;
  int64_t low[kMaxPairs], high[kMaxPairs];         // where x has the taps
  alignas(64) int32_t weights[kMaxPairs][kLanes];  // of a block
};

Pairs find_pairs(const ConvArgs& a) {
  Pairs pairs;
  pairs.count = 0;
  for (int64_t line = 0; line < a.taps(); line += 4) {
    for (int64_t odd = 0; odd < 2 && line + odd < a.taps(); ++odd) {
      const int64_t low = line + odd, high = line + odd + 2;
      pairs.low[pairs.count] = tap_offset(a, low);
      pairs.high[pairs.count++] = tap_offset(a, high < a.taps() ? high : low);
    }
  }
  return pairs;
}

void load_pairs(const uint8_t* weight, Pairs* pairs) {
  for (int64_t i = 0; i < pairs->count; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int8_t* taps =
          reinterpret_cast<const int8_t*>(weight) + i / 2 * kLine + lane * 4 + i % 2;
      pairs->weights[i][lane] =
          static_cast<int32_t>((taps[0] & 0xffffu) | static_cast<uint32_t>(taps[2]) << 16);
    }
  }
}

template <int Rows>
void depthwise_tile(const ConvArgs& a, const Pairs& pairs, const Pixels& pixels, int64_t first,
                    const uint8_t* weight, int64_t channel, int32_t* out) {
  constexpr int kParts = kLanes / kWidth;
  unroll<kParts>([&](int v) INLINE {
    const I codes = load(reinterpret_cast<const int32_t*>(weight + a.shape.sums) + v * kWidth);
    I sums[Rows];
    const uint8_t* x[Rows];
    unroll<Rows>([&](int r) INLINE {
      sums[r] = multiply(codes, splat(-pixels.zero[first + r]));
      x[r] = pixels.x[first + r] + channel + v * kWidth;
    });
    for (int64_t i = 0; i < pairs.count; ++i) {
      const I w = load(pairs.weights[i] + v * kWidth);
      unroll<Rows>([&](int r) INLINE {
        const I pair = pair_words(load_i8(x[r] + pairs.low[i]), load_i8(x[r] + pairs.high[i]));
        dot2_words(sums[r], pair, w);
      });
    }
    unroll<Rows>([&](int r) INLINE { store(out + r * kLanes + v * kWidth, sums[r]); });
  });
}

struct DepthwiseTiles {
  void (*of[kDepthwiseRows])(const ConvArgs&, const Pairs&, const Pixels&, int64_t, const uint8_t*,
                             int64_t, int32_t*);  // [rows - 1]
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
  Pairs pairs = find_pairs(a);
  alignas(64) int32_t sums[kDepthwiseRows * kLanes];
  Pixels pixels;
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += kConvSlab) {
    const int64_t count = pixel_end - slab < kConvSlab ? pixel_end - slab : kConvSlab;
    find_pixels(a, slab, slab + count, &pixels);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      load_pairs(weight, &pairs);
      for (int64_t pixel = 0; pixel < count;) {
        const int64_t rows = even_piece(count - pixel, kDepthwiseRows);
        kTiles.of[rows - 1](a, pairs, pixels, pixel, weight, block * kLanes, sums);
        finish(a,
               {sums, &pixels, pixel, block, 0, a.out_channels, static_cast<int>(rows), 1, weight});
        pixel += rows;
      }
    }
  }
}
