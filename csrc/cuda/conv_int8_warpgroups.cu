// conv with int8 activations on sm_90a as an implicit matrix product: products of warpgroups,
// weights from registers, pixels from shared memory.
//
// A block takes tiles of outputs x pixels, one after the other. Two of its warpgroups multiply; the
// others gather pixels, one stage each in turn. They read the image by plain loads, so that the taps
// of a kernel find a pixel in L1 again, and a thread has 32 channels at a time, so that it can bring
// them into the order of k that the packed weight has without more instructions.
//
// Shared memory: stages of [pixels | weights], the pixels as `matrix_in_shared` wants them, the
// weights as they are packed; then barriers, tables, and for each warpgroup sums on their way to
// other threads.
#include "cuda/conv_int8.cuh"
#include "cuda/conv_int8.h"
#include "cuda/ptx_sm90.cuh"

namespace qkernels::cuda {
namespace {

// Results leave so many pixels at a time, whose words are kRoundPitch apart: the four pixels that a
// warp writes at once, eight words each, lie in different banks.
constexpr int kRoundPixels = 32, kRoundPitch = 64 + 4;
constexpr int kStageChunks = kPieceK / kCudaChunk;

// 32 k of all pixels, which belong to one tap.
struct Chunk {
  int32_t offset;  // from a pixel's corner, in pieces of 32 codes
  uint32_t tap;    // its bit in ConvWindow::taps; 0 in the weight's padding
};

// A pixel of the tile.
struct Corner {
  int32_t at;     // in the image, in pieces of 32 codes
  uint32_t taps;  // ConvWindow::taps; none past the last pixel
};

template <class T>
struct SharedMemory {
  static constexpr int kStage = T::kPixelBytes + T::kWeightBytes;
  static constexpr int kBarriers = T::kStages * kStage;
  static constexpr int kChunks = kBarriers + 2 * 8 * T::kStages;
  static constexpr int kCorners = kChunks + kMostConvChunks * static_cast<int>(sizeof(Chunk));
  static constexpr int kCornerBytes = T::kPixels * static_cast<int>(sizeof(Corner));
  static constexpr int kImages = kCorners + T::kProducers * kCornerBytes;
  static constexpr int kFeatures = kImages + T::kPixels * 8;
  static constexpr int kResults = kFeatures + T::kFeatures * 12;
  static constexpr int kOutputs = kResults + 48;
  static constexpr int kOutputBytes = kRoundPixels * kRoundPitch * 4;
  static_assert(sizeof(ConvResults) <= 48 && kOutputs % 16 == 0 && T::kPixelBytes % 1024 == 0 &&
                kStage % 1024 == 0);
  static constexpr int kBytes = kOutputs + T::kConsumers * kOutputBytes;

  uint8_t* at;
  QK_DEVICE uint8_t* pixels(int stage) const { return at + stage * kStage; }
  QK_DEVICE uint8_t* weights(int stage) const { return pixels(stage) + T::kPixelBytes; }
  QK_DEVICE Barrier* filled(int stage) const {
    return reinterpret_cast<Barrier*>(at + kBarriers) + stage;
  }
  QK_DEVICE Barrier* emptied(int stage) const { return filled(T::kStages + stage); }
  QK_DEVICE Chunk* chunks() const { return reinterpret_cast<Chunk*>(at + kChunks); }
  QK_DEVICE Corner* corners(int producer) const {
    return reinterpret_cast<Corner*>(at + kCorners + producer * kCornerBytes);
  }
  // Of each pixel's image: scale and zero point.
  QK_DEVICE uint2* images() const { return reinterpret_cast<uint2*>(at + kImages); }
  QK_DEVICE float* scales() const { return reinterpret_cast<float*>(at + kFeatures); }
  QK_DEVICE float* biases() const { return scales() + T::kFeatures; }
  QK_DEVICE int32_t* weight_sums() const {
    return reinterpret_cast<int32_t*>(biases() + T::kFeatures);
  }
  QK_DEVICE ConvResults* results() const { return reinterpret_cast<ConvResults*>(at + kResults); }
  QK_DEVICE uint32_t* outputs(int warpgroup) const {
    return reinterpret_cast<uint32_t*>(at + kOutputs + warpgroup * kOutputBytes);
  }
};

// One stage after the other, over all tiles of a block. A barrier's phase has the parity of
// `round`.
template <class T>
struct Turn {
  int stage = 0;
  uint32_t round = 0;

  QK_DEVICE void next() {
    if (++stage == T::kStages) stage = 0, round ^= 1;
  }
};

struct Tiles {
  uint32_t features, pixels;  // their numbers
  int stages;                 // of a tile
  // Of all taps, the first 128 channels come first, so that little has to stay in L1 between the
  // taps of a pixel. 1 if stages do not consist of channels of one tap.
  int taps;
};

// Calls body(first packed row, first pixel) for each tile of the block. Blocks that run at the same
// time share pixels.
template <class T, class Body>
QK_DEVICE void each_tile(const Tiles& tiles, const Body& body) {
  for (uint32_t tile = blockIdx.x; tile < tiles.features * tiles.pixels; tile += gridDim.x) {
    const uint32_t pixels = tile / tiles.features, features = tile - pixels * tiles.features;
    body(int64_t{features} * (T::kFeatures / kLanes), int64_t{pixels} * T::kPixels);
  }
}

// Which piece of 128 k of the weight a stage multiplies.
QK_DEVICE int piece_of(const Tiles& tiles, int stage) {
  const int channels = stage / tiles.taps, tap = stage - channels * tiles.taps;
  return tap * (tiles.stages / tiles.taps) + channels;
}

QK_DEVICE void fill_chunks(const ConvArgs& a, const Tiles& tiles, Chunk* chunks) {
  const int per_tap = static_cast<int>(a.group_channels) / kCudaChunk;
  for (int i = threadIdx.x; i < tiles.stages * kStageChunks; i += blockDim.x) {
    const int chunk = piece_of(tiles, i / kStageChunks) * kStageChunks + i % kStageChunks;
    const int tap = chunk / per_tap;
    chunks[i] = {0, 0};
    if (tap < a.taps()) {
      chunks[i] = {static_cast<int32_t>(tap_offset(a, tap) / kCudaChunk) + chunk - tap * per_tap,
                   1u << tap % 32};
    }
  }
}

// ---- Copies -------------------------------------------------------------------------------------

QK_DEVICE int border_code(const ConvArgs& a) {
  return a.x_codes.device_zero == nullptr ? 0 : *a.x_codes.device_zero;
}

// The codes of 32 channels of kCount pixels that are 32 apart in the tile.
template <int kCount>
QK_DEVICE void gather(uint8_t* low, uint8_t* high, const uint8_t* image, const Corner* corners,
                      Chunk chunk, uint32_t border) {
  uint4 v[kCount][2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i][0] = v[i][1] = make_uint4(border, border, border, border);
    if ((corners[i].taps & chunk.tap) != 0) {
      const uint8_t* const from =
          image + int64_t{corners[i].at + chunk.offset} * int64_t{kCudaChunk};
      v[i][0] = load_128(from), v[i][1] = load_128(from + 16);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint4 &first = v[i][0], &second = v[i][1];
    store_shared_128(low + i * 32 * kPieceK, make_uint4(first.x, first.z, second.x, second.z));
    store_shared_128(high + i * 32 * kPieceK, make_uint4(first.y, first.w, second.y, second.w));
  }
}

template <class T>
QK_DEVICE void copy_weights(const ConvArgs& a, const SharedMemory<T>& shared, int64_t row,
                            int piece, int stage) {
  const int64_t begin = int64_t{piece} * kRowPieceBytes;
  const int rows = static_cast<int>(min(a.blocks() - row, int64_t{T::kFeatures / kLanes}));
  const int bytes =
      static_cast<int>(min(a.shape.k_padded * kLanes - begin, int64_t{kRowPieceBytes}));
  barrier_expect(shared.filled(stage), rows * bytes);
  for (int i = 0; i < rows; ++i) {
    copy_bulk(shared.weights(stage) + i * kRowPieceBytes,
              a.packed + (row + i) * a.shape.bytes + begin, bytes, shared.filled(stage));
  }
}

template <class T>
QK_DEVICE void gather_tiles(const ConvArgs& a, const Tiles& tiles, const SharedMemory<T>& shared,
                            bool borders) {
  constexpr int kEach = T::kPixels / 32, kAtOnce = kEach / (kEach > 4 ? 2 : 1);
  static_assert(T::kStages % T::kProducers == 0 && kEach % kAtOnce == 0);
  const int producer = threadIdx.x / kWarpgroup - T::kConsumers;
  const int thread = threadIdx.x % kWarpgroup, row = thread / 4, place = thread % 4;
  const uint32_t border = static_cast<uint8_t>(border_code(a)) * 0x01010101u;
  const int64_t pixels = a.batch * a.pixels();
  Corner* const known = shared.corners(producer);
  const int low = row * kPieceK + ((place * 2) ^ (row & 7)) * 16, high = low ^ 16;
  Turn<T> turn;
  each_tile<T>(tiles, [&](int64_t first_row, int64_t first) {
    sync_some(4 + producer, kWarpgroup);
    for (int i = thread; i < T::kPixels; i += kWarpgroup) {
      const ConvWindow window = window_of(a, min(first + i, pixels - 1), borders);
      known[i] = {static_cast<int32_t>(window.corner / kCudaChunk),
                  first + i < pixels ? window.taps : 0};
    }
    sync_some(4 + producer, kWarpgroup);
    Corner corners[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) corners[i] = known[row + i * 32];
    for (int stage = 0; stage < tiles.stages; ++stage, turn.next()) {
      if (turn.stage % T::kProducers != producer) continue;
      barrier_wait(shared.emptied(turn.stage), turn.round ^ 1);
      if (thread == 0) copy_weights(a, shared, first_row, piece_of(tiles, stage), turn.stage);
      const Chunk chunk = shared.chunks()[stage * kStageChunks + place];
      uint8_t* const to = shared.pixels(turn.stage);
#pragma unroll
      for (int i = 0; i < kEach; i += kAtOnce) {
        gather<kAtOnce>(to + low + i * 32 * kPieceK, to + high + i * 32 * kPieceK, a.image,
                        corners + i, chunk, chunk.tap == 0 ? 0 : border);
      }
      shared_fence();
      __syncwarp();
      if (thread % kWarp == 0) barrier_arrive(shared.filled(turn.stage));
    }
  });
}

// ---- Products -----------------------------------------------------------------------------------

template <class T>
using WarpgroupSums = int32_t[T::kColumns / 2];

// The sums of a tile; of outputs beyond the weight's last ones they are anything. `count`: adds up
// weights too, what the thread has of outputs g and g + 8 of its warp, in `weight_sums`. A
// warpgroup waits for its products after each stage; meanwhile those of the other one run.
template <class T>
QK_DEVICE void multiply_tile(WarpgroupSums<T>& sums, int32_t (&weight_sums)[2], int chunks,
                             bool count, const Tiles& tiles, const SharedMemory<T>& shared,
                             Turn<T>& turn) {
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarp;
  const int row = warpgroup % T::kAcross * 4 + threadIdx.x % kWarpgroup / kWarp;
  const int weight_offset = row * kRowPieceBytes + lane * 16;
  const int pixel_offset = warpgroup / T::kAcross * T::kColumns * kPieceK;
#pragma unroll 1
  for (int stage = 0; stage < tiles.stages; ++stage, turn.next()) {
    barrier_wait(shared.filled(turn.stage), turn.round);
    const uint8_t* const weights = shared.weights(turn.stage) + weight_offset;
    uint32_t a[kStageChunks][4];
#pragma unroll
    for (int chunk = 0; chunk < kStageChunks; ++chunk) {
      const uint4 v = load_shared_128(weights + chunk * kCudaUnit);
      a[chunk][0] = v.x, a[chunk][1] = v.z, a[chunk][2] = v.y, a[chunk][3] = v.w;
    }
    const uint64_t pixels = matrix_in_shared(shared.pixels(turn.stage) + pixel_offset);
    warpgroup_keep(sums);
    warpgroup_fence();
#pragma unroll
    for (int chunk = 0; chunk < kStageChunks; ++chunk) {
      warpgroup_mma<T::kColumns>(sums, a[chunk], pixels + chunk * (kCudaChunk / 16),
                                 stage > 0 || chunk > 0);
    }
    warpgroup_commit();
    if (count) {
#pragma unroll
      for (int chunk = 0; chunk < kStageChunks; ++chunk) {
        if (stage * kStageChunks + chunk >= chunks) continue;  // padding, which is not copied
        const uint32_t (&w)[4] = a[chunk];
        weight_sums[0] = dp4a(w[0], 0x01010101u, dp4a(w[2], 0x01010101u, weight_sums[0]));
        weight_sums[1] = dp4a(w[1], 0x01010101u, dp4a(w[3], 0x01010101u, weight_sums[1]));
      }
    }
    warpgroup_wait<0>();
    warpgroup_keep(sums);
#pragma unroll
    for (int chunk = 0; chunk < kStageChunks; ++chunk) warpgroup_keep(a[chunk]);
    if (lane == 0) barrier_arrive(shared.emptied(turn.stage));
  }
}

// ---- Results ------------------------------------------------------------------------------------

// What results need of the tile's outputs and pixels. `counted`: the products find weight_sums.
template <class T>
QK_DEVICE void fill_tables(const ConvArgs& a, const SharedMemory<T>& shared, int64_t feature,
                           int64_t pixel, bool counted) {
  constexpr int kThreads = T::kConsumers * kWarpgroup;
  for (int i = threadIdx.x; i < T::kFeatures; i += kThreads) {
    const int64_t o = min(feature + i, a.out_channels - 1);
    const ConvOutput output = load_conv_output(a, o / kLanes, static_cast<int>(o % kLanes), o, 0);
    shared.scales()[i] = output.scale, shared.biases()[i] = output.bias;
    if (!counted) shared.weight_sums()[i] = 0;
  }
  for (int i = threadIdx.x; i < T::kPixels; i += kThreads) {
    float scale;
    int zero;
    if (a.codes == nullptr) {
      scale = *a.x_codes.device_scale, zero = border_code(a);
    } else {
      const ImageCodes& codes =
          a.codes[divide(min(pixel + i, a.batch * a.pixels() - 1), a.pixels())];
      scale = codes.scale, zero = codes.zero;
    }
    shared.images()[i] = make_uint2(bit_cast<uint32_t>(scale), static_cast<uint32_t>(zero));
  }
}

// Of outputs i to i + 3 of the tile, `left` of which exist.
template <class T>
QK_DEVICE ConvOutputs outputs_at(const SharedMemory<T>& shared, int i, int64_t left) {
  ConvOutputs o{static_cast<int>(max(int64_t{0}, min(left, int64_t{4}))), {}, {}, {}};
  const uint4 v[3] = {load_shared_128(shared.scales() + i), load_shared_128(shared.biases() + i),
                      load_shared_128(shared.weight_sums() + i)};
  std::memcpy(o.scale, &v[0], 16);
  std::memcpy(o.bias, &v[1], 16);
  std::memcpy(o.weight_sum, &v[2], 16);
  return o;
}

// Hands the sums to the warpgroup by way of shared memory, kRoundPixels at a time: body(words,
// first) for pixels from `first` of the warpgroup's on.
template <class T, class Body>
QK_DEVICE void exchange_sums(const WarpgroupSums<T>& sums, uint32_t* words, int64_t left,
                             const Body& body) {
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int round = 0; round < T::kColumns / kRoundPixels; ++round) {
    if (round * kRoundPixels >= left) break;
    // Registers have no index: each round has its own stores.
#pragma unroll
    for (int r = 0; r < T::kColumns / kRoundPixels; ++r) {
      if (r != round) continue;
#pragma unroll
      for (int j = 0; j < kRoundPixels / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = j * 8 + 2 * t + e % 2, feature = warp * 16 + g + e / 2 * 8;
          words[at * kRoundPitch + feature] =
              static_cast<uint32_t>(sums[(r * kRoundPixels / 8 + j) * 4 + e]);
        }
      }
    }
    sync_some(1 + warpgroup, kWarpgroup);
    body(static_cast<const uint32_t*>(words), round * kRoundPixels);
    sync_some(1 + warpgroup, kWarpgroup);
  }
}

// What is read for four results.
struct Ahead {
  int64_t at;  // the first, in y
  uint4 residual;
};

template <class T>
QK_DEVICE void store_tile(const ConvArgs& a, const ConvResults& results,
                          const WarpgroupSums<T>& sums, const SharedMemory<T>& shared,
                          int64_t feature, int64_t pixel) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int begin = warpgroup / T::kAcross * T::kColumns;  // pixels of the tile before its own
  const int features = warpgroup % T::kAcross * 64;
  const int64_t left = a.batch * a.pixels() - pixel - begin;
  uint32_t* const words = shared.outputs(warpgroup);
  const auto load = [&](int at, int64_t n, int o, int count) {
    Ahead ahead{place_in_y(a, pixel + begin + at, n, feature + o), {}};
    if (at < left) ahead.residual = load_residual(a, results, ahead.at, count);
    return ahead;
  };
  const auto store = [&](int at, const ConvOutputs& outputs, const Ahead& ahead, uint4 v) {
    if (at >= left) return;
    const uint2 image = load_shared_64(shared.images() + begin + at);
    finish_conv(a, results, outputs, bit_cast<float>(image.x), static_cast<int>(image.y), ahead.at,
                ahead.residual, {v.x, v.y, v.z, v.w});
  };
  // Neighbouring threads store what lies side by side in y.
  if (a.y_channels_last) {
    const int o = features + thread % 16 * 4;
    const ConvOutputs outputs = outputs_at(shared, o, a.out_channels - feature - o);
    exchange_sums<T>(sums, words, left, [&](const uint32_t* from, int first) {
      constexpr int kStep = kWarpgroup / 16, kTogether = kRoundPixels / kStep;
      Ahead ahead[kTogether];
      uint4 v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = thread / 16 + i * kStep;
        ahead[i] = load(first + at, 0, o, outputs.count);
        v[i] = load_shared_128(from + at * kRoundPitch + thread % 16 * 4);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        store(first + thread / 16 + i * kStep, outputs, ahead[i], v[i]);
      }
    });
    return;
  }
  exchange_sums<T>(sums, words, left, [&](const uint32_t* from, int first) {
#pragma unroll 1
    for (int i = thread; i < kRoundPixels * 16; i += kWarpgroup) {
      const int at = i % kRoundPixels, o = features + i / kRoundPixels * 4;
      const ConvOutputs outputs = outputs_at(shared, o, a.out_channels - feature - o);
      const int64_t n = divide(pixel + begin + first + at, a.pixels());
      const uint4 v = load_shared_128(from + at * kRoundPitch + i / kRoundPixels * 4);
      store(first + at, outputs, load(first + at, n, o, outputs.count), v);
    }
  });
}

template <class T>
QK_DEVICE void multiply_tiles(const ConvArgs& a, const Tiles& tiles,
                              const SharedMemory<T>& shared) {
  constexpr int kThreads = T::kConsumers * kWarpgroup;
  const int chunks = static_cast<int>(a.shape.k_padded / kCudaChunk);
  const int row = threadIdx.x / kWarpgroup % T::kAcross * 64 +
                  threadIdx.x % kWarpgroup / kWarp * kLanes + threadIdx.x % kWarp / 4;
  Turn<T> turn;
  each_tile<T>(tiles, [&](int64_t first_row, int64_t pixel) {
    fill_tables(a, shared, first_row * kLanes, pixel, !a.symmetric);
    WarpgroupSums<T> sums;
    int32_t weight_sums[2] = {};
    multiply_tile<T>(sums, weight_sums, chunks, !a.symmetric, tiles, shared, turn);
    if (!a.symmetric) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int mask = 1; mask < 4; mask *= 2) weight_sums[i] += shuffle_xor(weight_sums[i], mask);
        if (threadIdx.x % 4 == 0) shared.weight_sums()[row + i * 8] = weight_sums[i];
      }
    }
    sync_some(3, kThreads);
    store_tile<T>(a, *shared.results(), sums, shared, first_row * kLanes, pixel);
    sync_some(3, kThreads);  // before the next tile's tables
  });
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    conv_warpgroups_kernel(const ConvArgs a, const Tiles tiles, bool borders) {
  if constexpr (QK_SM90A) {
    const SharedMemory<T> shared{shared_memory<uint8_t>()};
    if (threadIdx.x == 0) {
      for (int i = 0; i < T::kStages; ++i) {
        barrier_init(shared.filled(i), kWarpgroup / kWarp + 1);
        barrier_init(shared.emptied(i), T::kConsumers * (kWarpgroup / kWarp));
      }
      barrier_init_fence();
    }
    if (threadIdx.x == kWarp) *shared.results() = load_conv_results(a);
    fill_chunks(a, tiles, shared.chunks());
    __syncthreads();
    if (threadIdx.x < T::kConsumers * kWarpgroup) {
      take_registers<168>();
      multiply_tiles<T>(a, tiles, shared);
    } else {
      give_registers<88>();
      gather_tiles<T>(a, tiles, shared, borders);
    }
  }
}

template <class T>
void launch_as(const ConvArgs& a, bool borders, Stream stream) {
  const int stages = static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK);
  const Tiles tiles{blocks_for(a.out_channels, T::kFeatures),
                    blocks_for(a.batch * a.pixels(), T::kPixels), stages,
                    a.group_channels % kPieceK == 0 ? static_cast<int>(a.taps()) : 1};
  const unsigned blocks =
      min(tiles.features * tiles.pixels, static_cast<unsigned>(multiprocessors()));
  launch(conv_warpgroups_kernel<T>, blocks, T::kThreads, SharedMemory<T>::kBytes, stream, a, tiles,
         borders);
}

}  // namespace

void conv_warpgroups(const ConvArgs& a, bool borders, Stream stream) {
  const auto cycles = [&](auto tile) {
    return conv_cycles<decltype(tile)>(a.out_channels, a.batch * a.pixels(), a.shape.k_padded,
                                       multiprocessors());
  };
  using Tiles = ConvTiles;
  const int64_t narrow = cycles(Tiles::Narrow{}), small = cycles(Tiles::Short{});
  const int64_t middle = cycles(Tiles::Middle{}), large = cycles(Tiles::Long{});
  const int64_t least = min(min(narrow, small), min(middle, large));
  if (narrow == least) return launch_as<Tiles::Narrow>(a, borders, stream);
  if (middle == least) return launch_as<Tiles::Middle>(a, borders, stream);
  if (large == least) return launch_as<Tiles::Long>(a, borders, stream);
  launch_as<Tiles::Short>(a, borders, stream);
}

}  // namespace qkernels::cuda
