// quantize on the CPU, and how the CPU runs the other quantizers.
#include "ops/quantize.h"
#include "ops/range.h"

namespace qkernels {
namespace {

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

}  // namespace

void run_quantize_with(const Cut& whole, const QuantizeArgs& args) {
  Cut cut = whole;
  QuantizeArgs a = args;
  if (!cut.per_tensor) split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.quantize_with(a, begin, end); });
}

void run_dequantize(const Cut& cut, const DequantizeArgs& a) {
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.dequantize(a, begin, end); });
}

}  // namespace qkernels

QK_OPS(m) {
  m.impl("quantize", TORCH_BOX(&qkernels::quantize));
  m.impl("quantize.out", TORCH_BOX(&qkernels::quantize_out));
}
