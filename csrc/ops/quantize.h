// What the quantizers of both devices share, and how a device runs them.
#pragma once

#include "ops/groups.h"

namespace qkernels {

inline QuantizeArgs quantize_args(const Cut& cut, const Tensor& x, DType x_type, Format format) {
  QuantizeArgs a{};
  a.x = x.const_data_ptr();
  a.x_type = x_type;
  a.cols = cut.cols;
  a.groups = cut.groups;
  a.group_size = cut.group_size;
  a.row_bytes = storage_bytes(format, cut.cols);
  a.format = format;
  a.shared_scale = cut.per_tensor;
  return a;
}

inline Shape zero_shape(const Cut& cut, bool symmetric) { return symmetric ? Shape{0} : cut.scale; }

inline void check_out(const char* op, const char* name, const Tensor& t, const Shape& shape,
                      ScalarType type) {
  check_dtype(op, name, t, type);
  check_shape(op, name, t, shape);
  if (!t.is_contiguous()) {
    fail(op, name, " must be contiguous to be written to; pass a contiguous tensor");
  }
}

// `cut` and the arguments are checked and complete.
void run_quantize(const Cut& cut, const QuantizeArgs& args);
void run_quantize_with(const Cut& cut, const QuantizeArgs& args);
void run_dequantize(const Cut& cut, const DequantizeArgs& args);

}  // namespace qkernels
