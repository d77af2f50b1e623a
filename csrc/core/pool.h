// The windows of a pooling, for the kernels of both devices.
#pragma once

#include "core/params.h"

namespace qkernels {

// What a window holds along a dimension: `count` elements of x from `first` on, `step` apart;
// `size` is its extent, with the borders.
struct Window {
  int64_t first, count, step, size;
};

QK_HD static inline Window pool_window(const PoolArgs& a, int dim, int64_t at) {
  const int64_t in = a.in[dim], out = a.out[dim];
  if (a.adaptive) {
    const int64_t begin = at * in / out, end = ((at + 1) * in + out - 1) / out;
    return {begin, end - begin, 1, end - begin};
  }
  const int64_t corner = at * a.stride[dim] - a.before[dim], step = a.dilation[dim];
  const int64_t begin = corner < 0 ? (-corner + step - 1) / step : 0;
  int64_t end = in > corner ? (in - corner + step - 1) / step : 0;
  if (end > a.kernel[dim]) end = a.kernel[dim];
  const int64_t border = in + a.before[dim] - corner;
  return {corner + begin * step, end > begin ? end - begin : 0, step,
          border < a.kernel[dim] ? border : a.kernel[dim]};
}

// What the sum of a window is multiplied by.
QK_HD static inline float pool_scale(const PoolArgs& a, const Window& z, const Window& y,
                                     const Window& x) {
  int64_t divisor = a.divisor;
  if (divisor == 0) {
    divisor = a.count_padding ? z.size * y.size * x.size : z.count * y.count * x.count;
  }
  return static_cast<float>(a.scale / static_cast<double>(divisor));
}

}  // namespace qkernels
