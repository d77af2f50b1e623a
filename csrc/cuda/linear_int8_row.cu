// linear with int8 activations and one group for each row of the weight, for more than a few
// tokens, and int_mm: sums stay exact integers to the end.
#include "cuda/int8_gemm.cuh"
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

// Exact sums may be cut over several blocks: blockIdx.y takes `stages` of them and writes to
// partial[blockIdx.y][rows][n rounded up to 4].
template <class T, Format kFormat>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    row_kernel(const LinearArgs a, uint32_t feature_tiles, uint32_t token_tiles, int stages,
               int32_t* partial) {
  const TilePlace place = tile_place(blockIdx.x, feature_tiles, token_tiles);
  const int64_t row = place.features * (T::kFeatures / kLanes), token = place.tokens * T::kTokens;
  const int all = static_cast<int>(panel_pitch(a.shape) / kStageK);
  const int begin = static_cast<int>(blockIdx.y) * stages;
  Sums<T> exact = {};
  const WeightStages<T, kFormat> weights(a.packed, a.shape, row, (a.n + kLanes - 1) / kLanes);
  const PanelStages<T> tokens(a.panel, panel_pitch(a.shape), token, a.rows);
  multiply<T, kFormat>(exact, weights, tokens, begin, min(all, begin + stages),
                       opaque_zero(a.shape), [] {});

  const int64_t feature = place.features * T::kFeatures + exchanged_feature<T>();
  if (partial != nullptr) {
    const int64_t pitch = round_up(a.n, 4);
    const auto nothing = [](int) { return 0; };
    exchange<T>(exact, nothing, [&](int at, int, const uint32_t (&four)[4]) {
      if (token + at >= a.rows || feature >= a.n) return;
      const int64_t line = blockIdx.y * a.rows + token + at;
      store_128(partial + line * pitch + feature, make_uint4(four[0], four[1], four[2], four[3]));
    });
    return;
  }
  const RowOutputs<kFormat, 4> outputs = load_row_outputs<kFormat, 4>(a, feature);
  const auto load = [&](int at) {
    return load_token(a, min(token + at, a.rows - 1), !a.layout.symmetric);
  };
  exchange<T>(exact, load, [&](int at, const TokenCodes& codes, const uint32_t (&four)[4]) {
    if (token + at < a.rows) finish_exact<kFormat, 4>(a, token + at, codes, outputs, four);
  });
}

constexpr int kSumThreads = 128;

// Adds up the parts of four outputs of a token.
template <Format kFormat>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const LinearArgs a, int parts, const int32_t* partial) {
  const int64_t pitch = round_up(a.n, 4), fours = pitch / 4;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= fours * a.rows) return;
  const int64_t token = at / fours, feature = at % fours * 4;
  uint32_t sums[4] = {};
  for (int part = 0; part < parts; ++part) {
    const uint4 v = load_128(partial + (part * a.rows + token) * pitch + feature);
    sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
  }
  finish_exact<kFormat, 4>(a, token, load_token(a, token, !a.layout.symmetric),
                           load_row_outputs<kFormat, 4>(a, feature), sums);
}

template <class T, Format kFormat>
void launch_as(const LinearArgs& a, const Int8Plan& plan, int32_t* partial, Stream stream) {
  const uint32_t features = blocks_for(a.n, T::kFeatures), tokens = blocks_for(a.rows, T::kTokens);
  const dim3 grid(features * tokens, static_cast<unsigned>(plan.parts));
  launch(row_kernel<T, kFormat>, grid, T::kThreads, kSharedBytes<T, kFormat>, stream, a, features,
         tokens, plan.stages, plan.parts > 1 ? partial : nullptr);
  if (plan.parts == 1) return;
  const int64_t fours = round_up(a.n, 4) / 4 * a.rows;
  launch(sum_kernel<kFormat>, blocks_for(fours, kSumThreads), kSumThreads, 0, stream, a, plan.parts,
         partial);
}

template <Format kFormat>
void launch_format(const LinearArgs& a, const Int8Plan& plan, int32_t* partial, Stream stream) {
  plan.kind == Int8Plan::large ? launch_as<RowTiles::Large, kFormat>(a, plan, partial, stream)
                               : launch_as<RowTiles::Small, kFormat>(a, plan, partial, stream);
}

}  // namespace

void linear_int8_row(const LinearArgs& a, const Int8Plan& plan, int32_t* partial, Stream stream) {
  a.layout.format == Format::int8 ? launch_format<Format::int8>(a, plan, partial, stream)
                                  : launch_format<Format::int4>(a, plan, partial, stream);
}

}  // namespace qkernels::cuda
