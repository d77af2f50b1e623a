// What the parts of conv share, and how a device runs it.
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

// The op.
Tensor conv(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const std::optional<Tensor>& x_scale,
            const std::optional<Tensor>& x_zero_point, const std::optional<Tensor>& residual_scale,
            const std::optional<Tensor>& residual_zero_point, const std::optional<Tensor>& y_scale,
            const std::optional<Tensor>& y_zero_point, int64_t layout, int64_t out_channels,
            int64_t groups, int64_t group_size, const std::vector<int64_t>& kernel_size,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool transposed, int64_t activation,
            int64_t epilogue, std::optional<ScalarType> dtype);

// Pixels that stay on one thread, and products per thread below which starting another costs more
// than it gains.
inline constexpr int64_t kPixelStep = 24;
inline constexpr int64_t kConvGrain = 1 << 20;

// The convolution with int8 activations, and with those that stay floats. Everything in the
// arguments is set but the workspace.
void run_conv_int8(const ConvArgs& a, const Layout& layout);
void run_conv_float(const ConvArgs& a, const ConvWeight& w);

}  // namespace qkernels
