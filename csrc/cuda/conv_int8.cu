// conv with int8 activations as an implicit matrix product: the tokens of linear's tiles are pixels
// of y, and what a tile needs of them is copied from the image piece by piece.
#include "cuda/conv_int8.cuh"
#include "cuda/int8_gemm.cuh"

namespace qkernels::cuda {
namespace {

using Large = Tile<128, 128, 64, 64, 4, 2>;
using Small = Tile<64, 64, 32, 32, 5, 2>;

// Pieces of kPiece codes of the pixels of a tile. A thread copies the same piece of several pixels,
// so a stage costs it one look into the table, which it takes a stage ahead.
template <class T, int kPiece>
struct ImageStages {
  static constexpr int kPieces = kStageK / kPiece;
  static constexpr int kCopies = T::kTokens * kPieces / T::kThreads;
  static constexpr int kStep = T::kThreads / kPieces;  // pixels from a copy to the next
  static_assert(kStep % 4 == 0 && kCopies * T::kThreads == T::kTokens * kPieces);

  const uint8_t* corners[kCopies];  // null past the last pixel
  const int32_t* pieces;            // of the thread's, of stage 0
  int to;

  QK_DEVICE ImageStages(const ConvArgs& a, const ConvTables& tables, int64_t first, int64_t group) {
    const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const int64_t pixels = a.batch * a.pixels();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t pixel = first + token + i * kStep;
      corners[i] = pixel < pixels ? a.image + corner_of(a, pixel) + group * a.group_channels
                                  : nullptr;
    }
    pieces = tables.pieces + piece;
    const int byte = piece * kPiece;
    to = token_offset(token, byte / 16) + byte % 16;
  }

  QK_DEVICE void copy(uint8_t* stage_memory, int stage) const {
    const int32_t offset = pieces[static_cast<int64_t>(stage) * kPieces];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = offset >= 0 && corners[i] != nullptr;
      cp_async<kPiece>(stage_memory + to + i * kStep * kStageK,
                       corners[i] + (there ? offset : 0), there ? kPiece : 0);
    }
  }
};

template <class T, int kPiece>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_kernel(const ConvArgs a, const ConvTables tables, uint32_t feature_tiles,
                uint32_t pixel_tiles) {
  const TilePlace place = tile_place(blockIdx.x, feature_tiles, pixel_tiles);
  const int64_t group = blockIdx.y, group_rows = a.group_blocks();
  const int64_t row = place.features * (T::kFeatures / kLanes), pixel = place.tokens * T::kTokens;
  const uint8_t* const packed = a.packed + group * group_rows * a.shape.bytes;
  Sums<T> exact = {};
  const WeightStages<T, Format::int8> weights(packed, a.shape, row, group_rows);
  const ImageStages<T, kPiece> image(a, tables, pixel, group);
  multiply<T, Format::int8>(exact, weights, image, 0,
                            static_cast<int>(panel_pitch(a.shape) / kStageK), opaque_zero(a.shape),
                            [] {});

  // Neighbouring threads store what lies side by side in y.
  const int64_t pixels = a.batch * a.pixels();
  exchange_words<T>(exact, [&](const uint32_t* words, int first) {
    for (int i = threadIdx.x; i < T::kRound * T::kFeatures; i += T::kThreads) {
      const int token = a.y_channels_last ? i / T::kFeatures : i % T::kRound;
      const int feature = a.y_channels_last ? i % T::kFeatures : i / T::kRound;
      const int64_t o = place.features * T::kFeatures + feature, at = pixel + first + token;
      if (o >= a.group_outputs() || at >= pixels) continue;
      const int32_t sum = static_cast<int32_t>(words[token * T::kRoundPitch + feature]);
      const int64_t block = group * group_rows + o / kLanes;
      const int lane = static_cast<int>(o % kLanes);
      const int32_t weight_sum =
          tables.weight_sums == nullptr ? 0 : tables.weight_sums[block * kLanes + lane];
      finish_conv(a, at, group * a.group_outputs() + o, sum, a.packed + block * a.shape.bytes, lane,
                  weight_sum);
    }
  });
}

template <class T, int kPiece>
void launch_as(const ConvArgs& a, const ConvTables& tables, Stream stream) {
  const uint32_t features = blocks_for(a.group_outputs(), T::kFeatures);
  const uint32_t pixels = blocks_for(a.batch * a.pixels(), T::kTokens);
  launch(conv_kernel<T, kPiece>, dim3(features * pixels, static_cast<unsigned>(a.groups)),
         T::kThreads, kSharedBytes<T, Format::int8>, stream, a, tables, features, pixels);
}

// ---- Depthwise ----------------------------------------------------------------------------------

constexpr int kPixels = 32, kDepthwiseThreads = kPixels * 4;

// 16 channels of 32 pixels: a thread has four channels of a pixel, whose codes are a word.
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_kernel(const ConvArgs a, const int32_t* offsets) {
  const uint8_t* const packed = a.packed + blockIdx.y * a.shape.bytes;
  const int taps = static_cast<int>(a.taps());
  int8_t* const weights = shared_memory<int8_t>();  // [taps][16]
  for (int i = threadIdx.x; i < taps * kLanes; i += kDepthwiseThreads) {
    weights[i] =
        static_cast<int8_t>(packed[cuda_code_offset(Format::int8, i / kLanes, i % kLanes)]);
  }
  __syncthreads();
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kPixels + threadIdx.x / 4;
  if (pixel >= a.batch * a.pixels()) return;
  const int first = threadIdx.x % 4 * 4;
  const uint8_t* const corner =
      a.image + corner_of(a, pixel) + blockIdx.y * int64_t{kLanes} + first;
  int32_t sums[4] = {}, weight_sums[4] = {};
  for (int tap = 0; tap < taps; ++tap) {
    const uint32_t codes = load_32(corner + offsets[tap]);
    const uint32_t w = *reinterpret_cast<const uint32_t*>(weights + tap * kLanes + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t weight = static_cast<int8_t>(w >> 8 * i);
      sums[i] += static_cast<int8_t>(codes >> 8 * i) * weight;
      weight_sums[i] += weight;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t o = blockIdx.y * int64_t{kLanes} + first + i;
    if (o >= a.out_channels) continue;
    finish_conv(a, pixel, o, sums[i], packed, first + i, weight_sums[i]);
  }
}

// ---- The call -----------------------------------------------------------------------------------

// Whether x is the image that the kernel slides over: nothing to quantize, to move or to fill in.
bool is_image(const ConvArgs& a, int piece) {
  if (a.x_type != DType::i8 || !a.x_channels_last || a.channels != a.pixel_codes()) return false;
  if (a.depthwise || reinterpret_cast<uintptr_t>(a.x) % piece != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (a.step[i] != 1 || a.before[i] != 0 || a.grid[i] > a.in[i]) return false;
  }
  return true;
}

struct Call {
  ConvArgs args;
  ConvTables tables;
  Range* ranges;
  ImageCodes* codes;
  uint8_t* image;  // null: x itself
  int piece;
  int64_t bytes;  // of the workspace
};

// Gives out the workspace, or only counts it when there is none.
Call plan_call(const ConvArgs& given, uint8_t* memory) {
  Call c{};
  c.args = given;
  ConvArgs& a = c.args;
  c.piece = a.group_channels % 16 == 0 ? 16 : 4;
  const bool no_copy = is_image(a, c.piece);
  if (no_copy) {
    for (int i = 0; i < 3; ++i) a.grid[i] = a.in[i];
  }
  const auto take = [&](int64_t bytes) {
    uint8_t* const at = memory + c.bytes;
    c.bytes += round_up(bytes, 256);
    return at;
  };
  c.ranges = reinterpret_cast<Range*>(take(a.batch * kRangeParts * int64_t{sizeof(Range)}));
  c.codes = reinterpret_cast<ImageCodes*>(take(a.batch * int64_t{sizeof(ImageCodes)}));
  const int64_t pieces = a.depthwise ? a.taps() : panel_pitch(a.shape) / c.piece;
  c.tables.pieces = reinterpret_cast<int32_t*>(take(pieces * 4));
  if (!a.symmetric && !a.depthwise) {
    c.tables.weight_sums = reinterpret_cast<int32_t*>(take(a.blocks() * kLanes * 4));
  }
  if (!no_copy) c.image = take(a.batch * a.image_codes());
  a.codes = c.codes;
  a.image = no_copy ? static_cast<const uint8_t*>(a.x) : c.image;
  return c;
}

}  // namespace

void conv_tiles(const ConvArgs& a, const ConvTables& tables, int piece, Stream stream) {
  const int64_t tiles = int64_t{blocks_for(a.group_outputs(), Large::kFeatures)} *
                        blocks_for(a.batch * a.pixels(), Large::kTokens) * a.groups;
  if (piece == 4) return launch_as<Small, 4>(a, tables, stream);
  if (a.group_outputs() > Small::kFeatures && tiles >= multiprocessors()) {
    return launch_as<Large, 16>(a, tables, stream);
  }
  launch_as<Small, 16>(a, tables, stream);
}

void conv_depthwise(const ConvArgs& a, const ConvTables& tables, Stream stream) {
  const dim3 grid(blocks_for(a.batch * a.pixels(), kPixels), static_cast<unsigned>(a.blocks()));
  launch(depthwise_kernel, grid, kDepthwiseThreads, a.taps() * kLanes, stream, a,
         static_cast<const int32_t*>(tables.pieces));
}

int64_t conv_int8_workspace(const ConvArgs& args) { return plan_call(args, nullptr).bytes; }

void conv_int8(const ConvArgs& args, void* workspace, Stream stream) {
  const Call c = plan_call(args, static_cast<uint8_t*>(workspace));
  conv_prepare(c.args, c.tables, c.ranges, c.codes, c.image, c.piece, stream);
  if (c.args.depthwise) return conv_depthwise(c.args, c.tables, stream);
  conv_tiles(c.args, c.tables, c.piece, stream);
}

}  // namespace qkernels::cuda
