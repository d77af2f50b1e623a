// How the CPU runs the quantizers.
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

}  // namespace

void run_quantize(const Cut& whole, const QuantizeArgs& args) {
  Cut cut = whole;
  QuantizeArgs a = args;
  const Kernels& table = kernels();
  if (cut.per_tensor) {
    const Range range = range_of(a.x, a.x_type, cut.rows * cut.cols);
    const Affine affine = choose_affine(range, a.format, a.symmetric, a.scale_type);
    store_float(a.scale, a.scale_type, 0, affine.scale);
    if (!a.symmetric) store_zero_point(a.zero_point, a.format, 0, affine.zero_point);
    if (cut.cols == 0) return;
  } else {
    split_groups(&cut, &a);
  }
  const auto kernel = cut.per_tensor ? table.quantize_with : table.quantize;
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

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
