// conv with int8 activations as an implicit matrix product: the tokens of linear's tiles are pixels
// of y, and what a tile needs of them is copied from the image piece by piece.
#include "cuda/conv_int8.cuh"
#include "cuda/conv_int8.h"
#include "cuda/int8_gemm.cuh"

namespace qkernels::cuda {
namespace {

using Large = Tile<128, 128, 64, 64, 4, 2>;
using Narrow = Tile<64, 128, 32, 64, 4, 2>;  // few outputs
using Small = Tile<64, 64, 32, 32, 5, 2>;

// Pieces of kPiece codes of the pixels of a tile. A thread copies the same piece of several pixels,
// so a stage costs it one look into the table, which it takes a stage ahead.
template <class T, int kPiece>
struct ImageStages {
  static constexpr int kPieces = kStageK / kPiece;
  static constexpr int kCopies = T::kTokens * kPieces / T::kThreads;
  static constexpr int kStep = T::kThreads / kPieces;  // pixels from a copy to the next
  static_assert(kStep % 4 == 0 && kCopies * T::kThreads == T::kTokens * kPieces);

  const uint8_t* corners[kCopies];
  uint32_t taps[kCopies];   // ConvWindow::taps; none past the last pixel
  const ConvPiece* pieces;  // of the thread's, of stage 0
  int stages;
  ConvPiece piece;  // of the stage that is copied next
  int to;

  QK_DEVICE ImageStages(const ConvArgs& a, const ConvTables& tables, int64_t first, int64_t group,
                        bool borders) {
    const int token = threadIdx.x / kPieces, place = threadIdx.x % kPieces;
    pieces = tables.pieces + place;
    stages = static_cast<int>(panel_pitch(a.shape) / kStageK);
    load(0);
    const int64_t pixels = a.batch * a.pixels();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t pixel = first + token + i * kStep;
      const ConvWindow window = window_of(a, min(pixel, pixels - 1), borders);
      corners[i] = a.image + window.corner + group * a.group_channels;
      taps[i] = pixel < pixels ? window.taps : 0;
    }
    const int byte = place * kPiece;
    to = token_offset(token, byte / 16) + byte % 16;
  }

  QK_DEVICE void load(int stage) {
    piece = {-1, 0};
    if (stage >= stages) return;
    const uint2 v = load_64(pieces + static_cast<int64_t>(stage) * kPieces);
    piece = {static_cast<int32_t>(v.x), static_cast<int32_t>(v.y)};
  }

  QK_DEVICE void copy(uint8_t* stage_memory, int stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // Where nothing is copied, `from` is not read.
      const bool there = piece.offset >= 0 && (taps[i] >> piece.tap & 1) != 0;
      cp_async<kPiece>(stage_memory + to + i * kStep * kStageK, corners[i] + piece.offset,
                       there ? kPiece : 0);
    }
    load(stage + 1);
  }
};

// What results need of the tile's outputs and pixels, in shared memory behind `exchange_words`.
template <class T>
struct ResultTables {
  float* scales;         // [kFeatures]
  float* biases;         // [kFeatures]
  int32_t* weight_sums;  // [kFeatures]
  uint4* pixels;         // [kTokens]: the image's scale and zero point, and its number
  static constexpr int kBegin = T::kRound * T::kRoundPitch * 4;
  static constexpr int kBytes = T::kFeatures * 12 + T::kTokens * 16;
  static_assert(kBegin % 16 == 0 && kBegin + kBytes <= kSharedBytes<T, Format::int8>);

  QK_DEVICE ResultTables() {
    uint8_t* const at = shared_memory<uint8_t>() + kBegin;
    scales = reinterpret_cast<float*>(at);
    biases = scales + T::kFeatures;
    weight_sums = reinterpret_cast<int32_t*>(biases + T::kFeatures);
    pixels = reinterpret_cast<uint4*>(weight_sums + T::kFeatures);
  }

  QK_DEVICE void fill(const ConvArgs& a, const ConvTables& tables, int64_t group, int64_t feature,
                      int64_t pixel) const {
    for (int i = threadIdx.x; i < T::kFeatures; i += T::kThreads) {
      const int64_t o = min(feature + i, a.group_outputs() - 1);
      const int64_t block = group * a.group_blocks() + o / kLanes;
      const int lane = static_cast<int>(o % kLanes);
      const int32_t sum =
          tables.weight_sums == nullptr ? 0 : tables.weight_sums[block * kLanes + lane];
      const ConvOutput output =
          load_conv_output(a, block, lane, group * a.group_outputs() + o, sum);
      scales[i] = output.scale, biases[i] = output.bias, weight_sums[i] = output.weight_sum;
    }
    for (int i = threadIdx.x; i < T::kTokens; i += T::kThreads) {
      const int64_t n = divide(min(pixel + i, a.batch * a.pixels() - 1), a.pixels());
      const ImageCodes& codes = a.codes[n];
      store_shared_128(
          pixels + i, make_uint4(bit_cast<uint32_t>(codes.scale), static_cast<uint32_t>(codes.zero),
                                 static_cast<uint32_t>(n), 0));
    }
  }

  // Of outputs i to i + 3 of the tile, `left` of which exist.
  QK_DEVICE ConvOutputs outputs(int i, int64_t left) const {
    return load_conv_outputs(scales + i, biases + i, weight_sums + i, left);
  }
};

// What is read for four results.
struct Ahead {
  float scale;
  int zero;
  int64_t at;  // the first, in y
  uint4 residual;
};

template <class T, int kPiece>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_kernel(const ConvArgs a, const ConvTables tables, bool borders, uint32_t feature_tiles,
                uint32_t pixel_tiles) {
  const TilePlace place = tile_place(blockIdx.x, feature_tiles, pixel_tiles);
  const int64_t group = blockIdx.y, group_rows = a.group_blocks();
  const int64_t feature = place.features * T::kFeatures, pixel = place.tokens * T::kTokens;
  const uint8_t* const packed = a.packed + group * group_rows * a.shape.bytes;
  Sums<T> exact = {};
  const WeightStages<T, Format::int8> weights(packed, a.shape, feature / kLanes, group_rows);
  ImageStages<T, kPiece> image(a, tables, pixel, group, borders);
  multiply<T, Format::int8>(exact, weights, image, 0,
                            static_cast<int>(panel_pitch(a.shape) / kStageK), opaque_zero(a.shape),
                            [] {});

  const ResultTables<T> known;
  known.fill(a, tables, group, feature, pixel);
  const ConvResults results = load_conv_results(a);
  const int64_t pixels = a.batch * a.pixels();
  const auto load = [&](int token, int at, int count) {
    const uint4 v = load_shared_128(known.pixels + token);
    Ahead ahead{bit_cast<float>(v.x), static_cast<int>(v.y), 0, {}};
    ahead.at = place_in_y(a, pixel + token, v.z, group * a.group_outputs() + feature + at);
    if (pixel + token < pixels) ahead.residual = load_residual(a, results, ahead.at, count);
    return ahead;
  };
  const auto store = [&](int token, const ConvOutputs& outputs, const Ahead& ahead,
                         const uint32_t (&four)[4]) {
    if (pixel + token >= pixels) return;
    finish_conv(a, results, outputs, ahead.scale, ahead.zero, ahead.at, ahead.residual, four);
  };
  // Neighbouring threads store what lies side by side in y.
  if (a.y_channels_last) {
    const int at = exchanged_feature<T>();
    __syncthreads();
    const ConvOutputs outputs = known.outputs(at, a.group_outputs() - feature - at);
    exchange<T>(
        exact, [&](int token) { return load(token, at, outputs.count); },
        [&](int token, const Ahead& ahead, const uint32_t (&four)[4]) {
          store(token, outputs, ahead, four);
        });
    return;
  }
  exchange_words<T>(exact, [&](const uint32_t* words, int first) {
    for (int i = threadIdx.x; i < T::kRound * T::kFeatures / 4; i += T::kThreads) {
      const int token = i % T::kRound, at = i / T::kRound * 4;
      const ConvOutputs outputs = known.outputs(at, a.group_outputs() - feature - at);
      const uint4 v = load_shared_128(words + token * T::kRoundPitch + at);
      store(first + token, outputs, load(first + token, at, outputs.count), {v.x, v.y, v.z, v.w});
    }
  });
}

template <class T, int kPiece>
void launch_as(const ConvArgs& a, const ConvTables& tables, bool borders, Stream stream) {
  const uint32_t features = blocks_for(a.group_outputs(), T::kFeatures);
  const uint32_t pixels = blocks_for(a.batch * a.pixels(), T::kTokens);
  launch(conv_kernel<T, kPiece>, dim3(features * pixels, static_cast<unsigned>(a.groups)),
         T::kThreads, kSharedBytes<T, Format::int8>, stream, a, tables, borders, features, pixels);
}

// ---- The call -----------------------------------------------------------------------------------

// Whether x is the image that the kernel slides over, and nothing has to be quantized or moved.
// Zeros around it are not there then, so taps have to fit into 32 bits, and the kernel has to know
// the code of zero if that is not 0.
bool is_image(const ConvArgs& a, int piece, bool borders, bool knows_zero) {
  if (a.x_type != DType::i8 || !a.x_channels_last || a.channels != a.pixel_codes()) return false;
  if (reinterpret_cast<uintptr_t>(a.x) % piece != 0) return false;
  if (borders && (a.taps() > 32 || (a.x_codes.device_zero != nullptr && !knows_zero))) return false;
  return a.step[0] == 1 && a.step[1] == 1 && a.step[2] == 1;
}

struct Call {
  ConvArgs args;
  bool warpgroups;
  ConvTables tables;
  Range* ranges;
  ImageCodes* codes;
  uint8_t* image;  // null: x itself
  bool borders;    // taps may be outside of it
  int piece;
  int64_t bytes;  // of the workspace
};

// Gives out the workspace, or only counts it when there is none.
Call plan_call(const ConvArgs& given, uint8_t* memory) {
  Call c{};
  c.args = given;
  ConvArgs& a = c.args;
  c.piece = a.group_channels % 16 == 0 ? 16 : 4;
  for (int i = 0; i < 3; ++i) c.borders |= a.before[i] != 0 || a.grid[i] > a.in[i];
  c.warpgroups =
      conv_takes_warpgroups(a.depthwise, a.groups, a.group_channels, a.taps(), has_sm90a()) &&
      a.batch * a.image_codes() / kCudaChunk <= INT32_MAX;
  const bool no_copy = is_image(a, c.piece, c.borders, c.warpgroups);
  c.borders &= no_copy;
  if (no_copy) {
    for (int i = 0; i < 3; ++i) a.grid[i] = a.in[i];
  }
  const auto take = [&](int64_t bytes) {
    uint8_t* const at = memory + c.bytes;
    c.bytes += round_up(bytes, 256);
    return at;
  };
  if (!no_copy) c.image = take(a.batch * a.image_codes());
  a.image = no_copy ? static_cast<const uint8_t*>(a.x) : c.image;
  if (c.warpgroups && no_copy) return c;
  c.ranges = reinterpret_cast<Range*>(take(a.batch * kRangeParts * int64_t{sizeof(Range)}));
  c.codes = reinterpret_cast<ImageCodes*>(take(a.batch * int64_t{sizeof(ImageCodes)}));
  a.codes = c.codes;
  if (c.warpgroups) return c;
  const int64_t pieces = a.depthwise ? a.taps() : panel_pitch(a.shape) / c.piece;
  c.tables.pieces = reinterpret_cast<ConvPiece*>(take(pieces * int64_t{sizeof(ConvPiece)}));
  if (!a.symmetric && !a.depthwise) {
    c.tables.weight_sums = reinterpret_cast<int32_t*>(take(a.blocks() * kLanes * 4));
  }
  return c;
}

}  // namespace

void conv_tiles(const ConvArgs& a, const ConvTables& tables, int piece, bool borders,
                Stream stream) {
  if (piece == 4) return launch_as<Small, 4>(a, tables, borders, stream);
  const auto cycles = [&](auto tile) {
    using T = decltype(tile);
    return product_cycles<T>(a.group_outputs(), a.batch * a.pixels(), a.groups, multiprocessors());
  };
  const int64_t large = cycles(Large{}), narrow = cycles(Narrow{}), small = cycles(Small{});
  if (large <= min(narrow, small)) return launch_as<Large, 16>(a, tables, borders, stream);
  if (narrow <= small) return launch_as<Narrow, 16>(a, tables, borders, stream);
  launch_as<Small, 16>(a, tables, borders, stream);
}

int64_t conv_int8_workspace(const ConvArgs& args) { return plan_call(args, nullptr).bytes; }

void conv_int8(const ConvArgs& args, void* workspace, Stream stream) {
  Call c = plan_call(args, static_cast<uint8_t*>(workspace));
  if (c.codes != nullptr) {
    conv_prepare(c.args, c.tables, c.ranges, c.codes, c.image, c.piece, stream);
  }
  // A copy begins with its border.
  if (c.image != nullptr) c.args.before[0] = c.args.before[1] = c.args.before[2] = 0;
  if (c.warpgroups) return conv_warpgroups(c.args, c.borders, stream);
  if (c.args.depthwise) return conv_depthwise(c.args, c.tables, c.borders, stream);
  conv_tiles(c.args, c.tables, c.piece, c.borders, stream);
}

}  // namespace qkernels::cuda
