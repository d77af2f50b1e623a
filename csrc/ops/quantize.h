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

// What is written to must not be read, or written to by another name: both are contiguous.
inline void check_no_overlap(const char* op, const char* name, const Tensor& out,
                             std::initializer_list<const Tensor*> others) {
  const auto begin_of = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  const auto end_of = [&](const Tensor& t) {
    return begin_of(t) + static_cast<uintptr_t>(t.numel()) * t.element_size();
  };
  for (const Tensor* other : others) {
    if (other == nullptr || out.numel() == 0 || other->numel() == 0) continue;
    if (begin_of(out) < end_of(*other) && begin_of(*other) < end_of(out)) {
      fail(op, name, " shares memory with another tensor of the call; pass a tensor of its own");
    }
  }
}

// `cut` and the arguments are checked and complete.
void run_quantize(const Cut& cut, const QuantizeArgs& args);
void run_quantize_with(const Cut& cut, const QuantizeArgs& args);
void run_dequantize(const Cut& cut, const DequantizeArgs& args);

}  // namespace qkernels
