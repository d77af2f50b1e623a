// conv on the CPU where activations stay floats: rows are gathered and go through the matrix product.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/conv.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Elements per thread below which starting another costs more than it gains.
constexpr int64_t kGatherGrain = 16 * 1024;
// Rows are gathered as many at a time as stay below this.
constexpr int64_t kGatherCap = int64_t{2} << 20;

// One group of channels of the gathered pixels times its weight, into `rows` of y.
void store_pixels(const ConvArgs& a, int64_t group, int64_t begin, int64_t end,
                  const uint8_t* rows) {
  const int64_t outputs = a.group_outputs(), size = bytes_of(a.y_type);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.pixels(), pixel = i % a.pixels();
    const uint8_t* row = rows + (i - begin) * outputs * size;
    uint8_t* y = static_cast<uint8_t*>(a.y);
    if (a.y_channels_last) {
      const int64_t at = i * a.out_channels + group * outputs;
      std::copy(row, row + outputs * size, y + at * size);
      continue;
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t at = (n * a.out_channels + group * outputs + o) * a.pixels() + pixel;
      std::copy(row + o * size, row + (o + 1) * size, y + at * size);
    }
  }
}

void run_float(const ConvArgs& a, const ConvWeight& w) {
  const int64_t pixels = a.batch * a.pixels(), outputs = a.group_outputs();
  const int64_t columns = w.packing.columns, size = bytes_of(a.x_type);
  const int64_t row_bytes = columns * size;
  const int64_t chunk =
      std::min(pixels, std::max<int64_t>(kPixelStep, kGatherCap / std::max<int64_t>(1, row_bytes)));
  Workspace workspace(Workspace::bytes<uint8_t>(chunk * row_bytes) +
                      Workspace::bytes<uint8_t>(chunk * outputs * size));
  uint8_t* rows = workspace.take<uint8_t>(chunk * row_bytes);
  uint8_t* results = workspace.take<uint8_t>(chunk * outputs * size);
  LinearArgs linear{};
  linear.x = rows;
  linear.x_type = a.x_type;
  linear.n = outputs;
  linear.layout = w.layout;
  linear.shape = w.shape;
  linear.activation = Activation::float_;
  linear.epilogue = a.epilogue;
  linear.bias_type = a.bias_type;
  linear.y = results;
  linear.y_type = a.y_type;
  const int64_t group_bytes = (outputs + kLanes - 1) / kLanes * w.shape.bytes;
  for (int64_t first = 0; first < pixels; first += chunk) {
    linear.rows = std::min(chunk, pixels - first);
    for (int64_t group = 0; group < a.groups; ++group) {
      parallel(linear.rows, grain_for(kGatherGrain, columns), [&](int64_t begin, int64_t end) {
        gather_pixels(a, group, first + begin, first + end, rows + begin * row_bytes);
      });
      linear.packed = a.packed + group * group_bytes;
      linear.bias = a.bias == nullptr ? nullptr
                                      : static_cast<const uint8_t*>(a.bias) +
                                            group * outputs * bytes_of(a.bias_type);
      run_linear(linear);
      parallel(linear.rows, grain_for(kGatherGrain, outputs), [&](int64_t begin, int64_t end) {
        store_pixels(a, group, first + begin, first + end, results + begin * outputs * size);
      });
    }
  }
}

void run_depthwise_float(const ConvArgs& a, const ConvWeight& w) {
  std::vector<float> rows(a.channels * a.taps()), weight(rows.size());
  std::vector<int64_t> indices(a.channels);
  for (int64_t c = 0; c < a.channels; ++c) indices[c] = c;
  const EmbeddingArgs every{indices.data(), a.channels, a.packed,  w.layout,
                            w.shape,        rows.data(), DType::f32};
  kernels().embedding(every, 0, a.channels);
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int64_t tap = 0; tap < a.taps(); ++tap) {
      weight[tap * a.channels + c] = rows[c * a.taps() + tap];
    }
  }
  const int64_t pixels = a.batch * a.pixels();
  parallel(pixels, grain_for(kConvGrain, a.taps() * a.channels * 4),
           [&](int64_t begin, int64_t end) { depthwise_float(a, weight.data(), begin, end); });
}

}  // namespace

void run_conv_float(const ConvArgs& a, const ConvWeight& w) {
  if (a.depthwise) {
    run_depthwise_float(a, w);
  } else {
    run_float(a, w);
  }
}

}  // namespace qkernels
