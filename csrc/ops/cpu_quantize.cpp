// quantize, quantize_with, dequantize and their out= forms on the CPU.
#include "ops/groups.h"

namespace qkernels {
namespace {

QuantizeArgs quantize_args(const Cut& cut, const Tensor& x, DType x_type, Format format) {
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

// Groups that fill whole bytes and divide the row are rows of their own: one long row then feeds
// every thread.
void split_groups(Cut* cut, QuantizeArgs* a) {
  if (cut->groups <= 1 || cut->cols % cut->group_size != 0) return;
  if (cut->group_size * info(a->format).bits % 8 != 0) return;
  if (cut->rows >= static_cast<int64_t>(torch::stable::get_num_threads())) return;
  cut->rows *= cut->groups;
  cut->cols = a->cols = cut->group_size;
  cut->groups = a->groups = 1;
  a->row_bytes = storage_bytes(a->format, cut->cols);
}

void run_quantize(const char* op, const Tensor& x_any, Format format,
                  std::optional<int64_t> group_size, bool symmetric, const Tensor& data,
                  const Tensor& scale, const Tensor& zero_point) {
  const Tensor x = dense(x_any);
  const DType x_type = check_float(op, "x", x);
  Cut cut = cut_of(op, shape_of(x), format, group_size);
  QuantizeArgs a = quantize_args(cut, x, x_type, format);
  a.data = data.mutable_data_ptr();
  a.scale = scale.mutable_data_ptr();
  a.scale_type = check_float(op, "scale", scale);
  a.zero_point = symmetric ? nullptr : zero_point.mutable_data_ptr();
  a.symmetric = symmetric;
  const Kernels& table = kernels();
  if (cut.per_tensor) {
    const Affine affine = choose_affine(range_of(x, x_type), format, symmetric, a.scale_type);
    store_float(a.scale, a.scale_type, 0, affine.scale);
    if (!symmetric) store_zero_point(a.zero_point, format, 0, affine.zero_point);
  } else {
    split_groups(&cut, &a);
  }
  const auto kernel = cut.per_tensor ? table.quantize_with : table.quantize;
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Shape zero_shape(const Cut& cut, bool symmetric) { return symmetric ? Shape{0} : cut.scale; }

void check_out(const char* op, const char* name, const Tensor& t, const Shape& shape,
               ScalarType type) {
  check_dtype(op, name, t, type);
  check_shape(op, name, t, shape);
  if (!t.is_contiguous()) {
    fail(op, name, " must be contiguous to be written to; pass a contiguous tensor");
  }
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, int64_t format_code,
                                            std::optional<int64_t> group_size, bool symmetric,
                                            std::optional<ScalarType> scale_dtype) {
  const char* op = "quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  check_float(op, "x", x);
  const ScalarType scale_type = scale_dtype.value_or(ScalarType::Float);
  check_float_type(op, "scale_dtype", scale_type);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor data = empty_cpu(cut.data, storage_type(format));
  Tensor scale = empty_cpu(cut.scale, scale_type);
  Tensor zero_point = empty_cpu(zero_shape(cut, symmetric), storage_type(format));
  run_quantize(op, x, format, group_size, symmetric, data, scale, zero_point);
  return {data, scale, zero_point};
}

void quantize_out(const Tensor& x, int64_t format_code, std::optional<int64_t> group_size,
                  bool symmetric, const Tensor& data, const Tensor& scale,
                  const Tensor& zero_point) {
  const char* op = "quantize";
  const Format format = check_symmetry(op, format_code, symmetric);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  check_out(op, "data", data, cut.data, storage_type(format));
  check_out(op, "scale", scale, cut.scale, scalar_type(check_float(op, "scale", scale)));
  check_out(op, "zero_point", zero_point, zero_shape(cut, symmetric), storage_type(format));
  run_quantize(op, x, format, group_size, symmetric, data, scale, zero_point);
}

void run_quantize_with(const char* op, const Tensor& x_any, const Tensor& scale,
                       const std::optional<Tensor>& zero_point, Format format, Cut cut,
                       const Tensor& out) {
  const Tensor x = dense(x_any);
  const Given given = check_given(op, cut, format, scale, zero_point);
  QuantizeArgs a = quantize_args(cut, x, check_float(op, "x", x), format);
  a.data = out.mutable_data_ptr();
  a.scale = const_cast<void*>(given.scale.const_data_ptr());  // only read by quantize_with
  a.scale_type = given.scale_type;
  a.symmetric = !given.zero_point;
  a.zero_point = a.symmetric ? nullptr : const_cast<void*>(given.zero_point->const_data_ptr());
  if (!cut.per_tensor) split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.quantize_with(a, begin, end); });
}

Tensor quantize_with(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                     int64_t format_code, std::optional<int64_t> group_size) {
  const char* op = "quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  Tensor out = empty_cpu(cut.data, storage_type(format));
  run_quantize_with(op, x, scale, zero_point, format, cut, out);
  return out;
}

void quantize_with_out(const Tensor& x, const Tensor& scale,
                       const std::optional<Tensor>& zero_point, int64_t format_code,
                       std::optional<int64_t> group_size, const Tensor& out) {
  const char* op = "quantize_with";
  const Format format = check_format(op, format_code);
  check_float(op, "x", x);
  const Cut cut = cut_of(op, shape_of(x), format, group_size);
  check_out(op, "out", out, cut.data, storage_type(format));
  run_quantize_with(op, x, scale, zero_point, format, cut, out);
}

void run_dequantize(const char* op, const Tensor& data_any, const Tensor& scale,
                    const std::optional<Tensor>& zero_point, Format format, const Cut& cut,
                    const Tensor& out) {
  check_dtype(op, "data", data_any, storage_type(format));
  check_shape(op, "data", data_any, cut.data);
  const Tensor data = dense(data_any);
  const Given given = check_given(op, cut, format, scale, zero_point);
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
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.dequantize(a, begin, end); });
}

Tensor dequantize(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  int64_t format_code, std::optional<int64_t> group_size, int64_t features,
                  ScalarType dtype) {
  const char* op = "dequantize";
  const Format format = check_format(op, format_code);
  check_float_type(op, "dtype", dtype);
  Shape shape = shape_of(data);
  if (shape.empty()) fail(op, "data must have at least one dimension, got a scalar");
  if (features < 0) fail(op, "features must not be negative, got ", features);
  shape.back() = features;
  const Cut cut = cut_of(op, shape, format, group_size);
  Tensor out = empty_cpu(shape, dtype);
  run_dequantize(op, data, scale, zero_point, format, cut, out);
  return out;
}

void dequantize_out(const Tensor& data, const Tensor& scale,
                    const std::optional<Tensor>& zero_point, int64_t format_code,
                    std::optional<int64_t> group_size, const Tensor& out) {
  const char* op = "dequantize";
  const Format format = check_format(op, format_code);
  const Cut cut = cut_of(op, shape_of(out), format, group_size);
  check_out(op, "out", out, shape_of(out), scalar_type(check_float(op, "out", out)));
  run_dequantize(op, data, scale, zero_point, format, cut, out);
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&qkernels::quantize));
  m.impl("quantize.out", TORCH_BOX(&qkernels::quantize_out));
  m.impl("quantize_with", TORCH_BOX(&qkernels::quantize_with));
  m.impl("quantize_with.out", TORCH_BOX(&qkernels::quantize_with_out));
  m.impl("dequantize", TORCH_BOX(&qkernels::dequantize));
  m.impl("dequantize.out", TORCH_BOX(&qkernels::dequantize_out));
}
