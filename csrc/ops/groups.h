// How the quantizers see a tensor: rows, cut into groups with a scale each.
#pragma once

#include "core/params.h"
#include "ops/checks.h"

namespace qkernels {

// Elements per thread below which starting another costs more than it gains.
inline constexpr int64_t kGrain = 32 * 1024;

// How a tensor is cut: `rows` rows of `cols`, `groups` scales in each; per tensor one for all.
struct Cut {
  int64_t rows, cols, groups, group_size;
  bool per_tensor;
  Shape data, scale;
};

inline Cut cut_of(const char* op, const Shape& shape, Format format,
                  std::optional<int64_t> group_size) {
  if (shape.empty()) {
    fail(op, "x must have at least one dimension, got a scalar; pass x.reshape(1)");
  }
  Cut cut;
  cut.cols = shape.back();
  cut.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) cut.rows *= shape[i];
  cut.per_tensor = !group_size;
  if (group_size) check_group_size(op, *group_size);
  const bool one_group = !group_size || *group_size == -1;
  cut.group_size = one_group ? cut.cols : std::min(*group_size, std::max<int64_t>(cut.cols, 1));
  cut.groups = one_group ? 1 : (cut.cols + cut.group_size - 1) / cut.group_size;
  cut.data = shape;
  if (info(format).bits == 4) cut.data.back() = storage_bytes(format, cut.cols);
  if (!cut.per_tensor) {
    cut.scale = shape;
    cut.scale.back() = cut.groups;
  }
  return cut;
}

inline Format check_symmetry(const char* op, int64_t format_code, bool symmetric) {
  const Format format = check_format(op, format_code);
  if (!symmetric && !info(format).has_zero_point) {
    fail(op, "format ", info(format).name, " has no zero point; pass symmetric=True");
  }
  return format;
}

// Scale and zero point as given by a caller; returned contiguous.
struct Given {
  Tensor scale;
  DType scale_type;
  std::optional<Tensor> zero_point;

  const Tensor* zero() const { return zero_point ? &*zero_point : nullptr; }
};

// `zero_type`: of zero points, if not that of the format.
inline Given check_given(const char* op, const Cut& cut, Format format, const Tensor& scale,
                         const std::optional<Tensor>& zero_point,
                         std::optional<ScalarType> zero_type = std::nullopt) {
  Given given{dense(scale), check_float(op, "scale", scale), std::nullopt};
  const bool fits = cut.per_tensor ? scale.numel() == 1 : shape_of(scale) == cut.scale;
  if (!fits) {
    fail(op, "scale must have ", cut.per_tensor ? "one element" : "shape " + text_of(cut.scale),
         " for this group_size, got ", shape_text(scale));
  }
  // quantize returns an empty zero point for a symmetric tensor; it means none here too.
  if (zero_point && zero_point->numel() != 0) {
    if (!info(format).has_zero_point) {
      fail(op, "format ", info(format).name, " has no zero point; pass zero_point=None");
    }
    check_dtype(op, "zero_point", *zero_point, zero_type.value_or(storage_type(format)));
    const bool matches =
        cut.per_tensor ? zero_point->numel() == 1 : shape_of(*zero_point) == cut.scale;
    if (!matches) {
      fail(op, "zero_point must have the shape of scale, ", shape_text(scale), ", got ",
           shape_text(*zero_point));
    }
    given.zero_point = dense(*zero_point);
    if (!zero_type) check_zero_points(op, *given.zero_point, format);
  }
  return given;
}

}  // namespace qkernels
