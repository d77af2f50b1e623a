// The tile of an int8 product: weights on the m16 side of mma.m16n8k32, tokens (or pixels) on n8.
// A block multiplies kFeatures outputs with kTokens tokens, 64 k at a time, which are a stage.
// Copies of the next stages are under way meanwhile.
//
// Shared memory, per stage:
//   weights  [kFeatures / 16][unit or pair of units], as they are packed. A warp reads 512
//            consecutive bytes, 16 a thread: no bank twice in a quarter of it.
//   tokens   [kTokens][64], the halves of every second pair of rows swapped. Half a warp reads 8
//            bytes a thread: of four tokens the same 32 k, which begin at bytes 0, 64, 32 and 96 of
//            the 128 that the banks hold.
#pragma once

#include "cuda/int8.cuh"
#include "cuda/tile.h"

namespace qkernels::cuda {

// Bytes of a stage of 16 outputs.
template <Format kFormat>
inline constexpr int kRowBytes = kStageK * kLanes * (kFormat == Format::int8 ? 8 : 4) / 8;

template <class T, Format kFormat>
inline constexpr int kStageBytes = T::kFeatures / kLanes * kRowBytes<kFormat> + T::kTokenBytes;

template <class T, Format kFormat>
inline constexpr int64_t kSharedBytes = T::kStages * kStageBytes<T, kFormat>;

// Where a thread's part of the block's tile lies.
template <class T>
struct Corner {
  int row, token;  // first packed row and token of its warp, in the tile
  int g, t;        // features g and g + 8 of each packed row, tokens 2t and 2t + 1 of each eight
};

template <class T>
QK_DEVICE Corner<T> corner() {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return {warp % T::kAcross * T::kRows, warp / T::kAcross * T::kColumns * 8, lane / 4, lane % 4};
}

template <class T>
using Sums = int32_t[T::kRows][T::kColumns][4];

// ---- Copies -------------------------------------------------------------------------------------

// Packed rows of the weight from `first` on.
template <class T, Format kFormat>
struct WeightStages {
  static constexpr int kPieces = kRowBytes<kFormat> / 16;  // of 16 bytes, of a packed row
  static constexpr int kCopies = T::kFeatures / kLanes * kPieces / T::kThreads;
  static constexpr int kStep = T::kThreads / kPieces;  // packed rows from a copy to the next
  static_assert(kCopies * T::kThreads == T::kFeatures / kLanes * kPieces);

  const uint8_t* from;
  int64_t step;   // bytes from a copy to the next
  int rows;       // that exist, from the thread's first on
  int64_t codes;  // bytes of a row's codes that are left from the thread's piece of stage 0 on

  QK_DEVICE WeightStages(const uint8_t* packed, const BlockShape& shape, int64_t first,
                         int64_t blocks) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces * 16;
    from = packed + (first + row) * shape.bytes + piece;
    step = kStep * shape.bytes;
    rows = static_cast<int>(min(blocks - first - row, int64_t{T::kFeatures}));
    codes = shape.k_padded * kRowBytes<kFormat> / kStageK - piece;
  }

  QK_DEVICE void copy(uint8_t* to, int stage) const {
    const int64_t offset = static_cast<int64_t>(stage) * kRowBytes<kFormat>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = i * kStep < rows && offset < codes;
      cp_async<16>(to + (threadIdx.x + i * T::kThreads) * 16, from + i * step + offset,
                   there ? 16 : 0);
    }
  }
};

// Byte of a stage where the 16 bytes `piece` of a token's 64 lie.
QK_DEVICE int token_offset(int token, int piece) {
  return token * kStageK + ((piece >> 1) ^ (token >> 1 & 1)) * kCudaChunk + (piece & 1) * 16;
}

// Rows of codes, `pitch` bytes apart.
template <class T>
struct PanelStages {
  static constexpr int kPieces = kStageK / 16;
  static constexpr int kCopies = T::kTokens * kPieces / T::kThreads;
  static constexpr int kStep = T::kThreads / kPieces;  // tokens from a copy to the next
  static_assert(kCopies * T::kThreads == T::kTokens * kPieces);

  const uint8_t* from;
  int64_t step;  // bytes from a copy to the next
  int tokens;    // that exist, from the thread's first on
  int to;

  QK_DEVICE PanelStages(const uint8_t* panel, int64_t pitch, int64_t first, int64_t count) {
    const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    from = panel + (first + token) * pitch + piece * 16;
    step = kStep * pitch;
    tokens = static_cast<int>(min(count - first - token, int64_t{T::kTokens}));
    // kStep is a multiple of four tokens, so a thread's copies are swapped alike.
    static_assert(kStep % 4 == 0);
    to = token_offset(token, piece);
  }

  QK_DEVICE void copy(uint8_t* stage_memory, int stage) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async<16>(stage_memory + to + i * kStep * kStageK,
                   from + i * step + static_cast<int64_t>(stage) * kStageK,
                   i * kStep < tokens ? 16 : 0);
    }
  }
};

// ---- The product --------------------------------------------------------------------------------

// The products of one stage. after(half) follows each of its two chunks.
template <class T, Format kFormat, class After>
QK_DEVICE void multiply_stage(Sums<T>& sums, const uint8_t* weights, const uint8_t* tokens,
                              uint32_t zero, const After& after) {
  const Corner<T> c = corner<T>();
  const uint8_t* from = weights + c.row * kRowBytes<kFormat> + threadIdx.x % kWarp * 16;
  uint4 codes[T::kRows];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[T::kRows][4];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      const int at = i * kRowBytes<kFormat>;
      if (kFormat == Format::int8) codes[i] = load_shared_128(from + at + half * kCudaUnit);
      if (kFormat == Format::int4 && half == 0) codes[i] = load_shared_128(from + at);
      weight_fragment<kFormat>(a[i], codes[i], half, zero);
    }
#pragma unroll
    for (int j = 0; j < T::kColumns; ++j) {
      const int token = c.token + j * 8 + c.g;
      const uint2 v =
          load_shared_64(tokens + token_offset(token, half * 2 + c.t / 2) + c.t % 2 * 8);
      const uint32_t b[2] = {v.x, v.y};
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) mma_s8(sums[i][j], a[i], b);
    }
    after();
  }
}

// Chunks of a group of k; of what follows the last group, more than there are.
QK_DEVICE int chunks_of(const BlockShape& s, int64_t group) {
  return group < s.groups ? static_cast<int>(s.padded_length(group) / kCudaChunk) : INT32_MAX;
}

// sums += the product over stages [begin, end). All threads may write to shared memory afterwards.
template <class T, Format kFormat, class Weights, class Tokens, class After>
QK_DEVICE void multiply(Sums<T>& sums, const Weights& weights, Tokens& tokens, int begin, int end,
                        uint32_t zero, const After& after) {
  uint8_t* const shared = shared_memory<uint8_t>();
  constexpr int kBytes = kStageBytes<T, kFormat>;
  constexpr int kWeightBytes = kBytes - T::kTokenBytes;
  int to = 0, from = 0;  // bytes of the stage to be filled, and of the one that is multiplied
  const auto copy = [&](int stage) {
    if (stage < end) {
      weights.copy(shared + to, stage);
      tokens.copy(shared + to + kWeightBytes, stage);
    }
    cp_async_commit();
    to = to + kBytes == T::kStages * kBytes ? 0 : to + kBytes;
  };
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) copy(begin + i);
#pragma unroll 1
  for (int stage = begin; stage < end; ++stage) {
    // This stage has landed, for all threads; and all have left the one before, which is filled
    // next.
    cp_async_wait<T::kStages - 2>();
    __syncthreads();
    copy(stage + T::kStages - 1);
    multiply_stage<T, kFormat>(sums, shared + from, shared + from + kWeightBytes, zero, after);
    from = from + kBytes == T::kStages * kBytes ? 0 : from + kBytes;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Hands the results, of 32 bits each, to the whole block: body(shared, first) for kRound tokens
// from `first` on, whose words are kRoundPitch apart. That is kFeatures + 4, so that the four
// tokens that a warp writes at once, eight words each, lie in different banks.
template <class T, class Word, class Body>
QK_DEVICE void exchange_words(const Word (&words)[T::kRows][T::kColumns][4], const Body& body) {
  uint32_t* const shared = shared_memory<uint32_t>();
  const Corner<T> c = corner<T>();
  static_assert(T::kRound * T::kRoundPitch * 4 <= kSharedBytes<T, Format::int4>);
#pragma unroll 1
  for (int round = 0; round < T::kTokens; round += T::kRound) {
    if (c.token >= round && c.token < round + T::kRound) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < T::kColumns; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int token = c.token - round + j * 8 + c.t * 2 + e % 2;
            const int feature = (c.row + i) * kLanes + c.g + e / 2 * 8;
            shared[token * T::kRoundPitch + feature] = bit_cast<uint32_t>(words[i][j][e]);
          }
        }
      }
    }
    __syncthreads();
    body(static_cast<const uint32_t*>(shared), round);
    __syncthreads();
  }
}

// The same for four consecutive features of a token at a time: body(token, load(token), words). A
// thread always gets those from exchanged_feature() on. Tokens are taken kTogether at a time, so
// that what `load` reads of one does not wait for what is stored of another.
template <class T, class Word, class Load, class Body>
QK_DEVICE void exchange(const Word (&words)[T::kRows][T::kColumns][4], const Load& load,
                        const Body& body) {
  constexpr int kFours = T::kFeatures / 4, kStep = T::kThreads / kFours, kTogether = 4;
  static_assert(T::kRound % (kStep * kTogether) == 0);
  exchange_words<T>(words, [&](const uint32_t* shared, int first) {
    const uint32_t* const from = shared + threadIdx.x % kFours * 4;
#pragma unroll 1
    for (int i = 0; i < T::kRound; i += kStep * kTogether) {
      const int token = i + threadIdx.x / kFours;
      decltype(load(0)) loaded[kTogether];
      uint4 v[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) loaded[j] = load(first + token + j * kStep);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        v[j] = load_shared_128(from + (token + j * kStep) * T::kRoundPitch);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const uint32_t four[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        body(first + token + j * kStep, loaded[j], four);
      }
    }
  });
}

// First feature of the tile that `exchange` gives a thread.
template <class T>
QK_DEVICE int exchanged_feature() {
  return threadIdx.x % (T::kFeatures / 4) * 4;
}

// Tiles of one block after the other: kBand tokens tiles, then the next features, so that blocks
// that run at the same time share both operands in L2.
struct TilePlace {
  int64_t features, tokens;  // tiles before this one
};

QK_DEVICE TilePlace tile_place(uint32_t tile, uint32_t feature_tiles, uint32_t token_tiles) {
  constexpr uint32_t kBand = 16;
  const uint32_t per_band = kBand * feature_tiles;
  const uint32_t band = tile / per_band, first = band * kBand;
  const uint32_t width = min(token_tiles - first, kBand);
  const uint32_t left = tile - band * per_band;
  return {left / width, first + left % width};
}

}  // namespace qkernels::cuda
