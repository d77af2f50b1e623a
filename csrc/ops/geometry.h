// Spatial dimensions as ops on images are given them, and the order of an image in memory.
#pragma once

#include <array>

#include "ops/checks.h"

namespace qkernels {

inline constexpr int64_t kLongest = 1 << 24;  // stride, dilation and padding
// Elements that are far more than memory holds; what sizes are computed from must not overflow.
inline constexpr double kMostElements = 0x1p44;

// A list with an entry for each spatial dimension, as the last entries of three; the first ones are
// `missing`.
inline std::array<int64_t, 3> spatial(const char* op, const char* name,
                                      const std::vector<int64_t>& given, int64_t dims,
                                      int64_t least, int64_t most, int64_t missing = 1) {
  if (static_cast<int64_t>(given.size()) != dims) {
    fail(op, name, " must have ", dims, " entries, one for each spatial dimension, got ",
         given.size());
  }
  std::array<int64_t, 3> result{missing, missing, missing};
  for (int64_t i = 0; i < dims; ++i) {
    if (given[i] < least || given[i] > most) {
      fail(op, name, " must be from ", least, " to ", most, ", got ", given[i]);
    }
    result[3 - dims + i] = given[i];
  }
  return result;
}

// Whether the channels of x lie innermost; x must be dense in one of the two orders.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.is_contiguous() || x.size(1) < 2) return false;
  int64_t expected = x.size(1);
  if (x.stride(1) != 1) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

inline Tensor empty_channels_last(const Shape& shape, ScalarType type) {
  Shape strides(shape.size());
  int64_t stride = 1;
  const auto take = [&](size_t dim) {
    strides[dim] = stride;
    stride *= shape[dim];
  };
  take(1);
  for (size_t dim = shape.size() - 1; dim >= 2; --dim) take(dim);
  take(0);
  return empty_on_device(shape, strides, type);
}

inline Tensor empty_in_order(const Shape& shape, ScalarType type, bool channels_last) {
  return channels_last ? empty_channels_last(shape, type) : empty_on_device(shape, type);
}

// x with its channels innermost, or not.
inline Tensor in_order(const Tensor& x, bool channels_last) {
  if (!channels_last) return dense(x);
  if (is_channels_last(x)) return x;
  Tensor copy = empty_channels_last(shape_of(x), x.scalar_type());
  return torch::stable::copy_(copy, x);
}

}  // namespace qkernels
