// linear and int_mm on the CPU: checks, workspace, threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Weight bytes times rows (in eights) per thread below which starting another costs more than it
// gains, and elements of x per thread when preparing it.
constexpr int64_t kLinearGrain = 128 * 1024;
constexpr int64_t kPrepareGrain = 16 * 1024;

// Rows are taken in chunks whose workspace stays below this.
constexpr int64_t kPanelCap = int64_t{32} << 20;

// Rows a kernel may touch past the last one, so that tiles need no special case for scratch.
constexpr int64_t kRowSlack = 16;

int64_t workspace_rows(int64_t rows) { return round_up(rows, kRowSlack); }

// Splits tiles of columns, and rows when there are few columns, over the threads.
void run_tiles(const Kernels& table, const LinearArgs& a) {
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  const int64_t block_tile = table.block_tile(a);
  const int64_t row_tile = table.row_tile(a);
  const int64_t columns = (blocks + block_tile - 1) / block_tile;
  const int64_t row_tiles = (a.rows + row_tile - 1) / row_tile;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts =
      columns >= 4 * threads ? 1 : std::min(row_tiles, (4 * threads + columns - 1) / columns);
  const int64_t rows_per_cut = (row_tiles + cuts - 1) / cuts * row_tile;
  const int64_t work = block_tile * a.shape.bytes * std::max<int64_t>(1, rows_per_cut / 8);
  parallel(columns * cuts, grain_for(kLinearGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      // Consecutive columns of the same rows are one call when the rows are not cut.
      const int64_t column = i / cuts, cut = i % cuts;
      const int64_t count = cuts == 1 ? end - i : 1;
      const int64_t row_begin = cut * rows_per_cut;
      const int64_t row_end = std::min(a.rows, row_begin + rows_per_cut);
      if (row_begin < row_end) {
        table.linear(a, column * block_tile, std::min(blocks, (column + count) * block_tile),
                     row_begin, row_end);
      }
      i += count;
    }
  });
}

}  // namespace

void run_linear(const LinearArgs& whole) {
  if (whole.rows == 0 || whole.n == 0) return;
  const Kernels& table = kernels();
  const bool integer = whole.activation != Activation::float_;
  LinearArgs a = whole;
  const int64_t row_tile = table.row_tile(a);
  a.rows = row_tile;
  const int64_t tile_bytes = std::max<int64_t>(1, table.panel_bytes(a));
  const int64_t tiles = std::max<int64_t>(1, kPanelCap / tile_bytes);
  const int64_t chunk = std::min(whole.rows, tiles * row_tile);
  a.rows = chunk;
  const int64_t rows = workspace_rows(chunk);
  const int64_t panel = table.panel_bytes(a);
  const int64_t groups = whole.shape.groups;
  Workspace workspace(
      Workspace::bytes<uint8_t>(panel) +
      (integer ? 2 * Workspace::bytes<float>(rows) + Workspace::bytes<int32_t>(rows * groups) : 0));
  a.panel = workspace.take<uint8_t>(panel);
  if (integer) {
    a.row_scale = workspace.take<float>(rows);
    a.row_zero = workspace.take<float>(rows);
    a.group_sums = workspace.take<int32_t>(rows * groups);
  }
  for (int64_t begin = 0; begin < whole.rows; begin += chunk) {
    a.x = static_cast<const uint8_t*>(whole.x) + begin * whole.shape.k * bytes_of(whole.x_type);
    a.y = static_cast<uint8_t*>(whole.y) + begin * whole.n * bytes_of(whole.y_type);
    a.rows = std::min(chunk, whole.rows - begin);
    const int64_t row_tiles = (a.rows + row_tile - 1) / row_tile;
    parallel(row_tiles, grain_for(kPrepareGrain, row_tile * a.shape.k),
             [&](int64_t first, int64_t last) {
               table.prepare(a, first * row_tile, std::min(a.rows, last * row_tile));
             });
    run_tiles(table, a);
  }
}

namespace {

// Static quantization parameters of x, or none.
void check_static(const char* op, const std::optional<Tensor>& x_scale,
                  const std::optional<Tensor>& x_zero_point, LinearArgs* a) {
  if (x_scale && a->activation == Activation::float_) {
    fail(op, "x_scale is given but activation=0 keeps the activations float; pass activation=1 or ",
         "leave x_scale out");
  }
  if (x_zero_point && (!x_scale || a->activation != Activation::int8_asymmetric)) {
    fail(op, "x_zero_point needs x_scale and activation=2 (asymmetric)");
  }
  if (!x_scale) return;
  a->is_static = true;
  a->static_scale = read_scale(op, "x_scale", *x_scale);
  if (x_zero_point) a->static_zero_point = read_zero_point(op, "x_zero_point", *x_zero_point);
}

void check_perm(const char* op, const Tensor& perm, int64_t k) {
  const int64_t* at = perm.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < k; ++i) {
    if (at[i] < 0 || at[i] >= k) {
      fail(op, "k_perm must hold indices from 0 to ", k - 1, ", got ", at[i], " at ", i);
    }
  }
}

Tensor linear(const Tensor& x_any, const Tensor& packed_any, const std::optional<Tensor>& bias_any,
              const std::optional<Tensor>& x_scale, const std::optional<Tensor>& x_zero_point,
              const std::optional<Tensor>& x_premul, const std::optional<Tensor>& k_perm,
              int64_t layout_id, int64_t in_features, int64_t out_features, int64_t group_size,
              int64_t activation, int64_t epilogue) {
  const char* op = "linear";
  LinearArgs a{};
  a.x_type = check_float(op, "x", x_any);
  check_sizes(op, in_features, out_features, group_size);
  a.layout = check_layout(op, layout_id);
  a.shape = block_shape(a.layout, in_features, group_size);
  Shape y_shape = shape_of(x_any);
  if (y_shape.empty()) {
    fail(op, "x must have at least one dimension, got a scalar; pass x of shape (..., ",
         in_features, ")");
  }
  if (y_shape.back() != in_features) {
    fail(op, "x has ", y_shape.back(), " features but the weight has in_features=", in_features,
         "; pass x of shape (..., ", in_features, ")");
  }
  const Tensor packed = check_packed(op, packed_any, a.shape, out_features);
  a.activation = check_activation(op, a.layout, a.shape.group_size, activation);
  check_static(op, x_scale, x_zero_point, &a);
  a.epilogue = check_epilogue(op, epilogue);

  std::optional<Tensor> bias, premul, perm;
  if (bias_any) {
    a.bias_type = check_float(op, "bias", *bias_any);
    check_shape(op, "bias", *bias_any, {out_features});
    bias = dense(*bias_any);
    a.bias = bias->const_data_ptr();
  }
  if (x_premul) {
    check_dtype(op, "x_premul", *x_premul, ScalarType::Float);
    check_shape(op, "x_premul", *x_premul, {in_features});
    premul = dense(*x_premul);
    a.premul = premul->const_data_ptr<float>();
  }
  if (k_perm) {
    check_dtype(op, "k_perm", *k_perm, ScalarType::Long);
    check_shape(op, "k_perm", *k_perm, {in_features});
    perm = dense(*k_perm);
    check_perm(op, *perm, in_features);
    a.perm = perm->const_data_ptr<int64_t>();
  }

  const Tensor x = dense(x_any);
  a.rows = 1;
  for (size_t i = 0; i + 1 < y_shape.size(); ++i) a.rows *= y_shape[i];
  y_shape.back() = out_features;
  Tensor y = empty_cpu(y_shape, scalar_type(a.x_type));
  a.x = x.const_data_ptr();
  a.n = out_features;
  a.packed = packed.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  a.y_type = a.x_type;
  run_linear(a);
  return y;
}

Tensor int_mm(const Tensor& a_any, const Tensor& b) {
  const char* op = "int_mm";
  check_dtype(op, "a", a_any, ScalarType::Char);
  check_dtype(op, "b", b, ScalarType::Char);
  if (a_any.dim() != 2 || b.dim() != 2 || a_any.size(1) != b.size(0)) {
    fail(op, "a and b must have shapes (M, K) and (K, N), got ", shape_text(a_any), " and ",
         shape_text(b));
  }
  const int64_t k = b.size(0), n = b.size(1);
  const int64_t limit = max_accumulation(Format::int8, true);
  if (k > limit) {
    fail(op, "an int32 sum over K=", k, " products can overflow (the limit is ", limit,
         "); split K and add in int64");
  }
  const Tensor x = dense(a_any);
  Tensor y = empty_cpu({a_any.size(0), n}, ScalarType::Int);
  LinearArgs a{};
  a.x = x.const_data_ptr();
  a.x_type = DType::i8;
  a.rows = a_any.size(0);
  a.n = n;
  a.layout = {Format::int8, DType::f32, true, kDeviceX86, kLayoutVersion};
  a.shape = block_shape(a.layout, k, -1);
  a.activation = Activation::int8_symmetric;
  a.y = y.mutable_data_ptr();
  a.y_type = DType::i32;

  const int64_t blocks = (n + kLanes - 1) / kLanes;
  const Tensor packed = empty_cpu({blocks, a.shape.bytes}, ScalarType::Byte);
  uint8_t* rows = packed.mutable_data_ptr<uint8_t>();
  parallel(blocks, grain_for(kPrepareGrain, kLanes * k), [&](int64_t begin, int64_t end) {
    pack_int8_columns(b.const_data_ptr<int8_t>(), b.stride(0), b.stride(1), n, a.shape, rows, begin,
                      end);
  });
  a.packed = rows;
  run_linear(a);
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("linear", TORCH_BOX(&qkernels::linear));
  m.impl("linear_differentiable", TORCH_BOX(&qkernels::linear));
  m.impl("int_mm", TORCH_BOX(&qkernels::int_mm));
}
