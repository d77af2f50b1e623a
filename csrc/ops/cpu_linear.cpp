// How a CPU runs linear and packs int_mm's second operand: workspace, threads.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Weight bytes times rows (in eights) per thread below which starting another costs more than it
// gains, and what preparing an element of x counts as.
constexpr int64_t kLinearGrain = 128 * 1024;
constexpr int64_t kPrepareWork = 8;

// Elements of a matrix per thread when packing it.
constexpr int64_t kPackGrain = 16 * 1024;

// Rows are taken in chunks whose workspace stays below this.
constexpr int64_t kPanelCap = int64_t{32} << 20;

// Rows a kernel may touch past the last one, so that tiles need no special case for scratch.
constexpr int64_t kRowSlack = 16;

int64_t workspace_rows(int64_t rows) { return round_up(rows, kRowSlack); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Row tiles of x that the threads of one region prepare together, each taking the next one, and
// then wait for. Who waits, waits only for tiles that a running thread has taken, so it does not
// matter how many threads there are and when they begin.
class SharedPrepare {
 public:
  SharedPrepare(const Kernels& table, const LinearArgs& args, int64_t row_tile)
      : table_(table), args_(args), row_tile_(row_tile), tiles_(ceil_div(args.rows, row_tile)) {}

  void run() {
    for (int64_t tile; (tile = next_.fetch_add(1, std::memory_order_relaxed)) < tiles_;) {
      const int64_t begin = tile * row_tile_;
      table_.prepare(args_, begin, std::min(args_.rows, begin + row_tile_));
      done_.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < tiles_; ++spins) {
      if (spins < kSpins) {
        __builtin_ia32_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 1000;
  const Kernels& table_;
  const LinearArgs& args_;
  const int64_t row_tile_, tiles_;
  alignas(kLine) std::atomic<int64_t> next_{0};
  alignas(kLine) std::atomic<int64_t> done_{0};
};

// Prepares x and splits tiles of columns, and rows when there are few columns, over the threads.
// The products have all but their weight and their result in common.
void run_tiles(const Kernels& table, const std::vector<LinearArgs>& products) {
  const LinearArgs& first = products.front();
  const int64_t block_tile = table.block_tile(first);
  const int64_t row_tile = table.row_tile(first);
  const auto blocks_of = [](const LinearArgs& a) { return ceil_div(a.n, kLanes); };
  const auto columns_of = [&](const LinearArgs& a) { return ceil_div(blocks_of(a), block_tile); };
  int64_t columns = 0;
  for (const LinearArgs& a : products) columns += columns_of(a);
  if (columns == 0) return;
  const int64_t row_tiles = ceil_div(first.rows, row_tile);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts =
      columns >= 4 * threads ? 1 : std::min(row_tiles, ceil_div(4 * threads, columns));
  const int64_t rows_per_cut = ceil_div(row_tiles, cuts) * row_tile;
  // Of a column and a cut, in weight bytes times rows; preparing x counts as well.
  const int64_t work = block_tile * first.shape.bytes * std::max<int64_t>(1, rows_per_cut / 8) +
                       kPrepareWork * first.rows * first.shape.k / (columns * cuts);
  SharedPrepare prepare(table, first, row_tile);
  parallel(columns * cuts, grain_for(kLinearGrain, work), [&](int64_t begin, int64_t end) {
    prepare.run();
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
  const bool sums = integer || (a.layout.format == Format::int4 && !a.layout.symmetric);
  Workspace workspace(Workspace::bytes<uint8_t>(panel) +
                      (integer ? 2 * Workspace::bytes<float>(rows) : 0) +
                      (sums ? Workspace::bytes<int32_t>(rows * groups) : 0));
  a.panel = workspace.take<uint8_t>(panel);
  if (integer) {
    a.row_scale = workspace.take<float>(rows);
    a.row_zero = workspace.take<float>(rows);
  }
  if (sums) a.group_sums = workspace.take<int32_t>(rows * groups);
  for (LinearArgs& each : products) {
    each.panel = a.panel;
    each.row_scale = a.row_scale;
    each.row_zero = a.row_zero;
    each.group_sums = a.group_sums;
  }
  for (int64_t begin = 0; begin < whole.rows; begin += chunk) {
    for (LinearArgs& each : products) {
      each.x =
          static_cast<const uint8_t*>(whole.x) + begin * whole.shape.k * bytes_of(whole.x_type);
      each.rows = std::min(chunk, whole.rows - begin);
    }
    run_tiles(table, products);
    for (LinearArgs& each : products) {
      each.y = static_cast<uint8_t*>(each.y) + each.rows * each.n * bytes_of(each.y_type);
    }
  }
}

void run_pack_columns(const Tensor& b, const BlockShape& shape, uint8_t* packed) {
  const int64_t n = b.size(1);
  parallel(ceil_div(n, kLanes), grain_for(kPackGrain, kLanes * shape.k),
           [&](int64_t begin, int64_t end) {
             pack_int8_columns(b.const_data_ptr<int8_t>(), b.stride(0), b.stride(1), n, shape,
                               packed, begin, end);
           });
}

}  // namespace qkernels
