// linear with int8 activations, and int_mm: workspace and launches.
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

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
  const int64_t whole_rows = round_up(a.rows, max(plan.tokens, kPanelRows));
  a.panel = workspace.take<uint8_t>(plan.tiled() ? whole_rows / kPanelRows * tiled_pitch(a.shape)
                                                 : a.rows * panel_pitch(a.shape));
  a.row_scale = workspace.take<float>(a.rows);
  a.row_zero = workspace.take<float>(a.rows);
  a.group_sums =
      workspace.take<int32_t>(a.layout.symmetric ? 0 : code_sum_pitch(a.rows) * a.shape.groups);
  const bool partial = !plan.tiled() && plan.parts > 1;
  return workspace.take<int32_t>(partial ? plan.parts * a.rows * round_up(a.n, 4) : 0);
}

}  // namespace

int64_t linear_int8_workspace(const LinearArgs& args) {
  LinearArgs a = args;
  Workspace workspace{nullptr};
  place(a, int8_plan(a, {multiprocessors(), has_sm90a()}), workspace);
  return workspace.used;
}

void linear_int8(const LinearArgs& args, void* memory, Stream stream) {
  LinearArgs a = args;
  const Int8Plan plan = int8_plan(a, {multiprocessors(), has_sm90a()});
  Workspace workspace{static_cast<uint8_t*>(memory)};
  int32_t* const partial = place(a, plan, workspace);
  prepare_int8(a, plan.tiled(), stream);
  if (plan.kind == Int8Plan::warpgroups) return linear_int8_warpgroups(a, plan, stream);
  if (plan.tiled()) return linear_int8_grouped_warpgroups(a, plan.tokens, stream);
  if (plan.kind == Int8Plan::skinny) return linear_int8_skinny(a, stream);
  if (a.shape.groups == 1) return linear_int8_row(a, plan, partial, stream);
  linear_int8_grouped(a, plan.kind == Int8Plan::large, stream);
}

}  // namespace qkernels::cuda
