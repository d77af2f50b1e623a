// Reading the packed layout (core/format.h) eight codes at a time: consecutive padded k of an
// output feature, which begin at a multiple of 8 and lie side by side.
#pragma once

#include "cuda/ptx.cuh"

namespace qkernels::cuda {

// Bytes of eight codes.
template <Format kFormat>
inline constexpr int kEightBytes = info(kFormat).bits;

// Eight codes of storage, the first in the lowest bits, as two words of int8 or one of 4 bits.
struct EightCodes {
  uint32_t words[2];
};

// The nibbles of a word: 0 1 2 3 4 5 6 7 in storage, 0 2 4 6 1 3 5 7 packed. Each step swaps
// neighbours in the middle of four, so it is its own inverse.
QK_DEVICE uint32_t swap_nibbles(uint32_t x) {
  const uint32_t t = (x ^ x >> 4) & 0x00f000f0;
  return x ^ t ^ t << 4;
}
QK_DEVICE uint32_t swap_bytes(uint32_t x) { return prmt(x, x, 0x3120); }

template <Format kFormat>
QK_DEVICE EightCodes load_packed(const uint8_t* row, int64_t kp, int lane) {
  const uint8_t* at = row + cuda_code_offset(kFormat, kp, lane);
  if constexpr (info(kFormat).bits == 8) {
    const uint2 v = load_64(at);
    return {{v.x, v.y}};
  } else {
    return {{swap_nibbles(swap_bytes(load_32(at))), 0}};
  }
}

// Code i of them.
template <Format kFormat>
QK_DEVICE int code_of(const EightCodes& codes, int i) {
  if constexpr (info(kFormat).bits == 8) {
    // A choice, not an index: that would put the words into local memory where i is not a constant.
    return static_cast<int8_t>((i < 4 ? codes.words[0] : codes.words[1]) >> i % 4 * 8);
  } else {
    return static_cast<int>(codes.words[0] >> i * 4 & 15);
  }
}

// The eight that is number `i` of a row in memory, so that neighbouring threads read neighbouring
// bytes: cuda_code_offset(kFormat, kp, lane) is i * kEightBytes.
struct EightPlace {
  int64_t kp;
  int lane;
};
template <Format kFormat>
QK_DEVICE EightPlace eight_in_memory(int64_t i) {
  constexpr int kHalves = info(kFormat).bits == 8 ? 2 : 4;  // eights that a thread of a warp holds
  const int part = static_cast<int>(i % kHalves), thread = static_cast<int>(i / kHalves % kWarp);
  const int64_t chunk = i / (kHalves * kWarp) * (kHalves / 2) + part / 2;
  return {chunk * kCudaChunk + thread % 4 * 8, part % 2 * 8 + thread / 4};
}

QK_DEVICE float packed_scale(const uint8_t* row, const Layout& layout, const BlockShape& shape,
                             int64_t group, int lane) {
  return load_float(row + shape.scales, layout.scale, group * kLanes + lane);
}

template <Format kFormat>
QK_DEVICE int packed_zero(const uint8_t* row, const Layout& layout, const BlockShape& shape,
                          int64_t group, int lane) {
  if (layout.symmetric) return symmetric_zero(kFormat);
  return load_zero_point(row + shape.zeros, kFormat, group * kLanes + lane);
}

}  // namespace qkernels::cuda
