// Storage layout to packed rows and back. Byte shuffles: no ISA needs its own.
#include <cstring>

#include "cpu/kernels.h"

namespace qkernels {
namespace {

void set_code(uint8_t* row, Format format, int64_t kp, int lane, int code) {
  uint8_t* byte = row + code_offset(format, kp, lane);
  if (info(format).bits == 8) {
    *byte = static_cast<uint8_t>(code);
  } else {
    *byte = static_cast<uint8_t>(*byte | code << code_shift(kp));
  }
}

void set_int32(uint8_t* at, int64_t i, int32_t value) {
  std::memcpy(at + i * 4, &value, 4);
}

void pack_lane(const PackArgs& a, int64_t n, uint8_t* row) {
  const BlockShape& s = a.shape;
  const Format format = a.layout.format;
  const int lane = static_cast<int>(n % kLanes);
  const uint8_t* codes = static_cast<const uint8_t*>(a.data) + n * a.row_bytes;
  const int64_t scale_bytes = bytes_of(a.layout.scale);
  float weight_sum = 0.0f;
  for (int64_t g = 0; g < s.groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < s.group_length(g); ++i) {
      const int code = load_code(codes, format, s.group_begin(g) + i);
      set_code(row, format, s.padded_begin(g) + i, lane, code);
      sum += code;
    }
    const int64_t at = g * kLanes + lane;
    std::memcpy(row + s.scales + at * scale_bytes,
                static_cast<const uint8_t*>(a.scale) + (n * s.groups + g) * scale_bytes,
                static_cast<size_t>(scale_bytes));
    int zero = symmetric_zero(format);
    if (!a.layout.symmetric) {
      zero = load_zero_point(a.zero_point, format, n * s.groups + g);
      row[s.zeros + at] = static_cast<uint8_t>(zero);
    }
    if (format == Format::int8) set_int32(row + s.sums, at, sum);
    const int64_t exact = sum - static_cast<int64_t>(zero) * s.group_length(g);
    weight_sum = std::fma(static_cast<float>(exact), load_float(a.scale, a.layout.scale, n * s.groups + g),
                          weight_sum);
  }
  if (format != Format::nf4) std::memcpy(row + s.bias + lane * 4, &weight_sum, 4);
}

}  // namespace

void pack_blocks(const PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* row = a.packed + block * a.shape.bytes;
    std::memset(row, 0, static_cast<size_t>(a.shape.bytes));
    for (int64_t n = block * kLanes; n < (block + 1) * kLanes && n < a.n; ++n) pack_lane(a, n, row);
  }
}

void unpack_blocks(const UnpackArgs& a, int64_t begin, int64_t end) {
  const BlockShape& s = a.shape;
  const int64_t scale_bytes = bytes_of(a.layout.scale);
  for (int64_t n = begin * kLanes; n < end * kLanes && n < a.n; ++n) {
    const uint8_t* row = a.packed + n / kLanes * s.bytes;
    const int lane = static_cast<int>(n % kLanes);
    uint8_t* codes = static_cast<uint8_t*>(a.data) + n * a.row_bytes;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t i = 0; i < s.group_length(g); ++i) {
        store_code(codes, a.layout.format, s.group_begin(g) + i,
                   packed_code(row, a.layout.format, s.padded_begin(g) + i, lane));
      }
      const int64_t at = g * kLanes + lane;
      std::memcpy(static_cast<uint8_t*>(a.scale) + (n * s.groups + g) * scale_bytes,
                  row + s.scales + at * scale_bytes, static_cast<size_t>(scale_bytes));
      if (!a.layout.symmetric) {
        static_cast<uint8_t*>(a.zero_point)[n * s.groups + g] = row[s.zeros + at];
      }
    }
  }
}

void pack_int8_columns(const int8_t* b, int64_t stride_k, int64_t stride_n, int64_t n,
                       const BlockShape& shape, uint8_t* packed, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* row = packed + block * shape.bytes;
    std::memset(row, 0, static_cast<size_t>(shape.bytes));
    int32_t sums[kLanes] = {};
    const int lanes = static_cast<int>(n - block * kLanes < kLanes ? n - block * kLanes : kLanes);
    for (int64_t k = 0; k < shape.k; ++k) {
      const int8_t* source = b + k * stride_k + block * kLanes * stride_n;
      for (int lane = 0; lane < lanes; ++lane) {
        const int8_t code = source[lane * stride_n];
        row[code_offset(Format::int8, k, lane)] = static_cast<uint8_t>(code);
        sums[lane] += code;
      }
    }
    std::memcpy(row + shape.sums, sums, sizeof(sums));
  }
}

}  // namespace qkernels
