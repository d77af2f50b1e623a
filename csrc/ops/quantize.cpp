// quantize, quantize_with, dequantize and their out= forms: checks and allocation, for the CPU and
// for CUDA.
#include "ops/quantize.h"

namespace qkernels {
namespace {

void call_quantize(const char* op, const Tensor& x_any, Format format, const Cut& cut,
                   bool symmetric, const Tensor& data, const Tensor& scale,
                   const Tensor& zero_point) {
  const Tensor x = dense(x_any);
  check_no_overlap(op, "data", data, {&x, &scale, &zero_point});
  check_no_overlap(op, "scale", scale, {&x, &zero_point});
  check_no_overlap(op, "zero_point", zero_point, {&x});
  QuantizeArgs a = quantize_args(cut, x, check_float(op, "x", x), format);
  a.data = data.mutable_data_ptr();
  a.scale = scale.mutable_data_ptr();
  a.scale_type = check_float(op, "scale", scale);
  a.zero_point = symmetric ? nullptr : zero_point.mutable_data_ptr();
  a.symmetric = symmetric;
  run_quantize(cut, a);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, int64_t format_code,
                                            std::optional<int64_t> group_size, bool symmetric,
                                            std::optional<ScalarType> scale_dtype) {
  const DeviceGuard guard(x);
  const char* op = "quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  check_float(op, "x", x);
  const ScalarType scale_type = scale_dtype.value_or(ScalarType::Float);
  check_float_type(op, "scale_dtype", scale_type);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor data = empty_on_device(cut.data, storage_type(format));
  Tensor scale = empty_on_device(cut.scale, scale_type);
  Tensor zero_point = empty_on_device(zero_shape(cut, symmetric), storage_type(format));
  call_quantize(op, x, format, cut, symmetric, data, scale, zero_point);
  return {data, scale, zero_point};
}

void quantize_out(const Tensor& x, int64_t format_code, std::optional<int64_t> group_size,
                  bool symmetric, const Tensor& data, const Tensor& scale,
                  const Tensor& zero_point) {
  const DeviceGuard guard(x);
  const char* op = "quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  check_out(op, "data", data, cut.data, storage_type(format));
  check_out(op, "scale", scale, cut.scale, scalar_type(check_float(op, "scale", scale)));
  check_out(op, "zero_point", zero_point, zero_shape(cut, symmetric), storage_type(format));
  call_quantize(op, x, format, cut, symmetric, data, scale, zero_point);
}

void call_quantize_with(const char* op, const Tensor& x_any, const Tensor& scale,
                        const std::optional<Tensor>& zero_point, Format format, const Cut& cut,
                        const Tensor& out) {
  const Tensor x = dense(x_any);
  const Given given = check_given(op, cut, format, scale, zero_point);
  check_no_overlap(op, "out", out, {&x, &given.scale, given.zero()});
  if (x.numel() == 0) return;
  QuantizeArgs a = quantize_args(cut, x, check_float(op, "x", x), format);
  a.data = out.mutable_data_ptr();
  a.scale = const_cast<void*>(given.scale.const_data_ptr());  // only read by quantize_with
  a.scale_type = given.scale_type;
  a.symmetric = !given.zero_point;
  a.zero_point = a.symmetric ? nullptr : const_cast<void*>(given.zero_point->const_data_ptr());
  run_quantize_with(cut, a);
}

Tensor quantize_with(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                     int64_t format_code, std::optional<int64_t> group_size) {
  const DeviceGuard guard(x);
  const char* op = "quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor out = empty_on_device(cut.data, storage_type(format));
  call_quantize_with(op, x, scale, zero_point, format, cut, out);
  return out;
}

void quantize_with_out(const Tensor& x, const Tensor& scale,
                       const std::optional<Tensor>& zero_point, int64_t format_code,
                       std::optional<int64_t> group_size, const Tensor& out) {
  const DeviceGuard guard(x);
  const char* op = "quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  check_out(op, "out", out, cut.data, storage_type(format));
  call_quantize_with(op, x, scale, zero_point, format, cut, out);
}

void call_dequantize(const char* op, const Tensor& data_any, const Tensor& scale,
                     const std::optional<Tensor>& zero_point, Format format, const Cut& cut,
                     const Tensor& out) {
  check_dtype(op, "data", data_any, storage_type(format));
  check_shape(op, "data", data_any, cut.data);
  const Tensor data = dense(data_any);
  const Given given = check_given(op, cut, format, scale, zero_point);
  check_no_overlap(op, "out", out, {&data, &given.scale, given.zero()});
  if (out.numel() == 0) return;
  DequantizeArgs a{};
  a.data = data.const_data_ptr();
  a.scale = given.scale.const_data_ptr();
  a.scale_type = given.scale_type;
  a.zero_point = given.zero_point ? given.zero_point->const_data_ptr() : nullptr;
  a.y = out.mutable_data_ptr();
  a.y_type = check_float(op, "out", out);
  a.cols = cut.cols;
  a.groups = cut.groups;
  a.group_size = cut.group_size;
  a.row_bytes = storage_bytes(format, cut.cols);
  a.format = format;
  a.shared_scale = cut.per_tensor;
  run_dequantize(cut, a);
}

Tensor dequantize(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  int64_t format_code, std::optional<int64_t> group_size, int64_t features,
                  ScalarType dtype) {
  const DeviceGuard guard(data);
  const char* op = "dequantize";
  const Format format = check_format(op, format_code);
  check_float_type(op, "dtype", dtype);
  Shape shape = shape_of(data);
  if (shape.empty()) fail(op, "data must have at least one dimension, got a scalar");
  if (features < 0 || features > kMaxFeatures) {
    fail(op, "features must be from 0 to 2^40, got ", features);
  }
  shape.back() = features;
  const Cut cut = cut_of(op, shape, format, group_size);
  Tensor out = empty_on_device(shape, dtype);
  call_dequantize(op, data, scale, zero_point, format, cut, out);
  return out;
}

void dequantize_out(const Tensor& data, const Tensor& scale,
                    const std::optional<Tensor>& zero_point, int64_t format_code,
                    std::optional<int64_t> group_size, const Tensor& out) {
  const DeviceGuard guard(data);
  const char* op = "dequantize";
  const Format format = check_format(op, format_code);
  if (out.dim() == 0) fail(op, "out must have at least one dimension, got a scalar");
  const Cut cut = cut_of(op, shape_of(out), format, group_size);
  check_out(op, "out", out, shape_of(out), scalar_type(check_float(op, "out", out)));
  call_dequantize(op, data, scale, zero_point, format, cut, out);
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("quantize", TORCH_BOX(&qkernels::quantize));
  m.impl("quantize.out", TORCH_BOX(&qkernels::quantize_out));
  m.impl("quantize_with", TORCH_BOX(&qkernels::quantize_with));
  m.impl("quantize_with.out", TORCH_BOX(&qkernels::quantize_with_out));
  m.impl("dequantize", TORCH_BOX(&qkernels::dequantize));
  m.impl("dequantize.out", TORCH_BOX(&qkernels::dequantize_out));
}
