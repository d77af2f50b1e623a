// How the CPU runs linear_backward_input.
#include "ops/backward.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "ops/torch_api.h"
#include "ops/workspace.h"

namespace qkernels {

// Weight bytes times rows (in eights) per thread below which starting another costs more than it
// gains.
constexpr int64_t kBackwardGrain = 128 * 1024;

void run_backward(const BackwardArgs& a) {
  // As many strips of columns for one thread as for another. Every cell dequantizes its columns
  // anew, so rows are cut only when there are few columns.
  const Kernels& table = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least = (a.shape.k + kBackwardColumns - 1) / kBackwardColumns;
  const int64_t strips = round_up(least, threads);
  const int64_t width = round_up((a.shape.k + strips - 1) / strips, kBackwardStep);
  const int64_t columns = (a.shape.k + width - 1) / width;
  const int64_t cuts = columns >= threads ? 1 : std::min(a.rows, threads);
  const int64_t rows_per_cut = (a.rows + cuts - 1) / cuts;
  const int64_t work = width * a.n * std::max<int64_t>(1, rows_per_cut / 8);
  parallel(columns * cuts, grain_for(kBackwardGrain, work), [&](int64_t begin, int64_t end) {
    Workspace workspace(Workspace::bytes<float>(kBackwardScratch));
    float* scratch = workspace.take<float>(kBackwardScratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / cuts * width;
      const int64_t row = i % cuts * rows_per_cut;
      if (row >= a.rows) continue;
      table.backward(a, row, std::min(a.rows, row + rows_per_cut), k,
                     std::min(a.shape.k, k + width), scratch);
    }
  });
}

}  // namespace qkernels
