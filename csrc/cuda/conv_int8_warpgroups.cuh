// What conv by products of warpgroups keeps in shared memory, and its way from sums to y.
//
// Shared memory: stages of [pixels | weights], the pixels as `matrix_in_shared` wants them, the
// weights as they are packed; then barriers, tables, and for each warpgroup sums on their way to
// other threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/conv_int8.cuh"
#include "cuda/conv_int8.h"
#include "cuda/warpgroups.cuh"

namespace qkernels::cuda {

// Of codes or of 16 bits for 64 outputs. stmatrix writes 16 bytes of eight pixels at once.
template <int kElement>
inline constexpr int kPackedPitch = 64 * kElement + 16;

inline constexpr int kStageChunks = kPieceK / kCudaChunk;

// 32 k of all pixels, which belong to one tap.
struct ConvChunk {
  int32_t offset;  // from a pixel's corner, in pieces of 32 codes
  uint32_t tap;    // its bit in ConvWindow::taps; 0 in the weight's padding
};

// A pixel of the tile.
struct ConvCorner {
  int32_t at;     // in the image, in pieces of 32 codes
  uint32_t taps;  // ConvWindow::taps; none past the last pixel
};

template <class T>
struct ConvMemory {
  static constexpr int kStage = T::kPixelBytes + T::kWeightBytes;
  static constexpr int kBarriers = T::kStages * kStage;
  static constexpr int kChunks = kBarriers + 2 * 8 * T::kStages;
  static constexpr int kWeightPieces =
      kChunks + kMostConvChunks * static_cast<int>(sizeof(ConvChunk));
  static constexpr int kCorners = kWeightPieces + kMostConvChunks / kStageChunks * 4;
  static constexpr int kImages =
      kCorners + T::kProducers * T::kOwnPixels * static_cast<int>(sizeof(ConvCorner));
  static constexpr int kFeatures = kImages + T::kPixels * 8;
  static constexpr int kResults = kFeatures + T::kFeatures * 12;
  static constexpr int kOutputs = kResults + 48;
  // Words of a round, or twice a round in 16 bits.
  static constexpr int kOutputBytes =
      std::max(kWordColumns * kWordPitch * 4, 2 * kWordColumns * kPackedPitch<2>);
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
  QK_DEVICE ConvChunk* chunks() const { return reinterpret_cast<ConvChunk*>(at + kChunks); }
  // Of each stage of a tile: which piece of 128 k of the weight.
  QK_DEVICE int* weight_pieces() const { return reinterpret_cast<int*>(at + kWeightPieces); }
  QK_DEVICE ConvCorner* corners() const { return reinterpret_cast<ConvCorner*>(at + kCorners); }
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

QK_DEVICE int border_code(const ConvArgs& a) {
  return a.x_codes.device_zero == nullptr ? 0 : *a.x_codes.device_zero;
}

template <class T>
using WarpgroupSums = int32_t[T::kColumns / 2];

// ---- Results ------------------------------------------------------------------------------------

// What results need of the tile's outputs and pixels. `counted`: the products find weight_sums.
template <class T>
QK_DEVICE void fill_tables(const ConvArgs& a, const ConvMemory<T>& shared, int64_t feature,
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
QK_DEVICE ConvOutputs outputs_at(const ConvMemory<T>& shared, int i, int64_t left) {
  return load_conv_outputs(shared.scales() + i, shared.biases() + i, shared.weight_sums() + i,
                           left);
}

// A thread's sums of a round.
using RoundSums = int32_t[kWordColumns / 2];

template <class T>
QK_DEVICE void select_round(RoundSums& mine, const WarpgroupSums<T>& sums, int round) {
  // Registers have no index.
#pragma unroll
  for (int r = 0; r < T::kColumns / kWordColumns; ++r) {
    if (r != round) continue;
#pragma unroll
    for (int i = 0; i < kWordColumns / 2; ++i) mine[i] = sums[r * kWordColumns / 2 + i];
  }
}

// Whether results become codes or 16 bits where their sums are, so that less goes by shared memory.
QK_DEVICE bool leaves_packed(const ConvArgs& a) {
  return a.y_channels_last && a.residual == nullptr && a.y_type != DType::f32 &&
         a.out_channels % kLanes == 0 &&
         (a.epilogue == Epilogue::none || a.epilogue == Epilogue::relu);
}

// What a thread's results need: of outputs g and g + 8 of its warp, and of its image if all images
// have the same codes.
struct PackedTables {
  float scale[2], bias[2], image_scale;
  int32_t weight_sum[2];
  int zero;
};

inline constexpr float kMostSum = 2147483648.0f, kMostFloat = std::numeric_limits<float>::max();

// Whether no result can be NaN, whatever its sum, so that none has to be looked at.
QK_DEVICE bool never_nan(const PackedTables& tables, float inverse) {
  bool never = true;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float most = std::fma(std::fabs(tables.image_scale),
                                kMostSum * std::fabs(tables.scale[i]), std::fabs(tables.bias[i]));
    never = never && most * std::fabs(inverse) <= kMostFloat;
  }
  return never;
}

// Results of kElement bytes, see leaves_packed. kPlain: all images have the same codes, and codes
// of results are never those of NaN.
template <class T, int kElement, bool kPlain>
QK_DEVICE void store_packed(const ConvArgs& a, const Encoder& encoder, const PackedTables& tables,
                            const WarpgroupSums<T>& sums, const ConvMemory<T>& shared,
                            int64_t feature, int64_t pixel) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, lane = thread % kWarp, t = lane % 4;
  const int begin = warpgroup / T::kAcross * T::kColumns;  // pixels of the tile before its own
  const int features = warpgroup % T::kAcross * 64;
  const int64_t left = a.batch * a.pixels() - pixel - begin;
  const bool relu = a.epilogue == Epilogue::relu, bf16 = a.y_type == DType::bf16;
  constexpr int kPitch = kPackedPitch<kElement>, kUnits = 4 * kElement;  // of 16 bytes
#pragma unroll
  for (int round = 0; round < T::kColumns / kWordColumns; ++round) {
    const int first = round * kWordColumns;
    if (first >= left) break;
    uint32_t packed[kElement][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float image_scale[2] = {tables.image_scale, tables.image_scale};
      int zero[2] = {tables.zero, tables.zero};
      if constexpr (!kPlain) {
        const uint4 v = load_shared_128(shared.images() + begin + first + j * 8 + 2 * t);
        image_scale[0] = bit_cast<float>(v.x), image_scale[1] = bit_cast<float>(v.z);
        zero[0] = static_cast<int>(v.y), zero[1] = static_cast<int>(v.w);
      }
      float y[4];
      uint32_t codes[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // pixel 2t + e % 2, output g + e / 2 * 8
        const int32_t sum = sums[(round * 4 + j) * 4 + e] - zero[e % 2] * tables.weight_sum[e / 2];
        y[e] = std::fma(image_scale[e % 2], static_cast<float>(sum) * tables.scale[e / 2],
                        tables.bias[e / 2]);
        if constexpr (kElement == 1) {
          const float quotient = y[e] * encoder.inverse;
          codes[e] =
              !kPlain && quotient != quotient ? encoder.zero : encode_low_byte(encoder, y[e]);
        } else if (relu) {
          y[e] = y[e] < 0.0f ? 0.0f : y[e];
        }
      }
      if constexpr (kElement == 1) {
        packed[0][j] = low_bytes(codes[0], codes[2], codes[1], codes[3]);
      } else {
        packed[0][j] = bf16 ? pack_bf16(y[0], y[1]) : pack_f16(y[0], y[1]);
        packed[1][j] = bf16 ? pack_bf16(y[2], y[3]) : pack_f16(y[2], y[3]);
      }
    }
    // Two buffers in turn: a barrier between the reads of one and its next writes.
    uint8_t* const buffer =
        reinterpret_cast<uint8_t*>(shared.outputs(warpgroup)) + round % 2 * (kWordColumns * kPitch);
#pragma unroll
    for (int i = 0; i < kElement; ++i) {
      stmatrix_x4_trans(buffer + lane * kPitch + (warp * kElement + i) * 16, packed[i]);
    }
    sync_some(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int i = thread; i < kWordColumns * kUnits; i += kWarpgroup) {
      const int at = i / kUnits, unit = i % kUnits;
      const int64_t o = feature + features + unit * (16 / kElement);
      if (first + at >= left || o >= a.out_channels) continue;
      uint4 v = load_shared_128(buffer + at * kPitch + unit * 16);
      if constexpr (kElement == 1) {  // outputs 0, 8, 1, 9, ...
        v = make_uint4(prmt(v.x, v.y, 0x6420), prmt(v.z, v.w, 0x6420), prmt(v.x, v.y, 0x7531),
                       prmt(v.z, v.w, 0x7531));
      }
      const int64_t to = (pixel + begin + first + at) * a.out_channels + o;
      store_128(static_cast<uint8_t*>(a.y) + to * kElement, v);
    }
  }
}

template <class T, int kElement>
QK_DEVICE void store_packed(const ConvArgs& a, Encoder encoder, const WarpgroupSums<T>& sums,
                            const ConvMemory<T>& shared, int64_t feature, int64_t pixel) {
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp;
  const int o = warpgroup % T::kAcross * 64 + warp * kLanes + threadIdx.x % kWarp / 4;
  const uint2 image = load_shared_64(shared.images());
  PackedTables tables{{}, {}, bit_cast<float>(image.x), {}, static_cast<int>(image.y)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tables.scale[i] = shared.scales()[o + i * 8], tables.bias[i] = shared.biases()[o + i * 8];
    tables.weight_sum[i] = shared.weight_sums()[o + i * 8];
  }
  if (a.epilogue == Epilogue::relu)
    encoder.low = std::fmax(encoder.low, 0.0f);  // scales are not < 0
  const bool plain = a.codes == nullptr && (kElement > 1 || never_nan(tables, encoder.inverse));
  if (warp_ballot(plain) == ~0u) {
    store_packed<T, kElement, true>(a, encoder, tables, sums, shared, feature, pixel);
  } else {
    store_packed<T, kElement, false>(a, encoder, tables, sums, shared, feature, pixel);
  }
}

// Hands the sums to the warpgroup by way of shared memory, kWordColumns at a time: body(words,
// first) for pixels from `first` of the warpgroup's on.
template <class T, class Body>
QK_DEVICE void exchange_sums(const WarpgroupSums<T>& sums, uint32_t* words, int64_t left,
                             const Body& body) {
  const int warpgroup = threadIdx.x / kWarpgroup;
#pragma unroll 1
  for (int round = 0; round < T::kColumns / kWordColumns; ++round) {
    if (round * kWordColumns >= left) break;
    RoundSums mine;
    select_round<T>(mine, sums, round);
    put_words(words, mine, 0, threadIdx.x % kWarpgroup);
    sync_some(1 + warpgroup, kWarpgroup);
    body(static_cast<const uint32_t*>(words), round * kWordColumns);
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
                          const WarpgroupSums<T>& sums, const ConvMemory<T>& shared,
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
  if (leaves_packed(a)) {
    if (a.y_type == DType::i8) {
      return store_packed<T, 1>(a, results.encoder, sums, shared, feature, pixel);
    }
    return store_packed<T, 2>(a, results.encoder, sums, shared, feature, pixel);
  }
  // Neighbouring threads store what lies side by side in y.
  const bool last = a.y_channels_last;
  exchange_sums<T>(sums, words, left, [&](const uint32_t* from, int first) {
    constexpr int kTogether = 2;
#pragma unroll 1
    for (int each = thread; each < kWordColumns * 16; each += kTogether * kWarpgroup) {
      int at[kTogether], o[kTogether];
      Ahead ahead[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int place = each + i * kWarpgroup;
        at[i] = last ? place / 16 : place % kWordColumns;
        o[i] = (last ? place % 16 : place / kWordColumns) * 4;
        const int64_t n = last ? 0 : divide(pixel + begin + first + at[i], a.pixels());
        ahead[i] = load(first + at[i], n, features + o[i],
                        count_of(a.out_channels - feature - features - o[i]));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const uint4 v = load_shared_128(from + at[i] * kWordPitch + o[i]);
        store(first + at[i],
              outputs_at(shared, features + o[i], a.out_channels - feature - features - o[i]),
              ahead[i], v);
      }
    }
  });
}

}  // namespace qkernels::cuda
