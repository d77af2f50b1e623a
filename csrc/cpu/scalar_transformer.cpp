// The reference of what happens to floats between the layers of a transformer.
#include "cpu/scalar_transformer.h"

#include "cpu/rows.h"

namespace qkernels {
namespace scalar {

int64_t attention_tile(const AttentionArgs&) { return 1; }
int64_t attention_scratch(const AttentionArgs& a) { return a.keys; }

void attention(const AttentionArgs& a, int64_t begin, int64_t end, float* weights) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % a.rows, head = item / a.rows % a.heads;
    const int64_t batch = item / a.rows / a.heads, shared = head / a.group;
    const int64_t q = batch * a.q_step[0] + head * a.q_step[1] + row * a.q_step[2];
    const int64_t k = batch * a.k_step[0] + shared * a.k_step[1];
    const int64_t v = batch * a.v_step[0] + shared * a.v_step[1];
    const int64_t y = batch * a.y_step[0] + head * a.y_step[1] + row * a.y_step[2];
    const int64_t keys = attention_keys(a, row + 1);

    float largest = -INFINITY;  // a NaN is passed over here and comes back in its weight
    for (int64_t j = 0; j < keys; ++j) {
      float sum = 0.0f;
      for (int64_t d = 0; d < a.head_size; ++d) {
        sum = std::fma(load_float(a.k, a.type, k + j * a.k_step[2] + d),
                       load_float(a.q, a.type, q + d), sum);
      }
      weights[j] = std::fma(sum, a.scale, attention_mask(a, batch, head, row, j));
      largest = weights[j] > largest ? weights[j] : largest;
    }
    if (largest == -INFINITY) largest = 0.0f;
    float total = 0.0f;
    for (int64_t j = 0; j < keys; ++j) {
      const float below = weights[j] - largest;
      weights[j] = below < kLowestExp ? 0.0f : exp_poly(below);
      total += weights[j];
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < a.value_size; ++d) {
      float sum = 0.0f;
      for (int64_t j = 0; j < keys; ++j) {
        sum = std::fma(weights[j], load_float(a.v, a.type, v + j * a.v_step[2] + d), sum);
      }
      store_float(a.y, a.type, y + d, sum * inverse);
    }
  }
}

void add_norm(const NormArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.cols;
    // Where x + residual is, rounded: y has room for it until it is overwritten.
    const void* s = a.x;
    if (a.residual != nullptr || a.sum != nullptr) {
      void* out = a.sum != nullptr ? a.sum : a.y;
      for (int64_t i = at; i < at + a.cols; ++i) {
        const float x = load_float(a.x, a.type, i);
        store_float(out, a.type, i,
                    a.residual == nullptr ? x : x + load_float(a.residual, a.type, i));
      }
      s = out;
    }
    float lanes[kNormLanes] = {};
    float mean = 0.0f;
    if (!a.rms) {
      for (int64_t i = 0; i < a.cols; ++i) lanes[i % kNormLanes] += load_float(s, a.type, at + i);
      mean = sum_norm_lanes(lanes) / static_cast<float>(a.cols);
      std::fill_n(lanes, kNormLanes, 0.0f);
    }
    for (int64_t i = 0; i < a.cols; ++i) {
      const float centered = load_float(s, a.type, at + i) - mean;
      lanes[i % kNormLanes] = std::fma(centered, centered, lanes[i % kNormLanes]);
    }
    const float inverse = norm_inverse(a, sum_norm_lanes(lanes));
    for (int64_t i = 0; i < a.cols; ++i) {
      const float unit = (load_float(s, a.type, at + i) - mean) * inverse;
      const float weight = a.weight == nullptr ? 1.0f : load_float(a.weight, a.weight_type, i);
      const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.weight_type, i);
      store_float(a.y, a.type, at + i, std::fma(unit, weight, bias));
    }
  }
}

}  // namespace scalar
}  // namespace qkernels
