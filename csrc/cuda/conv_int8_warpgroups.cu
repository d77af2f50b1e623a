// conv with int8 activations on sm_90a as an implicit matrix product: products of warpgroups,
// weights from registers, pixels from shared memory.
//
// A block takes tiles of outputs x pixels, one after the other. Some of its warpgroups multiply;
// the others gather pixels: they start copies by way of L1, where the taps of a kernel find a pixel
// again, and go on to the next stage without waiting for them. So pixels keep the order that they
// have in the image, and weights are brought into it in registers.
#include "cuda/conv_int8_warpgroups.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kConsumerRegisters = 176, kProducerRegisters = 80;

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

[[maybe_unused]] QK_DEVICE void fill_chunks(const ConvArgs& a, const Tiles& tiles,
                                            ConvChunk* chunks, int* pieces) {
  const int per_tap = static_cast<int>(a.group_channels) / kCudaChunk;
  for (int i = threadIdx.x; i < tiles.stages * kStageChunks; i += blockDim.x) {
    const int piece = piece_of(tiles, i / kStageChunks);
    if (i % kStageChunks == 0) pieces[i / kStageChunks] = piece;
    const int chunk = piece * kStageChunks + i % kStageChunks;
    const int tap = chunk / per_tap;
    chunks[i] = {0, 0};
    if (tap < a.taps()) {
      chunks[i] = {static_cast<int32_t>(tap_offset(a, tap) / kCudaChunk) + chunk - tap * per_tap,
                   1u << tap % 32};
    }
  }
}

// ---- Copies -------------------------------------------------------------------------------------

// Weights of consecutive packed rows.
struct WeightCopies {
  const uint8_t* from;
  int64_t pitch;
  int rows;
};

[[maybe_unused]] QK_DEVICE void copy_weights(const WeightCopies& copies, uint8_t* to,
                                             int64_t offset, int bytes, Barrier* filled) {
  for (int i = 0; i < copies.rows; ++i) {
    copy_bulk(to + i * kRowPieceBytes, copies.from + i * copies.pitch + offset, bytes, filled);
  }
}

template <class T>
QK_DEVICE void gather_tiles(const ConvArgs& a, const Tiles& tiles, const ConvMemory<T>& shared,
                            bool borders) {
  // Eight threads copy the codes of a pixel.
  constexpr int kTogether = kWarpgroup / 8, kEach = T::kOwnPixels / kTogether;
  constexpr int kWarps = T::kStageProducers * (kWarpgroup / kWarp);
  // Packed rows of the tile, and how many of them a warp copies.
  constexpr int kAllRows = T::kFeatures / kLanes, kRows = (kAllRows + kWarps - 1) / kWarps;
  static_assert(T::kStages % T::kProducers == 0);
  const int producer = threadIdx.x / kWarpgroup - T::kConsumers;
  const int thread = threadIdx.x % kWarpgroup, place = thread % 8;  // of 16 codes in a pixel's 128
  const int share = producer % T::kStageProducers;                  // which pixels of a stage
  const int weight_row = (share * (kWarpgroup / kWarp) + thread / kWarp) * kRows;
  const int row = share * T::kOwnPixels + thread / 8;
  const int pixel_offset = row * kPieceK + (place ^ (row & 7)) * 16;
  const uint32_t border = static_cast<uint8_t>(border_code(a)) * 0x01010101u;
  const uint8_t* const image = a.image + place % 2 * 16;
  const int64_t pixels = a.batch * a.pixels(), blocks = a.blocks();
  const int64_t codes = a.shape.k_padded * kLanes;
  ConvCorner* const known = shared.corners() + producer * T::kOwnPixels;
  Turn turn;
  each_tile<T>(tiles, [&](int64_t first_row, int64_t first) {
    sync_some(4 + producer, kWarpgroup);
    if (thread < T::kOwnPixels) {
      const int64_t pixel = first + share * T::kOwnPixels + thread;
      const ConvWindow window = window_of(a, min(pixel, pixels - 1), borders);
      known[thread] = {static_cast<int32_t>(window.corner / kCudaChunk),
                       pixel < pixels ? window.taps : 0};
    }
    sync_some(4 + producer, kWarpgroup);
    ConvCorner corners[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) corners[i] = known[thread / 8 + i * kTogether];
    const int64_t weights = first_row + weight_row;
    const int64_t left = min(blocks, first_row + kAllRows) - weights;
    const WeightCopies copies{a.packed + weights * a.shape.bytes, a.shape.bytes,
                              static_cast<int>(max(min(left, int64_t{kRows}), int64_t{0}))};
#pragma unroll 1
    for (int stage = 0; stage < tiles.stages; ++stage, turn.next(T::kStages)) {
      if (T::kStageProducers == 1 && turn.stage % T::kProducers != producer) continue;
      const ConvChunk chunk = shared.chunks()[stage * kStageChunks + place / 2];
      const int64_t begin = int64_t{shared.weight_pieces()[stage]} * kRowPieceBytes;
      const int bytes = static_cast<int>(min(codes - begin, int64_t{kRowPieceBytes}));
      Barrier* const filled = shared.filled(turn.stage);
      const uint8_t* const from = image + int64_t{chunk.offset} * int64_t{kCudaChunk};
      barrier_wait(shared.emptied(turn.stage), turn.parity ^ 1);
      uint8_t* const to = shared.pixels(turn.stage) + pixel_offset;
      const auto each_pixel = [&](const auto& body) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          body(to + i * kTogether * kPieceK, from + int64_t{corners[i].at} * int64_t{kCudaChunk},
               (corners[i].taps & chunk.tap) != 0);
        }
      };
      if (border == 0) {
        each_pixel(cp_async_cached);
      } else {
        const uint32_t outside = chunk.tap == 0 ? 0 : border;
        each_pixel([&](uint8_t* pixel, const uint8_t* source, bool inside) {
          if (inside) {
            cp_async_cached(pixel, source, true);
          } else {
            store_shared_128(pixel, make_uint4(outside, outside, outside, outside));
          }
        });
      }
      barrier_arrive_copied(filled);
      __syncwarp();
      // Says that what the warp stored is there, too.
      if (thread % kWarp == 0) {
        barrier_expect(filled, copies.rows * bytes);
        copy_weights(copies, shared.weights(turn.stage) + weight_row * kRowPieceBytes, begin, bytes,
                     filled);
      }
    }
  });
}

// ---- Products -----------------------------------------------------------------------------------

// Of each 32 k of a packed row a thread has eight, and a product wants k 4t to 4t + 3 and 16 on
// from it: the four threads of a row exchange two words.
[[maybe_unused]] QK_DEVICE void order_weights(uint32_t (&a)[4], uint4 packed) {
  const int lane = threadIdx.x % kWarp, t = lane % 4, base = lane - t;
  const bool low = t < 2, even = t % 2 == 0;
  const int one = base + t / 2 + (even ? 0 : 2), other = base + t / 2 + (even ? 2 : 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows g and g + 8
    const uint32_t first = i == 0 ? packed.x : packed.z, second = i == 0 ? packed.y : packed.w;
    const uint32_t v = shuffle(low ? first : second, one);
    const uint32_t w = shuffle(low ? second : first, other);
    a[i] = even ? v : w, a[i + 2] = even ? w : v;
  }
}

using StageWeights = uint32_t[kStageChunks][4];

// The sums of a tile; of outputs beyond the weight's last ones they are anything. `count`: adds up
// weights too, what the thread has of outputs g and g + 8 of its warp, in `weight_sums`. While a
// stage is multiplied, the next one's weights are brought to registers.
template <class T>
QK_DEVICE void multiply_tile(WarpgroupSums<T>& sums, int32_t (&weight_sums)[2], int chunks,
                             bool count, const Tiles& tiles, const ConvMemory<T>& shared,
                             Turn& turn) {
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarp;
  const int row = warpgroup % T::kAcross * 4 + threadIdx.x % kWarpgroup / kWarp;
  const int weight_offset = row * kRowPieceBytes + lane * 16;
  const int pixel_offset = warpgroup / T::kAcross * T::kColumns * kPieceK;
  const auto load = [&](StageWeights& to, const Turn& from) {
    barrier_wait(shared.filled(from.stage), from.parity);
    shared_fence();  // pixels were not written the way that products read
    const uint8_t* const weights = shared.weights(from.stage) + weight_offset;
#pragma unroll
    for (int chunk = 0; chunk < kStageChunks; ++chunk) {
      order_weights(to[chunk], load_shared_128(weights + chunk * kCudaUnit));
    }
  };
  StageWeights a, next;
  load(next, turn);
#pragma unroll 1
  for (int stage = 0; stage < tiles.stages; ++stage) {
#pragma unroll
    for (int i = 0; i < kStageChunks * 4; ++i) a[i / 4][i % 4] = next[i / 4][i % 4];
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
    Turn ahead = turn;
    ahead.next(T::kStages);
    if (stage + 1 < tiles.stages) load(next, ahead);
    warpgroup_wait<0>();
    warpgroup_keep(sums);
#pragma unroll
    for (int chunk = 0; chunk < kStageChunks; ++chunk) warpgroup_keep(a[chunk]);
    __syncwarp();  // all lanes have read their weights
    if (lane == 0) barrier_arrive(shared.emptied(turn.stage));
    turn = ahead;
  }
}

template <class T>
QK_DEVICE void multiply_tiles(const ConvArgs& a, const Tiles& tiles, const ConvMemory<T>& shared) {
  constexpr int kThreads = T::kConsumers * kWarpgroup;
  const int chunks = static_cast<int>(a.shape.k_padded / kCudaChunk);
  const int row = threadIdx.x / kWarpgroup % T::kAcross * 64 +
                  threadIdx.x % kWarpgroup / kWarp * kLanes + threadIdx.x % kWarp / 4;
  Turn turn;
  int64_t known = -1;  // the first packed row of the tables
  each_tile<T>(tiles, [&](int64_t first_row, int64_t pixel) {
    if (first_row != known || a.codes != nullptr) {
      fill_tables(a, shared, first_row * kLanes, pixel, !a.symmetric);
      known = first_row;
    }
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
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_warpgroups_kernel(const ConvArgs a, const Tiles tiles, bool borders) {
  if constexpr (QK_SM90A) {
    const ConvMemory<T> shared{shared_memory<uint8_t>()};
    if (threadIdx.x == 0) {
      for (int i = 0; i < T::kStages; ++i) {
        // Each thread for its pixels, each warp for its weights.
        barrier_init(shared.filled(i), T::kStageProducers * (kWarpgroup + kWarpgroup / kWarp));
        barrier_init(shared.emptied(i), T::kConsumers * (kWarpgroup / kWarp));
      }
      barrier_init_fence();
    }
    fill_chunks(a, tiles, shared.chunks(), shared.weight_pieces());
    // The kernel before this one may write all that is read from here on; the next one may set up
    // its blocks where this one's end.
    wait_for_previous();
    let_next_begin();
    if (threadIdx.x == kWarp) *shared.results() = load_conv_results(a);
    __syncthreads();
    if (threadIdx.x < T::kConsumers * kWarpgroup) {
      take_registers<kConsumerRegisters>();
      multiply_tiles<T>(a, tiles, shared);
    } else {
      give_registers<kProducerRegisters>();
      gather_tiles<T>(a, tiles, shared, borders);
    }
  }
}

template <class T>
void launch_as(const ConvArgs& a, bool borders, Stream stream) {
  static_assert(registers_suffice(T::kThreads * T::kBlocks, T::kConsumers * kWarpgroup * T::kBlocks,
                                  kConsumerRegisters, kProducerRegisters));
  static_assert(T::kBlocks * (ConvMemory<T>::kBytes + 1024) <= 228 * 1024);
  const int stages = static_cast<int>(round_up(a.shape.k_padded, kPieceK) / kPieceK);
  const Tiles tiles{blocks_for(a.out_channels, T::kFeatures),
                    blocks_for(a.batch * a.pixels(), T::kPixels), stages,
                    a.group_channels % kPieceK == 0 ? static_cast<int>(a.taps()) : 1};
  const unsigned blocks =
      min(tiles.features * tiles.pixels, static_cast<unsigned>(multiprocessors() * T::kBlocks));
  launch_with({.overlaps = true}, conv_warpgroups_kernel<T>, blocks, T::kThreads,
              ConvMemory<T>::kBytes, stream, a, tiles, borders);
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
