// How the CPU runs fake quantization.
#include "ops/fake_quantize.h"
#include "ops/range.h"

namespace qkernels {
namespace {

// Groups that divide a row are rows of their own: one long row then feeds every thread.
template <class Args>
void split_groups(Cut* cut, Args* a) {
  if (cut->per_tensor || cut->groups <= 1 || cut->cols % cut->group_size != 0) return;
  if (cut->rows >= static_cast<int64_t>(torch::stable::get_num_threads())) return;
  cut->rows *= cut->groups;
  a->cols = cut->cols = cut->group_size;
  a->groups = cut->groups = 1;
}

}  // namespace

void run_fake_quantize(const Cut& whole, const FakeQuantizeArgs& args) {
  Cut cut = whole;
  FakeQuantizeArgs a = args;
  float scale;
  int32_t zero_point[1];
  if (cut.per_tensor && a.scale == nullptr) {
    const Range range = range_of(a.x, a.type, cut.rows * cut.cols);
    const Affine affine = choose_affine(range, a.format, a.symmetric, a.scale_type);
    scale = affine.scale;
    a.scale = &scale;
    a.scale_type = DType::f32;
    store_zero_point(zero_point, a.format, 0, affine.zero_point);
    a.zero_point = a.symmetric ? nullptr : zero_point;
  }
  split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.fake_quantize(a, begin, end); });
}

void run_fake_backward(const Cut& whole, const FakeBackwardArgs& args) {
  Cut cut = whole;
  FakeBackwardArgs a = args;
  split_groups(&cut, &a);
  const Kernels& table = kernels();
  parallel(cut.rows, grain_for(kGrain, cut.cols),
           [&](int64_t begin, int64_t end) { table.fake_quantize_backward(a, begin, end); });
}

void run_ordered_sum(const float* values, int64_t count, float* sum) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(values[i]);
  *sum = static_cast<float>(total);
}

}  // namespace qkernels
