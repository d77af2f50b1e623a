// What the parts of conv on the CPU share.
#pragma once

#include "core/params.h"
#include "ops/checks.h"

namespace qkernels {

// A packed weight that is checked.
struct ConvWeight {
  Layout layout;
  ConvPacking packing;
  BlockShape shape;
};
ConvWeight check_conv_weight(const char* op, int64_t layout_id, int64_t taps,
                             int64_t group_channels, int64_t groups, int64_t out_channels,
                             int64_t group_size);
void check_packed_shape(const char* op, const Tensor& packed, const ConvWeight& w);

// Pixels that stay on one thread, and products per thread below which starting another costs more
// than it gains.
inline constexpr int64_t kPixelStep = 24;
inline constexpr int64_t kConvGrain = 1 << 20;

// The convolution with activations that stay floats. Everything in the arguments is set but the
// workspace.
void run_conv_float(const ConvArgs& a, const ConvWeight& w);

}  // namespace qkernels
