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
void depthwise_tile(const Pairs& pairs, const Pixels& pixels, const OutputValues& values,
                    int64_t first, int64_t channel, int32_t* out) {
  constexpr int kParts = kLanes / kWidth;
  unroll<kParts>([&](int v) INLINE {
    const I start = load(values.start + v * kWidth);
    I sums[Rows];
    const uint8_t* x[Rows];
    unroll<Rows>([&](int r) INLINE {
      sums[r] = start;
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

// Codes of a block without residual.
void finish_codes(const ConvSums& t, const ToCodes& to) {
  constexpr int kParts = kLanes / kWidth;
  for (int r = 0; r < t.rows; ++r) {
    I sums[kParts];
    unroll<kParts>([&](int v) INLINE { sums[v] = load(t.sums + r * kLanes + v * kWidth); });
    store_codes<false, /*Pieces=*/false>(*t.values, to, sums, t.first + r);
  }
}

struct DepthwiseTiles {
  void (*of[kDepthwiseRows])(const Pairs&, const Pixels&, const OutputValues&, int64_t, int64_t,
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
  Pairs pairs = find_pairs(a);
  alignas(64) int32_t sums[kDepthwiseRows * kLanes];
  Pixels pixels;
  OutputValues values;
  ToCodes to{};
  for (int64_t slab = pixel_begin; slab < pixel_end; slab += pixels.count) {
    find_pixels(a, slab, pixel_end, &pixels);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      load_pairs(weight, &pairs);
      const int64_t o = block * kLanes;
      const int count = least(a.out_channels - o, kLanes);
      const bool codes = 
          find_outputs(a, pixels, weight, 1, o, count, &values, &to) && a.residual == nullptr;
      for (int64_t pixel = 0; pixel < pixels.count;) {
        const int rows = static_cast<int>(even_piece(pixels.count - pixel, kDepthwiseRows));
        kTiles.of[rows - 1](pairs, pixels, values, pixel, o, sums);
        const ConvSums tile{sums, &pixels, &values, pixel, o, rows, 1, count};
        codes ? finish_codes(tile, to) : finish(a, tile);
        pixel += rows;
      }
    }
  }
}
