// op_sequence: linear, linear_shared, attention and add_norm one after the other, in one call.
//
// A value is an input, or behind those a result, in the order in which they are made. `program`
// holds for each step the number of its op and what that takes, in the order of its schema: numbers
// and bools as they are, tensors as twice their value and 1 more where nothing reads that later (-1
// for none), lists of `linear_shared` behind the one length of them all. `factors` holds the
// numbers that are no integers.
#include "ops/checks.h"
#include "ops/linear.h"
#include "ops/transformer.h"

namespace qkernels {
namespace {

constexpr const char* kSequence = "op_sequence";
enum Op : int64_t { kLinear, kLinearShared, kAttention, kAddNorm };  // qkernels/ops_sequence.py

class Program {
 public:
  Program(const std::vector<Tensor>& inputs, const std::vector<int64_t>& program,
          const std::vector<double>& factors)
      : program_(program), factors_(factors), values_(inputs.begin(), inputs.end()) {}

  bool at_end() const { return at_ == program_.size(); }

  int64_t number() {
    if (at_end()) fail(kSequence, "program ends before its last step does");
    return program_[at_++];
  }

  std::vector<int64_t> numbers(int64_t count) {
    std::vector<int64_t> all;
    for (int64_t i = 0; i < count; ++i) all.push_back(number());
    return all;
  }

  double factor() {
    if (factor_ == factors_.size()) fail(kSequence, "factors end before those of the last step");
    return factors_[factor_++];
  }

  std::optional<Tensor> tensor_or_none() {
    const int64_t given = number();
    if (given == -1) return std::nullopt;
    std::optional<Tensor>& value = named(given / 2);
    if (given % 2 == 0) return value;
    // Memory that is in the caches is free for the next step.
    std::optional<Tensor> last;
    value.swap(last);
    return last;
  }

  Tensor tensor() {
    const std::optional<Tensor> value = tensor_or_none();
    if (!value) fail(kSequence, "program names no tensor (-1) where a step needs one");
    return *value;
  }

  void make(const Tensor& result) { values_.emplace_back(result); }

  void check_end() const {
    if (factor_ != factors_.size()) {
      fail(kSequence, "factors hold ", factors_.size() - factor_, " numbers that no step reads");
    }
  }

  Tensor result(int64_t value) { return *named(value); }

 private:
  std::optional<Tensor>& named(int64_t value) {
    if (value < 0 || value >= static_cast<int64_t>(values_.size()) || !values_[value]) {
      fail(kSequence, "value ", value, " is named but there are ", values_.size(),
           " so far, or it was read for the last time before");
    }
    return values_[value];
  }

  const std::vector<int64_t>& program_;
  const std::vector<double>& factors_;
  std::vector<std::optional<Tensor>> values_;
  size_t at_ = 0, factor_ = 0;
};

// Arguments are read into names first, because those of a call are evaluated in any order.

void step_linear(Program& p) {
  const Tensor x = p.tensor(), packed = p.tensor();
  const auto bias = p.tensor_or_none(), x_scale = p.tensor_or_none();
  const auto x_zero_point = p.tensor_or_none(), x_premul = p.tensor_or_none();
  const auto k_perm = p.tensor_or_none();
  const int64_t layout = p.number(), in_features = p.number(), out_features = p.number();
  const int64_t group_size = p.number(), activation = p.number(), epilogue = p.number();
  p.make(linear(x, packed, bias, x_scale, x_zero_point, x_premul, k_perm, layout, in_features,
                out_features, group_size, activation, epilogue));
}

void step_linear_shared(Program& p) {
  const int64_t count = p.number();
  const Tensor x = p.tensor();
  std::vector<Tensor> packed;
  std::vector<std::optional<Tensor>> bias;
  for (int64_t i = 0; i < count; ++i) packed.push_back(p.tensor());
  for (int64_t i = 0; i < count; ++i) bias.push_back(p.tensor_or_none());
  const int64_t layout = p.number(), in_features = p.number();
  const auto out_features = p.numbers(count);
  const int64_t group_size = p.number(), activation = p.number();
  const auto epilogue = p.numbers(count);
  for (const Tensor& y : linear_shared(x, packed, bias, layout, in_features, out_features,
                                       group_size, activation, epilogue)) {
    p.make(y);
  }
}

void step_attention(Program& p) {
  const Tensor q = p.tensor(), k = p.tensor(), v = p.tensor();
  const auto mask = p.tensor_or_none();
  const int64_t heads = p.number();
  const double scale = p.factor();
  p.make(attention(q, k, v, mask, heads, scale, p.number() != 0));
}

void step_add_norm(Program& p) {
  const Tensor x = p.tensor();
  const auto residual = p.tensor_or_none(), weight = p.tensor_or_none();
  const auto bias = p.tensor_or_none();
  const double eps = p.factor();
  const bool rms = p.number() != 0, keep_sum = p.number() != 0;
  const auto [y, sum] = add_norm(x, residual, weight, bias, eps, rms, keep_sum);
  p.make(y);
  p.make(sum);
}

std::vector<Tensor> op_sequence(const std::vector<Tensor>& inputs,
                                const std::vector<int64_t>& program,
                                const std::vector<double>& factors,
                                const std::vector<int64_t>& outputs) {
  Program p(inputs, program, factors);
  while (!p.at_end()) {
    const int64_t op = p.number();
    switch (op) {
      case kLinear:
        step_linear(p);
        break;
      case kLinearShared:
        step_linear_shared(p);
        break;
      case kAttention:
        step_attention(p);
        break;
      case kAddNorm:
        step_add_norm(p);
        break;
      default:
        fail(kSequence, "program must name ops from 0 to ", static_cast<int64_t>(kAddNorm),
             ", got ", op);
    }
  }
  p.check_end();
  int64_t before = static_cast<int64_t>(inputs.size()) - 1;
  std::vector<Tensor> results;
  for (const int64_t value : outputs) {
    if (value <= before) {
      fail(kSequence, "outputs must be results, from ", inputs.size(),
           " on, in order and each once, got ", text_of(outputs));
    }
    results.push_back(p.result(value));
    before = value;
  }
  return results;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) { m.impl("op_sequence", TORCH_BOX(&qkernels::op_sequence)); }
