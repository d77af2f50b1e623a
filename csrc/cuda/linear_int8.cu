// linear with int8 activations, and int_mm: workspace, and the choice of a kernel.
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

// Reading the weight limits the time of so few tokens, and a tile would leave most of its width
// unused.
constexpr int64_t kSkinny = 16;
// Of so many, if the tiles would not fill the device either.
constexpr int64_t kMostSkinny = 32;

template <class Tiles>
bool takes_large(const LinearArgs& a) {
  return a.rows > Tiles::Small::kTokens &&
         product_cycles<typename Tiles::Large>(a.n, a.rows, 1) <=
             product_cycles<typename Tiles::Small>(a.n, a.rows, 1);
}

Int8Plan plan_of(const LinearArgs& a) {
  const int64_t device = multiprocessors();
  const int stages = static_cast<int>(panel_pitch(a.shape) / kStageK);
  const int64_t tiles = int64_t{blocks_for(a.n, RowTiles::Small::kFeatures)} *
                        blocks_for(a.rows, RowTiles::Small::kTokens);
  Int8Plan plan{Int8Plan::small, 1, stages};
  if (a.rows <= kSkinny || (a.rows <= kMostSkinny && tiles < device)) {
    plan.kind = Int8Plan::skinny;
  } else if (a.shape.groups == 1 ? takes_large<RowTiles>(a) : takes_large<GroupedTiles>(a)) {
    plan.kind = Int8Plan::large;
  } else if (a.shape.groups == 1) {
    // Two blocks on each multiprocessor, but a part that is worth its start.
    constexpr int64_t kLeast = 8;  // stages
    const int64_t parts = min(2 * device / tiles, stages / kLeast);
    plan.parts = static_cast<int>(max(parts, int64_t{1}));
    plan.stages = (stages + plan.parts - 1) / plan.parts;
    plan.parts = stages == 0 ? 1 : (stages + plan.stages - 1) / plan.stages;
  }
  return plan;
}

// Gives out memory, or only counts it when there is none.
struct Workspace {
  uint8_t* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + at);
  }
};

int32_t* place(LinearArgs& a, const Int8Plan& plan, Workspace& workspace) {
  a.panel = workspace.take<uint8_t>(a.rows * panel_pitch(a.shape));
  a.row_scale = workspace.take<float>(a.rows);
  a.row_zero = workspace.take<float>(a.rows);
  a.group_sums = workspace.take<int32_t>(a.layout.symmetric ? 0 : a.rows * a.shape.groups);
  return workspace.take<int32_t>(plan.parts > 1 ? plan.parts * a.rows * round_up(a.n, 4) : 0);
}

}  // namespace

int64_t linear_int8_workspace(const LinearArgs& args) {
  LinearArgs a = args;
  Workspace workspace{nullptr};
  place(a, plan_of(a), workspace);
  return workspace.used;
}

void linear_int8(const LinearArgs& args, void* memory, Stream stream) {
  LinearArgs a = args;
  const Int8Plan plan = plan_of(a);
  Workspace workspace{static_cast<uint8_t*>(memory)};
  int32_t* const partial = place(a, plan, workspace);
  prepare_int8(a, stream);
  if (plan.kind == Int8Plan::skinny) return linear_int8_skinny(a, stream);
  if (a.shape.groups == 1) return linear_int8_row(a, plan, partial, stream);
  linear_int8_grouped(a, plan.kind == Int8Plan::large, stream);
}

}  // namespace qkernels::cuda
