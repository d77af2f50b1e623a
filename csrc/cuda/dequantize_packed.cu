// dequantize_packed: a packed weight as the matrix of floats that it stands for, in one pass.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/packed.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Groups of whole chunks ---------------------------------------------------------------------
// Padded k are then k. A warp takes so many chunks of 32 k, one behind the other, of 16 rows of the
// matrix. A thread has the eights of two rows in them, as in a product's fragment; four threads
// side by side write two whole sectors of a row.

constexpr int kWarpChunks = 8;

struct Chunks {
  int64_t warps;   // of all
  uint32_t parts;  // warps for the same 16 rows
  int first, end;  // units of a packed row
  int group_chunks;
};

// Of a row and a group. `shifts` are what takes the codes' place in a float away again.
template <Format kFormat>
struct Decoder {
  static constexpr int kShifts = kFormat == Format::int4 ? 4 : kFormat == Format::int8 ? 1 : 0;
  float scale;
  float shifts[kShifts + 1];

  QK_DEVICE void load(const uint8_t* row, const DequantizePackedArgs& a, int group, int lane) {
    const int at = group * kLanes + lane;
    const uint8_t* scales = row + a.shape.scales;
    if (a.layout.scale == DType::f32) {
      scale = reinterpret_cast<const float*>(scales)[at];
    } else {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(scales)[at];
      scale = a.layout.scale == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
    if constexpr (kFormat != Format::nf4) {
      int zero = symmetric_zero(kFormat);
      if (!a.layout.symmetric) zero = load_zero_point(row + a.shape.zeros, kFormat, at);
      const float lowest = code_value(0, kFormat, zero);
#pragma unroll
      for (int i = 0; i < kShifts; ++i) {
        shifts[i] = kFormat == Format::int4 ? lowest - static_cast<float>(1 << (19 - 4 * i))
                                            : lowest - static_cast<float>((1 << 23) + 128);
      }
    }
  }

  // Eight numbers, as decode() gives them. `words` are as they are packed. `level` is that of nf4
  // with the number of the lane, 16 lanes further again.
  QK_DEVICE void decode_eight(float (&y)[kEight], const uint32_t (&words)[2], float level) const {
    constexpr uint32_t kExponent = 0x4b000000;  // of 2^23: the lowest bits are an integer
    // Nibbles 1 to 4, and once turned 5, 6, 7 and 0, have places in a float whose lowest bits leave
    // room for the eighths of a zero point.
    const uint32_t turned = prmt(words[0], words[0], 0x1032);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      float value = 0.0f;
      if constexpr (kFormat == Format::int8) {
        const uint32_t code = words[i / 4] ^ 0x80808080;
        value = bit_cast<float>(prmt(code, kExponent, 0x7540 + i % 4)) + shifts[0];
      } else {
        const int nibble = i % 2 * 4 + i / 2;  // even k in the lower half
        if constexpr (kFormat == Format::int4) {
          constexpr float kStep[] = {0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f};
          const uint32_t w = nibble >= 1 && nibble <= 4 ? words[0] : turned;
          const int place = (nibble + 3) % 4;
          // Exact: 2^(19 - 4 * place) + code.
          const uint32_t bits = lop3<0xea>(w, 0xf0u << 4 * place, kExponent);
          value = std::fma(bit_cast<float>(bits), kStep[place], shifts[place]);
        } else {
          value = shuffle(level, static_cast<int>(words[0] >> 4 * nibble));
        }
      }
      y[i] = value * scale;
    }
  }
};

template <Format kFormat, DType kType>
__global__ void __launch_bounds__(kThreads)
    dequantize_packed_kernel(const DequantizePackedArgs a, const Chunks c) {
  constexpr int kChunks = info(kFormat).bits == 8 ? 1 : 2, kUnits = kWarpChunks / kChunks;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (warp >= c.warps) return;
  const uint32_t block = static_cast<uint32_t>(warp) / c.parts;
  const int unit =
      c.first + static_cast<int>(static_cast<uint32_t>(warp) - block * c.parts) * kUnits;
  const uint8_t* row = a.packed + block * a.shape.bytes;
  uint4 held[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int at = min(unit + u, c.end - 1);
    held[u] = load_stream_128(row + static_cast<int64_t>(at) * kCudaUnit + lane * 16);
  }

  const uint32_t blocks = static_cast<uint32_t>((a.n + kLanes - 1) / kLanes);
  const uint32_t matrix = block / blocks, first = (block - matrix * blocks) * kLanes + g;
  const int64_t width = a.k_end - a.k_begin;
  const bool exist[2] = {first < a.n, first + 8 < a.n};
  // Of the thread's eight in a chunk, from k_begin.
  const int column = unit * kChunks * kCudaChunk + t * kEight - static_cast<int>(a.k_begin);
  const int64_t to = (matrix * a.n + first) * width + column;

  const int last = static_cast<int>(a.shape.groups - 1);
  int group = min(unit * kChunks / c.group_chunks, last);
  int left = (group + 1) * c.group_chunks - unit * kChunks;
  const float level = kFormat == Format::nf4 ? nf4_level(lane % 16) : 0.0f;
  Decoder<kFormat> decoders[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) decoders[h].load(row, a, group, g + 8 * h);
#pragma unroll
  for (int i = 0; i < kWarpChunks; ++i) {
    if (left == 0) {
      left = c.group_chunks;
      group = min(group + 1, last);
#pragma unroll
      for (int h = 0; h < 2; ++h) decoders[h].load(row, a, group, g + 8 * h);
    }
    --left;
    const uint4 v = held[i / kChunks];
    const int k = column + i * kCudaChunk;
    const bool inside = static_cast<uint32_t>(k) < static_cast<uint32_t>(width);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[2] = {h == 0 ? v.x : v.z, h == 0 ? v.y : v.w};
      if (kChunks == 2) words[0] = i % 2 == 0 ? (h == 0 ? v.x : v.y) : (h == 0 ? v.z : v.w);
      float y[kEight];
      decoders[h].decode_eight(y, words, level);
      if (inside && exist[h]) {
        store_eight<kType>(a.y, to + h * 8 * width + i * kCudaChunk, y);
      }
    }
  }
}

// ---- Any groups ---------------------------------------------------------------------------------
// A thread takes 16 bytes, and writes what of their eights is not padding element by element.

constexpr int kUnitVectors = kCudaUnit / 16;

// The vectors of a packed row that hold the columns.
struct Span {
  int64_t first, count;
};

template <Format kFormat, DType kType>
__global__ void __launch_bounds__(kThreads)
    dequantize_padded_kernel(const DequantizePackedArgs a, Span span, int64_t vectors) {
  constexpr int kEights = 16 / kEightBytes<kFormat>, kWords = 4 / kEights;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const BlockShape& s = a.shape;
  const int64_t block = divide(i, span.count), vector = span.first + i - block * span.count;
  const int64_t blocks = (a.n + kLanes - 1) / kLanes, matrix = divide(block, blocks);
  const uint8_t* row = a.packed + block * s.bytes;
  const uint4 v = load_128(row + vector * 16);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const EightPlace place = eight_in_memory<kFormat>(vector * kEights + j);
    const int64_t n = (block - matrix * blocks) * kLanes + place.lane;
    const int64_t group = min(divide(place.kp, s.group_padded), s.groups - 1);
    const int64_t offset = place.kp - s.padded_begin(group);
    const int64_t left = s.group_length(group) - offset;
    if (n >= a.n || left <= 0) continue;  // what fills up blocks and groups
    EightCodes codes;
    codes.words[0] = kWords == 2 ? words[j * kWords] : swap_nibbles(swap_bytes(words[j * kWords]));
    codes.words[1] = kWords == 2 ? words[j * kWords + 1] : 0;
    const float scale = packed_scale(row, a.layout, s, group, place.lane);
    const int zero = packed_zero<kFormat>(row, a.layout, s, group, place.lane);
    float y[kEight];
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      y[e] = decode(code_of<kFormat>(codes, e), kFormat, scale, zero);
    }
    const int64_t k = s.group_begin(group) + offset, width = a.k_end - a.k_begin;
    const int64_t at = (matrix * a.n + n) * width + k - a.k_begin;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (e < left && k + e >= a.k_begin && k + e < a.k_end) {
        store_element<kType>(a.y, at + e, y[e]);
      }
    }
  }
}

Span span_of(const DequantizePackedArgs& a) {
  const BlockShape& s = a.shape;
  const int64_t unit = kUnitVectors * 16 * 8 / (kLanes * info(a.layout.format).bits);  // of k
  const auto padded = [&](int64_t k) {
    const int64_t group = k / s.group_size;
    return s.padded_begin(group) + k - s.group_begin(group);
  };
  const int64_t first = padded(a.k_begin) / unit, last = padded(a.k_end - 1) / unit;
  return {first * kUnitVectors, (last - first + 1) * kUnitVectors};
}

}  // namespace

void dequantize_packed(const DequantizePackedArgs& a, Stream stream) {
  if (a.matrices == 0 || a.n == 0 || a.k_begin == a.k_end) return;
  const BlockShape& s = a.shape;
  const Span span = span_of(a);
  const int64_t blocks = a.matrices * ((a.n + kLanes - 1) / kLanes);
  const bool chunks = reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && a.k_begin % kEight == 0 &&
                      a.k_end % kEight == 0 && s.k_padded <= INT32_MAX - kCudaChunk &&
                      (s.groups == 1 || s.group_size == s.group_padded);
  for_packed(a.layout.format, [&](auto format) {
    for_float(a.y_type, [&](auto type) {
      constexpr Format kFormat = decltype(format)::value;
      constexpr DType kType = decltype(type)::value;
      if (chunks) {
        constexpr int kUnits = info(kFormat).bits == 8 ? kWarpChunks : kWarpChunks / 2;
        Chunks c{};
        c.first = static_cast<int>(span.first / kUnitVectors);
        c.end = static_cast<int>((span.first + span.count) / kUnitVectors);
        c.parts = blocks_for(c.end - c.first, kUnits);
        c.warps = blocks * c.parts;
        c.group_chunks = static_cast<int>(s.group_padded / kCudaChunk);
        launch(dequantize_packed_kernel<kFormat, kType>, blocks_for(c.warps, kThreads / kWarp),
               kThreads, 0, stream, a, c);
      } else {
        const int64_t vectors = blocks * span.count;
        launch(dequantize_padded_kernel<kFormat, kType>, blocks_for(vectors, kThreads), kThreads, 0,
               stream, a, span, vectors);
      }
    });
  });
}

}  // namespace qkernels::cuda
