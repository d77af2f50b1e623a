// linear with int8 activations and weights in groups, for more than a few tokens: floats take up
// the exact sums of a group, group by group.
#include "cuda/dispatch.cuh"
#include "cuda/int8_gemm.cuh"
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

// Exact sums of groups that are short enough start at the bits of 1.5 * 2^23. As floats they are
// then that much more than the sum, which an fma takes off and multiplies by what kSumShift stands
// for: no conversion, and no shift.
constexpr float kSumStart = 0x1.8p23f;
constexpr int32_t kSumStartBits = 0x4b400000;
constexpr int64_t kShortGroup = 256;  // products of up to 2^14 that the significand has room for

template <class T>
QK_DEVICE void start(Sums<T>& exact, int32_t bits) {
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) exact[i][j][e] = bits;
    }
  }
}

// What a thread needs at the end of a group. It is loaded a group ahead, and converted only when it
// is used, so that nobody waits for it.
template <class T, Format kFormat, bool kZeros>
struct GroupEnd {
  uint32_t scales[T::kRows][2];  // bits as stored, of features g and g + 8
  int zeros[kZeros ? T::kRows : 1][2];
  int codes[kZeros ? T::kColumns : 1][2];  // bits of sums of the codes of tokens 2t and 2t + 1

  QK_DEVICE void load(const LinearArgs& a, int64_t row, int64_t token, int64_t group) {
    if (group >= a.shape.groups) return;
    const Corner<T> c = corner<T>();
    const int left = static_cast<int>(min((a.n + kLanes - 1) / kLanes - row, int64_t{T::kRows}));
    const int64_t at = group * kLanes + c.g;
    const uint8_t* const packed = a.packed + row * a.shape.bytes;
    if (a.layout.scale == DType::f32) {
      load_scales<uint32_t>(packed + a.shape.scales + at * 4, a.shape.bytes, left);
    } else {
      load_scales<uint16_t>(packed + a.shape.scales + at * 2, a.shape.bytes, left);
    }
    if constexpr (kZeros) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
        const uint8_t* const from = packed + i * a.shape.bytes + a.shape.zeros;
        if (i >= left) continue;
        zeros[i][0] = load_zero_point(from, kFormat, at);
        zeros[i][1] = load_zero_point(from, kFormat, at + 8);
      }
#pragma unroll
      for (int j = 0; j < T::kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t column = token + j * 8 + c.t * 2 + i;
          codes[j][i] = column < a.rows ? a.group_sums[group * a.rows + column] : 0;
        }
      }
    }
  }

  // The type is asked for once for all scales, here and when they are used.
  template <class Bits>
  QK_DEVICE void load_scales(const uint8_t* from, int64_t pitch, int left) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      const Bits* const row = reinterpret_cast<const Bits*>(from + i * pitch);
      if (i < left) scales[i][0] = row[0], scales[i][1] = row[8];
    }
  }

  QK_DEVICE void widen(float (&floats)[T::kRows][2], DType type) const {
    const auto each = [&](const auto& as_float) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
        floats[i][0] = as_float(scales[i][0]), floats[i][1] = as_float(scales[i][1]);
      }
    };
    if (type == DType::f32) return each([](uint32_t bits) { return bit_cast<float>(bits); });
    if (type == DType::bf16) return each([](uint32_t bits) { return bit_cast<float>(bits << 16); });
    each([](uint32_t bits) { return f16_to_float(static_cast<uint16_t>(bits)); });
  }
};

// sums += the group's exact sums times its scales.
template <bool kShort, class T, Format kFormat, bool kZeros>
QK_DEVICE void fold(const Sums<T>& exact, float (&sums)[T::kRows][T::kColumns][4],
                    const GroupEnd<T, kFormat, kZeros>& end, DType scale_type) {
  constexpr float kUnit = 1.0f / (1 << kSumShift<kFormat>);
  float scales[T::kRows][2];
  end.widen(scales, scale_type);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float sum = 0.0f;
        if constexpr (kShort) {
          sum = std::fma(bit_cast<float>(exact[i][j][e]), kUnit, -kSumStart * kUnit);
          // Exact: below 2^24, or eighths below 2^21.
          if constexpr (kZeros) {
            const auto codes = bit_cast<ZeroFactor<kFormat>>(end.codes[j][e % 2]);
            sum = std::fma(static_cast<float>(zero_factor<kFormat>(end.zeros[i][e / 2])),
                           static_cast<float>(codes), sum);
          }
        } else {
          const int32_t products = exact[i][j][e] >> kSumShift<kFormat>;
          if constexpr (kZeros) {
            sum = group_value<kFormat>(products, end.codes[j][e % 2],
                                       zero_factor<kFormat>(end.zeros[i][e / 2]));
          } else {
            sum = static_cast<float>(products);
          }
        }
        sums[i][j][e] = std::fma(sum, scales[i][e / 2], sums[i][j][e]);
      }
    }
  }
}

// kShort: groups are.
template <class T, Format kFormat, bool kZeros, bool kShort>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    grouped_kernel(const LinearArgs a, uint32_t feature_tiles, uint32_t token_tiles) {
  const TilePlace place = tile_place(blockIdx.x, feature_tiles, token_tiles);
  const int64_t row = place.features * (T::kFeatures / kLanes), token = place.tokens * T::kTokens;
  const Corner<T> c = corner<T>();
  constexpr int32_t kFirst = kShort ? kSumStartBits : 0;
  Sums<T> exact;
  start<T>(exact, kFirst);
  float sums[T::kRows][T::kColumns][4] = {};
  GroupEnd<T, kFormat, kZeros> end{};
  end.load(a, row + c.row, token + c.token, 0);
  int group = 0, left = chunks_of(a.shape, 0);  // chunks that are left of the group
  const auto after = [&] {
    if (--left != 0) return;
    fold<kShort, T, kFormat, kZeros>(exact, sums, end, a.layout.scale);
    start<T>(exact, kFirst);
    ++group;
    left = chunks_of(a.shape, group);
    end.load(a, row + c.row, token + c.token, group);
  };
  const int stages = static_cast<int>(panel_pitch(a.shape) / kStageK);
  const WeightStages<T, kFormat> weights(a.packed, a.shape, row, (a.n + kLanes - 1) / kLanes);
  const PanelStages<T> tokens(a.panel, panel_pitch(a.shape), token, a.rows);
  multiply<T, kFormat>(exact, weights, tokens, 0, stages, opaque_zero(a.shape), after);

  const Outputs<4> outputs =
      load_outputs<4>(a, place.features * T::kFeatures + exchanged_feature<T>());
  const auto load = [&](int at) { return load_token(a, min(token + at, a.rows - 1), false); };
  exchange<T>(sums, load, [&](int at, const TokenCodes& codes, const uint32_t (&four)[4]) {
    if (token + at >= a.rows) return;
    const float floats[4] = {bit_cast<float>(four[0]), bit_cast<float>(four[1]),
                             bit_cast<float>(four[2]), bit_cast<float>(four[3])};
    finish<4>(a, token + at, codes, outputs, floats);
  });
}

template <class T, Format kFormat, bool kShort>
void launch_as(const LinearArgs& a, Stream stream) {
  const uint32_t features = blocks_for(a.n, T::kFeatures), tokens = blocks_for(a.rows, T::kTokens);
  const auto kernel = a.layout.symmetric ? grouped_kernel<T, kFormat, false, kShort>
                                         : grouped_kernel<T, kFormat, true, kShort>;
  launch(kernel, features * tokens, T::kThreads, kSharedBytes<T, kFormat>, stream, a, features,
         tokens);
}

template <class T, Format kFormat>
void launch_tile(const LinearArgs& a, Stream stream) {
  a.shape.group_padded <= kShortGroup ? launch_as<T, kFormat, true>(a, stream)
                                      : launch_as<T, kFormat, false>(a, stream);
}

template <Format kFormat>
void launch_format(const LinearArgs& a, bool large, Stream stream) {
  large ? launch_tile<GroupedTiles::Large, kFormat>(a, stream)
        : launch_tile<GroupedTiles::Small, kFormat>(a, stream);
}

}  // namespace

void linear_int8_grouped(const LinearArgs& a, bool large, Stream stream) {
  a.layout.format == Format::int8 ? launch_format<Format::int8>(a, large, stream)
                                  : launch_format<Format::int4>(a, large, stream);
}

}  // namespace qkernels::cuda
