// linear with int8 activations and weights in groups, for more than a few tokens: floats take up
// the exact sums of a group, group by group.
#include "cuda/dispatch.cuh"
#include "cuda/int8_gemm.cuh"
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

// A warp has floats beside its exact sums, so it takes half as many tokens as in
// linear_int8_row.cu.
using Large = Tile<128, 128, 64, 32, 4, 1>;
using Small = Tile<64, 64, 32, 32, 4, 2>;

// What a thread needs at the end of a group. It is loaded a group ahead, and converted only when it
// is used, so that nobody waits for it.
template <class T, Format kFormat, bool kZeros>
struct GroupEnd {
  uint32_t scales[T::kRows][2];  // bits as stored, of features g and g + 8
  int zeros[kZeros ? T::kRows : 1][2];
  int codes[kZeros ? T::kColumns : 1][2];  // sums of the codes of tokens 2t and 2t + 1

  QK_DEVICE void load(const LinearArgs& a, int64_t row, int64_t token, int64_t group) {
    if (group >= a.shape.groups) return;
    const Corner<T> c = corner<T>();
    const int64_t blocks = (a.n + kLanes - 1) / kLanes;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      if (row + i >= blocks) continue;
      const uint8_t* packed = a.packed + (row + i) * a.shape.bytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = group * kLanes + c.g + half * 8;
        scales[i][half] = load_bits(packed + a.shape.scales, a.layout.scale, at);
        if constexpr (kZeros) zeros[i][half] = load_zero_point(packed + a.shape.zeros, kFormat, at);
      }
    }
    if constexpr (kZeros) {
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

  QK_DEVICE static uint32_t load_bits(const void* scales, DType type, int64_t at) {
    return type == DType::f32 ? static_cast<const uint32_t*>(scales)[at]
                              : static_cast<const uint16_t*>(scales)[at];
  }

  QK_DEVICE static float scale(uint32_t bits, DType type) {
    if (type == DType::f32) return bit_cast<float>(bits);
    return type == DType::bf16 ? bf16_to_float(static_cast<uint16_t>(bits))
                               : f16_to_float(static_cast<uint16_t>(bits));
  }
};

// sums += the group's exact sums, which start again from 0, times its scales.
template <class T, Format kFormat, bool kZeros>
QK_DEVICE void fold(Sums<T>& exact, float (&sums)[T::kRows][T::kColumns][4],
                    const GroupEnd<T, kFormat, kZeros>& end, DType scale_type) {
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const float scales[2] = {end.scale(end.scales[i][0], scale_type),
                             end.scale(end.scales[i][1], scale_type)};
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int32_t sum = exact[i][j][e] >> kSumShift<kFormat>;
        if constexpr (kZeros) {
          sum += zero_factor<kFormat>(end.zeros[i][e / 2]) * end.codes[j][e % 2];
        }
        sums[i][j][e] = std::fma(static_cast<float>(sum), scales[e / 2], sums[i][j][e]);
        exact[i][j][e] = 0;
      }
    }
  }
}

template <class T, Format kFormat, bool kZeros>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    grouped_kernel(const LinearArgs a, uint32_t feature_tiles, uint32_t token_tiles) {
  const TilePlace place = tile_place(blockIdx.x, feature_tiles, token_tiles);
  const int64_t row = place.features * (T::kFeatures / kLanes), token = place.tokens * T::kTokens;
  const Corner<T> c = corner<T>();
  Sums<T> exact = {};
  float sums[T::kRows][T::kColumns][4] = {};
  GroupEnd<T, kFormat, kZeros> end{};
  end.load(a, row + c.row, token + c.token, 0);
  int group = 0, left = chunks_of(a.shape, 0);  // chunks that are left of the group
  const auto after = [&] {
    if (--left != 0) return;
    fold<T, kFormat, kZeros>(exact, sums, end, a.layout.scale);
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

template <class T, Format kFormat>
void launch_as(const LinearArgs& a, Stream stream) {
  const uint32_t features = blocks_for(a.n, T::kFeatures), tokens = blocks_for(a.rows, T::kTokens);
  const auto kernel =
      a.layout.symmetric ? grouped_kernel<T, kFormat, false> : grouped_kernel<T, kFormat, true>;
  launch(kernel, features * tokens, T::kThreads, kSharedBytes<T, kFormat>, stream, a, features,
         tokens);
}

template <Format kFormat>
void launch_format(const LinearArgs& a, bool large, Stream stream) {
  large ? launch_as<Large, kFormat>(a, stream) : launch_as<Small, kFormat>(a, stream);
}

}  // namespace

void linear_int8_grouped(const LinearArgs& a, bool large, Stream stream) {
  a.layout.format == Format::int8 ? launch_format<Format::int8>(a, large, stream)
                                  : launch_format<Format::int4>(a, large, stream);
}

}  // namespace qkernels::cuda
