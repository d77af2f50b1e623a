// conv_sequence: convolutions of a network one after the other, in one call.
//
// A value is an input, or behind those the result of a step. A step reads two numbers of `wiring`
// (the values that are its x and its residual, -1 for none), the next kConstants of `constants`,
// and from `settings` what `conv` takes from out_channels to epilogue, each list behind its length.
#include "ops/conv.h"

namespace qkernels {
namespace {

constexpr const char* kSequence = "conv_sequence";
// packed, bias, x_scale, x_zero_point, residual_scale, residual_zero_point, y_scale, y_zero_point
constexpr size_t kConstants = 8;

class Settings {
 public:
  explicit Settings(const std::vector<int64_t>& all) : all_(all) {}
  int64_t next() {
    if (at_ >= all_.size()) fail(kSequence, "settings end before those of the last step");
    return all_[at_++];
  }
  std::vector<int64_t> list() {
    const int64_t count = next();
    if (count < 0 || count > static_cast<int64_t>(all_.size() - at_)) {
      fail(kSequence, "settings hold a list of ", count, " numbers where ", all_.size() - at_,
           " are left");
    }
    const auto begin = all_.begin() + static_cast<int64_t>(at_);
    at_ += static_cast<size_t>(count);
    return {begin, begin + count};
  }
  void check_end() const {
    if (at_ != all_.size()) {
      fail(kSequence, "settings hold ", all_.size() - at_, " numbers that no step reads");
    }
  }

 private:
  const std::vector<int64_t>& all_;
  size_t at_ = 0;
};

// For each value the step behind which nothing reads it; results are `steps` further on, so that
// they stay.
std::vector<int64_t> last_readers(int64_t inputs, int64_t steps, const std::vector<int64_t>& wiring,
                                  const std::vector<int64_t>& outputs) {
  std::vector<int64_t> last(static_cast<size_t>(inputs + steps), -1);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t value = wiring[2 * step + i];
      if (value < -i || value >= inputs + step) {
        fail(kSequence, "wiring must name inputs and earlier results, from 0 to ",
             inputs + step - 1, " for step ", step, ", got ", value);
      }
      if (value >= 0) last[value] = step;
    }
  }
  int64_t before = inputs - 1;
  for (const int64_t value : outputs) {
    if (value <= before || value >= inputs + steps) {
      fail(kSequence, "outputs must be results, from ", inputs, " to ", inputs + steps - 1,
           ", in order and each once, got ", text_of(outputs));
    }
    last[value] = steps;
    before = value;
  }
  return last;
}

std::vector<Tensor> conv_sequence(const std::vector<Tensor>& inputs,
                                  const std::vector<std::optional<Tensor>>& constants,
                                  int64_t layout, const std::vector<int64_t>& wiring,
                                  const std::vector<int64_t>& settings,
                                  const std::vector<int64_t>& outputs) {
  const size_t steps = wiring.size() / 2;
  if (wiring.size() != 2 * steps || constants.size() != kConstants * steps) {
    fail(kSequence, "wiring must have 2 entries and constants ", kConstants, " for each step, got ",
         wiring.size(), " and ", constants.size());
  }
  const std::vector<int64_t> last = last_readers(static_cast<int64_t>(inputs.size()),
                                                 static_cast<int64_t>(steps), wiring, outputs);
  std::vector<std::optional<Tensor>> values(inputs.begin(), inputs.end());
  values.reserve(inputs.size() + steps);
  Settings s(settings);
  for (size_t step = 0; step < steps; ++step) {
    const std::optional<Tensor>* c = &constants[kConstants * step];
    if (!c[0]) fail(kSequence, "constants must hold a packed weight for step ", step);
    const int64_t x = wiring[2 * step], residual = wiring[2 * step + 1];
    // Named, because arguments are evaluated in any order.
    const int64_t out_channels = s.next(), groups = s.next(), group_size = s.next();
    const auto kernel_size = s.list(), stride = s.list(), padding = s.list(), dilation = s.list();
    const bool transposed = s.next() != 0;
    const int64_t activation = s.next(), epilogue = s.next();
    values.push_back(conv(*values[x], *c[0], c[1], residual < 0 ? std::nullopt : values[residual],
                          c[2], c[3], c[4], c[5], c[6], c[7], layout, out_channels, groups,
                          group_size, kernel_size, stride, padding, dilation, transposed,
                          activation, epilogue, std::nullopt));
    // Memory that is in the caches is free for the next step.
    for (const int64_t value : {x, residual}) {
      if (value >= 0 && last[value] == static_cast<int64_t>(step)) values[value].reset();
    }
  }
  s.check_end();
  std::vector<Tensor> results;
  for (const int64_t value : outputs) results.push_back(*values[value]);
  return results;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) { m.impl("conv_sequence", TORCH_BOX(&qkernels::conv_sequence)); }
