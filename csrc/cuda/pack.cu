// pack and unpack: codes between storage and the order in which a warp feeds the tensor cores.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/packed.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

// The code of value 0, or the one next to it: what fills up groups, rows and the lanes of the last
// block.
template <Format kFormat>
QK_DEVICE int padding_code(const PackArgs& a, int64_t n, int64_t group) {
  if (kFormat == Format::nf4) return 7;
  int zero = symmetric_zero(kFormat);
  if (!a.layout.symmetric) {
    if (n >= a.n) return 0;
    zero = given_zero_point<kFormat>(a.zero_point, n * a.shape.groups + group);
  }
  return zero_parts(zero, kFormat).whole;
}

// Codes of output n from padded k `kp` on, as they are packed.
template <Format kFormat>
QK_DEVICE EightCodes gather(const PackArgs& a, int64_t n, int64_t kp) {
  const BlockShape& s = a.shape;
  constexpr int kBits = info(kFormat).bits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  // What fills up the row belongs to the last group.
  int64_t group = kp / s.group_padded;
  if (group >= s.groups) group = s.groups - 1;
  const int64_t offset = kp - s.padded_begin(group);
  const int64_t left = s.group_length(group) - offset, k = s.group_begin(group) + offset;
  EightCodes codes{};
  const uint8_t* row = static_cast<const uint8_t*>(a.data) + n * a.row_bytes;
  const uint8_t* at = row + k * kBits / 8;
  if (n < a.n && left >= 8 && k * kBits % 8 == 0 &&
      reinterpret_cast<uintptr_t>(at) % kEightBytes<kFormat> == 0) {
    if constexpr (kBits == 8) {
      const uint2 v = load_64(at);
      codes = {{v.x, v.y}};
    } else {
      codes = {{load_32(at), 0}};
    }
  } else {
    const int padding = padding_code<kFormat>(a, n, group);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const int code = n < a.n && i < left ? load_code(row, kFormat, k + i) : padding;
      codes.words[i * kBits / 32] |= (static_cast<uint32_t>(code) & kMask) << i * kBits % 32;
    }
  }
  if constexpr (kBits == 4) codes.words[0] = swap_bytes(swap_nibbles(codes.words[0]));
  return codes;
}

// A thread writes 16 bytes: codes, or zeros where the scales and so on will be.
template <Format kFormat>
__global__ void __launch_bounds__(kThreads)
    pack_codes_kernel(const PackArgs a, int64_t vectors, int64_t row_vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const int64_t block = i / row_vectors, vector = i % row_vectors;
  uint32_t words[4] = {};
  if (vector * 16 < a.shape.scales) {
    constexpr int kEights = 16 / kEightBytes<kFormat>, kWords = 4 / kEights;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const EightPlace place = eight_in_memory<kFormat>(vector * kEights + j);
      const EightCodes codes = gather<kFormat>(a, block * kLanes + place.lane, place.kp);
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[j * kWords + w] = codes.words[w];
    }
  }
  store_128(a.packed + i * 16, make_uint4(words[0], words[1], words[2], words[3]));
}

// A warp writes what belongs to an output: scales, zero points and the sum of its weights, in the
// order that the CPU adds them.
template <Format kFormat>
__global__ void __launch_bounds__(kThreads) pack_scales_kernel(const PackArgs a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (n >= a.n) return;  // the whole warp
  const int lane = threadIdx.x % kWarp;
  const BlockShape& s = a.shape;
  const uint8_t* codes = static_cast<const uint8_t*>(a.data) + n * a.row_bytes;
  uint8_t* row = a.packed + n / kLanes * s.bytes;
  float weight_sum = 0.0f;
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t from = n * s.groups + g, to = g * kLanes + n % kLanes;
    int zero = symmetric_zero(kFormat);
    if (!a.layout.symmetric) zero = given_zero_point<kFormat>(a.zero_point, from);
    if (kFormat != Format::nf4) {
      int32_t sum = 0;
      for (int64_t i = lane; i < s.group_length(g); i += kWarp) {
        sum += load_code(codes, kFormat, s.group_begin(g) + i);
      }
      weight_sum = std::fma(value_sum(warp_sum(sum), s.group_length(g), kFormat, zero),
                            load_float(a.scale, a.layout.scale, from), weight_sum);
    }
    if (lane != 0) continue;
    // Bits, so that a NaN stays what it is.
    if (a.layout.scale == DType::f32) {
      reinterpret_cast<uint32_t*>(row + s.scales)[to] = static_cast<const uint32_t*>(a.scale)[from];
    } else {
      reinterpret_cast<uint16_t*>(row + s.scales)[to] = static_cast<const uint16_t*>(a.scale)[from];
    }
    if (!a.layout.symmetric) row[s.zeros + to] = static_cast<uint8_t>(zero);
  }
  if (kFormat != Format::nf4 && lane == 0) {
    reinterpret_cast<float*>(row + s.bias)[n % kLanes] = weight_sum;
  }
}

// A thread writes eight codes of a row in storage.
template <Format kFormat>
__global__ void __launch_bounds__(kThreads)
    unpack_codes_kernel(const UnpackArgs a, int64_t units, int64_t row_units) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  constexpr int kBits = info(kFormat).bits;
  const BlockShape& s = a.shape;
  const int64_t n = unit / row_units, k = unit % row_units * kEight;
  const int count = static_cast<int>(min(s.k - k, static_cast<int64_t>(kEight)));
  const uint8_t* row = a.packed + n / kLanes * s.bytes;
  const int lane = static_cast<int>(n % kLanes);
  int64_t group = k / s.group_size, offset = k - s.group_begin(group);
  EightCodes codes{};
  if (offset % kEight == 0 && offset + count <= s.group_length(group)) {
    codes = load_packed<kFormat>(row, s.padded_begin(group) + offset, lane);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i, ++offset) {
      if (i >= count) break;
      if (offset == s.group_length(group)) ++group, offset = 0;
      const int64_t kp = s.padded_begin(group) + offset;
      const EightCodes around = load_packed<kFormat>(row, kp / kEight * kEight, lane);
      const uint32_t code = code_of<kFormat>(around, static_cast<int>(kp % kEight));
      codes.words[i * kBits / 32] |= (code & ((1u << kBits) - 1)) << i * kBits % 32;
    }
  }
  uint8_t* to = static_cast<uint8_t*>(a.data) + n * a.row_bytes + k * kBits / 8;
  if (count == kEight && reinterpret_cast<uintptr_t>(to) % kEightBytes<kFormat> == 0) {
    if constexpr (kBits == 8) {
      store_64(to, make_uint2(codes.words[0], codes.words[1]));
    } else {
      *reinterpret_cast<uint32_t*>(to) = codes.words[0];
    }
    return;
  }
  if (kBits == 4 && count < kEight) codes.words[0] &= (1u << count * 4) - 1;
#pragma unroll
  for (int i = 0; i < kEightBytes<kFormat>; ++i) {
    if (i * 8 < count * kBits) to[i] = static_cast<uint8_t>(codes.words[i / 4] >> i % 4 * 8);
  }
}

__global__ void __launch_bounds__(kThreads) unpack_scales_kernel(const UnpackArgs a) {
  const int64_t to = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const BlockShape& s = a.shape;
  if (to >= a.n * s.groups) return;
  const int64_t n = to / s.groups, from = to % s.groups * kLanes + n % kLanes;
  const uint8_t* row = a.packed + n / kLanes * s.bytes;
  if (a.layout.scale == DType::f32) {
    static_cast<uint32_t*>(a.scale)[to] = reinterpret_cast<const uint32_t*>(row + s.scales)[from];
  } else {
    static_cast<uint16_t*>(a.scale)[to] = reinterpret_cast<const uint16_t*>(row + s.scales)[from];
  }
  if (!a.layout.symmetric) static_cast<uint8_t*>(a.zero_point)[to] = row[s.zeros + from];
}

}  // namespace

void pack(const PackArgs& a, Stream stream) {
  const int64_t blocks = (a.n + kLanes - 1) / kLanes, row_vectors = a.shape.bytes / 16;
  const dim3 vectors(blocks_for(blocks * row_vectors, kThreads));
  const dim3 outputs(blocks_for(a.n, kThreads / kWarp));
  for_packed(a.layout.format, [&](auto format) {
    constexpr Format kFormat = decltype(format)::value;
    launch(pack_codes_kernel<kFormat>, vectors, kThreads, 0, stream, a, blocks * row_vectors,
           row_vectors);
    launch(pack_scales_kernel<kFormat>, outputs, kThreads, 0, stream, a);
  });
}

void unpack(const UnpackArgs& a, Stream stream) {
  const int64_t row_units = (a.shape.k + kEight - 1) / kEight;
  for_packed(a.layout.format, [&](auto format) {
    launch(unpack_codes_kernel<decltype(format)::value>,
           dim3(blocks_for(a.n * row_units, kThreads)), kThreads, 0, stream, a, a.n * row_units,
           row_units);
  });
  launch(unpack_scales_kernel, dim3(blocks_for(a.n * a.shape.groups, kThreads)), kThreads, 0,
         stream, a);
}

}  // namespace qkernels::cuda
