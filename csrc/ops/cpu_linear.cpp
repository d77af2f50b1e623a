// How a CPU runs linear and packs int_mm's second operand: workspace, threads.
#include <algorithm>
#include <vector>

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

// Splits tiles of columns, and rows when there are few columns, over the threads. The products have
// all but their weight and their result in common.
void run_tiles(const Kernels& table, const std::vector<LinearArgs>& products) {
  const LinearArgs& first = products.front();
  const int64_t block_tile = table.block_tile(first);
  const int64_t row_tile = table.row_tile(first);
  const auto blocks_of = [](const LinearArgs& a) { return (a.n + kLanes - 1) / kLanes; };
  const auto columns_of = [&](const LinearArgs& a) {
    return (blocks_of(a) + block_tile - 1) / block_tile;
  };
  int64_t columns = 0;
  for (const LinearArgs& a : products) columns += columns_of(a);
  if (columns == 0) return;
  const int64_t row_tiles = (first.rows + row_tile - 1) / row_tile;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts =
      columns >= 4 * threads ? 1 : std::min(row_tiles, (4 * threads + columns - 1) / columns);
  const int64_t rows_per_cut = (row_tiles + cuts - 1) / cuts * row_tile;
  const int64_t work = block_tile * first.shape.bytes * std::max<int64_t>(1, rows_per_cut / 8);
  parallel(columns * cuts, grain_for(kLinearGrain, work), [&](int64_t begin, int64_t end) {
    const LinearArgs* a = products.data();
    int64_t before = 0;  // columns of the products before it
    for (int64_t i = begin; i < end;) {
      const int64_t column = i / cuts - before, cut = i % cuts;
      const int64_t left = columns_of(*a) - column;
      if (left <= 0) {
        before += columns_of(*a);
        ++a;
        continue;
      }
      // Consecutive columns of the same rows are one call when the rows are not cut.
      const int64_t count = cuts == 1 ? std::min(left, end - i) : 1;
      const int64_t row_begin = cut * rows_per_cut;
      const int64_t row_end = std::min(a->rows, row_begin + rows_per_cut);
      if (row_begin < row_end) {
        table.linear(*a, column * block_tile,
                     std::min(blocks_of(*a), (column + count) * block_tile), row_begin, row_end);
      }
      i += count;
    }
  });
}

}  // namespace

void run_linear(const LinearArgs& whole) { run_linears({whole}); }

void run_linears(std::vector<LinearArgs> products) {
  const LinearArgs whole = products.front();
  if (whole.rows == 0) return;
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
  for (LinearArgs& each : products) {
    each.panel = a.panel;
    each.row_scale = a.row_scale;
    each.row_zero = a.row_zero;
    each.group_sums = a.group_sums;
  }
  for (int64_t begin = 0; begin < whole.rows; begin += chunk) {
    a.x = static_cast<const uint8_t*>(whole.x) + begin * whole.shape.k * bytes_of(whole.x_type);
    a.rows = std::min(chunk, whole.rows - begin);
    const int64_t row_tiles = (a.rows + row_tile - 1) / row_tile;
    parallel(row_tiles, grain_for(kPrepareGrain, row_tile * a.shape.k),
             [&](int64_t first, int64_t last) {
               table.prepare(a, first * row_tile, std::min(a.rows, last * row_tile));
             });
    for (LinearArgs& each : products) each.rows = a.rows;
    run_tiles(table, products);
    for (LinearArgs& each : products) {
      each.y = static_cast<uint8_t*>(each.y) + a.rows * each.n * bytes_of(each.y_type);
    }
  }
}

void run_pack_columns(const Tensor& b, const BlockShape& shape, uint8_t* packed) {
  const int64_t n = b.size(1);
  parallel((n + kLanes - 1) / kLanes, grain_for(kPrepareGrain, kLanes * shape.k),
           [&](int64_t begin, int64_t end) {
             pack_int8_columns(b.const_data_ptr<int8_t>(), b.stride(0), b.stride(1), n, shape,
                               packed, begin, end);
           });
}

}  // namespace qkernels
