// attention: checks, allocation and threads, for the CPU. On CUDA it is torch's own
// (qkernels/ops_transformer.py).
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/transformer.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Products of numbers per thread below which starting another costs more than it gains.
constexpr int64_t kAttentionGrain = 256 * 1024;

void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_device(op, name, t);
  if (t.scalar_type() != q.scalar_type()) {
    fail(op, name, " must have the dtype of q (", dtype_text(q.scalar_type()), "), got ",
         dtype_text(t.scalar_type()), "; convert it with .to(q.dtype)");
  }
  if (t.dim() != 3) {
    fail(op, name, " must have shape (batch, rows, heads * features), got ", shape_text(t));
  }
}

// From one sequence, one head and one row of t to the next.
void set_steps(const Tensor& t, int64_t head_size, int64_t* step) {
  step[0] = t.stride(0);
  step[1] = head_size;
  step[2] = t.stride(1);
}

// A tensor whose last dimension is dense.
Tensor dense_rows(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : dense(t); }

void set_mask(const char* op, const std::optional<Tensor>& mask, AttentionArgs* a) {
  if (!mask) return;
  check_device(op, "mask", *mask);
  a->mask_is_bool = mask->scalar_type() == ScalarType::Bool;
  const auto type = float_dtype(mask->scalar_type());
  if (!a->mask_is_bool && !type) {
    fail(op, "mask must be bool (True: attend) or float32, bfloat16 or float16 (added), got ",
         dtype_text(mask->scalar_type()), "; convert it with .bool()");
  }
  a->mask_type = type.value_or(DType::f32);
  const Shape want{a->batch, a->heads, a->rows, a->keys};
  const int64_t missing = 4 - mask->dim();
  bool fits = missing >= 0;
  for (int64_t i = 0; fits && i < mask->dim(); ++i) {
    const int64_t size = mask->size(i);
    fits = size == 1 || size == want[static_cast<size_t>(missing + i)];
    a->mask_step[missing + i] = size == 1 ? 0 : mask->stride(i);
  }
  if (!fits) {
    fail(op, "mask must broadcast to (batch, heads, rows of q, rows of k) = ", text_of(want),
         ", got ", shape_text(*mask));
  }
  a->mask = mask->const_data_ptr();
}

// One row of q for each sequence: the heads that share a head of k are rows of one tile.
void gather_heads(AttentionArgs* a) {
  if (a->rows != 1 || a->group == 1) return;
  if (a->causal) a->keys = std::min<int64_t>(a->keys, 1);
  a->causal = false;
  for (int64_t* step : {a->q_step, a->y_step, a->mask_step}) {
    step[2] = step[1];
    step[1] *= a->group;
  }
  a->rows = a->group;
  a->heads /= a->group;
  a->group = 1;
}

}  // namespace

Tensor attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                 const std::optional<Tensor>& mask, int64_t heads, double scale, bool causal) {
  const char* op = "attention";
  AttentionArgs a{};
  a.type = check_float(op, "q", q_any);
  check_rows(op, "q", q_any, q_any);
  check_rows(op, "k", k_any, q_any);
  check_rows(op, "v", v_any, q_any);
  const int64_t features = q_any.size(2);
  if (heads < 1 || features < heads || features % heads != 0) {
    fail(op, "heads must divide the ", features, " features of q, got ", heads);
  }
  a.batch = q_any.size(0);
  a.heads = heads;
  a.rows = q_any.size(1);
  a.keys = k_any.size(1);
  a.head_size = features / heads;
  const int64_t shared = k_any.size(2) / a.head_size;
  if (shared < 1 || k_any.size(2) % a.head_size != 0 || heads % shared != 0) {
    fail(op, "k must have ", a.head_size, " features for each of its heads, whose number divides ",
         heads, ", got ", shape_text(k_any));
  }
  a.group = heads / shared;
  a.value_size = v_any.size(2) / shared;
  if (a.value_size < 1 || v_any.size(2) % shared != 0) {
    fail(op, "v must have the ", shared, " heads of k, with as many features each, got ",
         shape_text(v_any));
  }
  if (k_any.size(0) != a.batch || v_any.size(0) != a.batch || v_any.size(1) != a.keys) {
    fail(op, "k and v must have q's batch size and the same rows, got q ", shape_text(q_any),
         ", k ", shape_text(k_any), " and v ", shape_text(v_any));
  }
  if (a.keys > kMaxFeatures) fail(op, "k must have at most 2^40 rows, got ", shape_text(k_any));
  set_mask(op, mask, &a);
  a.scale = static_cast<float>(scale);
  a.causal = causal;

  const Tensor q = dense_rows(q_any), k = dense_rows(k_any), v = dense_rows(v_any);
  Tensor y = empty_cpu({a.batch, a.rows, heads * a.value_size}, q.scalar_type());
  if (y.numel() == 0) return y;
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.y = y.mutable_data_ptr();
  set_steps(q, a.head_size, a.q_step);
  set_steps(k, a.head_size, a.k_step);
  set_steps(v, a.value_size, a.v_step);
  set_steps(y, a.value_size, a.y_step);
  gather_heads(&a);

  const Kernels& table = kernels();
  const int64_t tile = table.attention_tile(a), floats = table.attention_scratch(a);
  const int64_t tiles = (a.rows + tile - 1) / tile;
  const int64_t work = std::min(tile, a.rows) * a.keys * (a.head_size + a.value_size);
  parallel(a.batch * a.heads * tiles, grain_for(kAttentionGrain, work),
           [&](int64_t begin, int64_t end) {
             Workspace workspace(Workspace::bytes<float>(floats));
             table.attention(a, begin, end, workspace.take<float>(floats));
           });
  return y;
}

}  // namespace qkernels

QK_OPS(m) { m.impl("attention", TORCH_BOX(&qkernels::attention)); }
