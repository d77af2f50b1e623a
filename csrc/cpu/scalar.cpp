// The reference: every kernel in plain loops. Other ISAs copy this table and override rows; the
// integer paths must equal it to the bit.
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scalar_int8.h"
#include "cpu/scalar_transformer.h"

namespace qkernels {
namespace scalar {

// ---- Quantize -----------------------------------------------------------------------------------

Range range(const void* x, DType type, int64_t begin, int64_t end) {
  Range result;
  for (int64_t i = begin; i < end; ++i) extend(&result, load_float(x, type, i));
  return result;
}

void encode_group(const QuantizeArgs& a, int64_t row, int64_t begin, int64_t end,
                  const Affine& affine) {
  uint8_t* out = static_cast<uint8_t*>(a.data) + row * a.row_bytes;
  for (int64_t k = begin; k < end; ++k) {
    const float x = load_float(a.x, a.x_type, row * a.cols + k);
    store_code(out, a.format, k, encode(x, a.format, affine, a.symmetric));
  }
}

void quantize(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t begin = g * a.group_size;
      const int64_t end = begin + a.group_size < a.cols ? begin + a.group_size : a.cols;
      const Range r = range(a.x, a.x_type, row * a.cols + begin, row * a.cols + end);
      const Affine affine = choose_affine(r, a.format, a.symmetric, a.scale_type);
      store_float(a.scale, a.scale_type, row * a.groups + g, affine.scale);
      if (!a.symmetric) {
        store_zero_point(a.zero_point, a.format, row * a.groups + g, affine.zero_point);
      }
      encode_group(a, row, begin, end, affine);
    }
  }
}

void quantize_with(const QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t begin = g * a.group_size;
      const int64_t end = begin + a.group_size < a.cols ? begin + a.group_size : a.cols;
      const int64_t at = a.shared_scale ? 0 : row * a.groups + g;
      const float scale = load_float(a.scale, a.scale_type, at);
      const int zero =
          a.symmetric ? symmetric_zero(a.format) : load_zero_point(a.zero_point, a.format, at);
      encode_group(a, row, begin, end, {scale, 1.0f / scale, zero});
    }
  }
}

void dequantize(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint8_t* codes = static_cast<const uint8_t*>(a.data) + row * a.row_bytes;
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t begin = g * a.group_size;
      const int64_t end = begin + a.group_size < a.cols ? begin + a.group_size : a.cols;
      const int64_t at = a.shared_scale ? 0 : row * a.groups + g;
      const float scale = load_float(a.scale, a.scale_type, at);
      const int zero = a.zero_point == nullptr ? symmetric_zero(a.format)
                                               : load_zero_point(a.zero_point, a.format, at);
      for (int64_t k = begin; k < end; ++k) {
        const float value = decode(load_code(codes, a.format, k), a.format, scale, zero);
        store_float(a.y, a.y_type, row * a.cols + k, value);
      }
    }
  }
}

// ---- Fake quantize ------------------------------------------------------------------------------

void fake_quantize(const FakeQuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t begin = row * a.cols + g * a.group_size;
      const int64_t end = std::min(begin + a.group_size, (row + 1) * a.cols);
      const Affine affine = a.scale != nullptr ? given_affine(a, row, g)
                                               : choose_affine(range(a.x, a.type, begin, end),
                                                               a.format, a.symmetric, a.scale_type);
      for (int64_t i = begin; i < end; ++i) {
        store_float(a.y, a.type, i,
                    fake(load_float(a.x, a.type, i), a.format, affine, a.symmetric));
      }
    }
  }
}

void fake_quantize_backward(const FakeBackwardArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t begin = row * a.cols + g * a.group_size;
      const int64_t end = std::min(begin + a.group_size, (row + 1) * a.cols);
      const Affine affine = given_affine(a, row, g);
      float scale_sums[kSumLanes] = {}, zero_sums[kSumLanes] = {};
      for (int64_t i = begin; i < end; ++i) {
        const float grad = load_float(a.grad, a.type, i);
        const FakeSlopes s =
            fake_slopes(load_float(a.x, a.type, i), grad, a.format, affine, a.symmetric);
        float& scale_sum = scale_sums[(i - begin) % kSumLanes];
        scale_sum = std::fma(grad, s.slope, scale_sum);
        zero_sums[(i - begin) % kSumLanes] += s.clipped;
        store_float(a.dx, a.type, i, s.dx);
      }
      const int64_t at = row * a.groups + g;
      a.scale_grad[at] = sum_lanes(scale_sums);
      if (a.zero_grad != nullptr) a.zero_grad[at] = -affine.scale * sum_lanes(zero_sums);
    }
  }
}

// ---- Linear -------------------------------------------------------------------------------------
// Panel: int8 or float [rows][k_padded], zero in the padding.

bool is_float(const LinearArgs& a) { return a.activation == Activation::float_; }

int row_tile(const LinearArgs&) { return 1; }
int block_tile(const LinearArgs&) { return 1; }
int64_t panel_bytes(const LinearArgs& a) {
  return a.rows * a.shape.k_padded * (is_float(a) ? 4 : 1);
}

void prepare_float(const LinearArgs& a, int64_t row, float* panel) {
  for (int64_t g = 0; g < a.shape.groups; ++g) {
    float* out = panel + a.shape.padded_begin(g);
    const int64_t length = a.shape.group_length(g);
    for (int64_t i = 0; i < length; ++i) {
      out[i] = activation_at(a, row, a.shape.group_begin(g) + i);
    }
    for (int64_t i = length; i < a.shape.padded_length(g); ++i) out[i] = 0.0f;
  }
}

void prepare_int8(const LinearArgs& a, int64_t row, int8_t* panel) {
  Affine affine{1.0f, 1.0f, 0};
  const bool given = a.x_type == DType::i8;
  if (!given) {
    Range r;
    for (int64_t i = 0; i < a.shape.k; ++i) extend(&r, activation_at(a, row, i));
    affine = activation_affine(a, r);
    a.row_scale[row] = affine.scale;
    a.row_zero[row] = static_cast<float>(affine.zero_point);
  }
  const bool symmetric = a.activation == Activation::int8_symmetric;
  for (int64_t g = 0; g < a.shape.groups; ++g) {
    int8_t* out = panel + a.shape.padded_begin(g);
    const int64_t length = a.shape.group_length(g);
    int32_t sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = a.shape.group_begin(g) + i;
      const int code = given ? static_cast<const int8_t*>(a.x)[row * a.shape.k + k]
                             : encode(activation_at(a, row, k), Format::int8, affine, symmetric);
      out[i] = static_cast<int8_t>(code);
      sum += code;
    }
    for (int64_t i = length; i < a.shape.padded_length(g); ++i) out[i] = 0;
    a.group_sums[row * a.shape.groups + g] = sum;
  }
}

void prepare(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    uint8_t* panel = a.panel + row * a.shape.k_padded * (is_float(a) ? 4 : 1);
    if (is_float(a)) {
      prepare_float(a, row, reinterpret_cast<float*>(panel));
    } else {
      prepare_int8(a, row, reinterpret_cast<int8_t*>(panel));
    }
  }
}

// Exact sum over a group of code(x) * (code(w) - offset).
int32_t dot(const LinearArgs& a, const uint8_t* weight, int64_t row, int64_t g, int lane,
            int offset) {
  const int64_t begin = a.shape.padded_begin(g);
  const int8_t* x = reinterpret_cast<const int8_t*>(a.panel) + row * a.shape.k_padded + begin;
  int32_t sum = 0;
  for (int64_t i = 0; i < a.shape.padded_length(g); ++i) {
    sum += x[i] * packed_code(weight, a.layout.format, begin + i, lane);
  }
  return sum - offset * a.group_sums[row * a.shape.groups + g];
}

float dot_int8(const LinearArgs& a, const uint8_t* weight, int64_t row, int64_t g, int lane) {
  const int zero = packed_zero(weight, a.layout, a.shape, g, lane);
  if (a.layout.format == Format::int8) {
    return static_cast<float>(dot(a, weight, row, g, lane, zero));
  }
  const int32_t codes = a.group_sums[row * a.shape.groups + g];
  return int4_dot(dot(a, weight, row, g, lane, kInt4Offset), codes, zero);
}

float dot_float(const LinearArgs& a, const uint8_t* weight, int64_t row, int64_t g, int lane) {
  const int64_t begin = a.shape.padded_begin(g);
  const float* x = reinterpret_cast<const float*>(a.panel) + row * a.shape.k_padded + begin;
  const int zero = packed_zero(weight, a.layout, a.shape, g, lane);
  float sum = 0.0f;
  for (int64_t i = 0; i < a.shape.group_length(g); ++i) {
    const int code = packed_code(weight, a.layout.format, begin + i, lane);
    sum = std::fma(x[i], decode(code, a.layout.format, 1.0f, zero), sum);
  }
  return sum;
}

void linear(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
            int64_t row_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    const uint8_t* weight = a.packed + block * a.shape.bytes;
    for (int64_t row = row_begin; row < row_end; ++row) {
      for (int lane = 0; lane < kLanes && block * kLanes + lane < a.n; ++lane) {
        const int64_t n = block * kLanes + lane;
        if (a.y_type == DType::i32) {
          static_cast<int32_t*>(a.y)[row * a.n + n] = dot(a, weight, row, 0, lane, 0);
          continue;
        }
        float sum = 0.0f;
        for (int64_t g = 0; g < a.shape.groups; ++g) {
          const float part =
              is_float(a) ? dot_float(a, weight, row, g, lane) : dot_int8(a, weight, row, g, lane);
          sum = std::fma(part, packed_scale(weight, a.layout, a.shape, g, lane), sum);
        }
        const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, n);
        float y;
        if (is_float(a)) {
          y = apply_epilogue(sum + bias, a.epilogue);
        } else {
          const float weight_sum = load_float(weight + a.shape.bias, DType::f32, lane);
          y = finish(a, row, sum, weight_sum, bias);
        }
        store_float(a.y, a.y_type, row * a.n + n, y);
      }
    }
  }
}

const char* linear_name(const LinearArgs& a) {
  const bool float_activation = a.activation == Activation::float_;
  switch (a.layout.format) {
    case Format::int8:
      return float_activation ? "matmul_w8a16_scalar" : "matmul_w8a8_scalar";
    case Format::int4:
      return float_activation ? "matmul_w4a16_scalar" : "matmul_w4a8_scalar";
    default:
      return "matmul_nf4a16_scalar";
  }
}

// ---- Backward and embedding ---------------------------------------------------------------------

float weight_at(const uint8_t* packed, const Layout& layout, const BlockShape& shape, int64_t n,
                int64_t k) {
  const uint8_t* row = packed + n / kLanes * shape.bytes;
  const int lane = static_cast<int>(n % kLanes);
  const int64_t g = k / shape.group_size;
  const int64_t kp = shape.padded_begin(g) + k - shape.group_begin(g);
  return decode(packed_code(row, layout.format, kp, lane), layout.format,
                packed_scale(row, layout, shape, g, lane),
                packed_zero(row, layout, shape, g, lane));
}

void backward(const BackwardArgs& a, int64_t row_begin, int64_t row_end, int64_t k_begin,
              int64_t k_end, float*) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t k = k_begin; k < k_end; ++k) {
      float sum = 0.0f;
      for (int64_t n = 0; n < a.n; ++n) {
        const float dy = load_float(a.dy, a.type, row * a.n + n);
        sum = std::fma(dy, weight_at(a.packed, a.layout, a.shape, n, k), sum);
      }
      store_float(a.dx, a.type, row * a.shape.k + k, sum);
    }
  }
}

void embedding(const EmbeddingArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < a.shape.k; ++k) {
      store_float(a.y, a.y_type, row * a.shape.k + k,
                  weight_at(a.packed, a.layout, a.shape, a.indices[row], k));
    }
  }
}

// ---- Convolution --------------------------------------------------------------------------------

int conv_code_bytes(const ConvArgs&) { return 1; }
bool conv_reads_codes(const ConvArgs&) { return true; }

// The code of channel `c` of an image at a position of x.
int8_t conv_code(const ConvArgs& a, int64_t n, int64_t c, const int64_t (&source)[3]) {
  const int64_t pixels = a.in[0] * a.in[1] * a.in[2];
  const int64_t pixel = (source[0] * a.in[1] + source[1]) * a.in[2] + source[2];
  const int64_t at = a.x_channels_last ? (n * pixels + pixel) * a.channels + c
                                       : (n * a.channels + c) * pixels + pixel;
  if (a.x_type == DType::i8) return static_cast<const int8_t*>(a.x)[at];
  const ImageCodes& codes = a.codes[n];
  const Affine affine{codes.scale, codes.inverse, codes.zero};
  return static_cast<int8_t>(
      encode(load_float(a.x, a.x_type, at), Format::int8, affine, a.symmetric));
}

void conv_prepare(const ConvArgs& a, uint8_t* image, int64_t begin, int64_t end) {
  const int64_t group = a.channels / a.groups;
  const int64_t padded = a.depthwise ? 1 : a.group_channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / (a.grid[0] * a.grid[1]);
    int64_t source[3] = {conv_source(a, 0, row / a.grid[1] % a.grid[0]),
                         conv_source(a, 1, row % a.grid[1]), 0};
    for (int64_t i = 0; i < a.grid[2]; ++i) {
      source[2] = conv_source(a, 2, i);
      int8_t* pixel = reinterpret_cast<int8_t*>(image) + (row * a.grid[2] + i) * a.pixel_codes();
      std::memset(pixel, a.codes[n].zero, static_cast<size_t>(a.pixel_codes()));
      if (source[0] < 0 || source[1] < 0 || source[2] < 0) continue;
      for (int64_t c = 0; c < a.channels; ++c) {
        pixel[c / group * padded + c % group] = conv_code(a, n, c, source);
      }
    }
  }
}

// Exact sum over the taps and channels of (code(x) - zero) * code(w).
int32_t conv_dot(const ConvArgs& a, const int8_t* image, int zero, const uint8_t* weight,
                 int lane) {
  const int64_t depth = a.depthwise ? 1 : a.compact ? a.channels : a.group_channels;
  int32_t sum = 0;
  int64_t k = 0;
  for (int64_t z = 0; z < a.kernel[0]; ++z) {
    for (int64_t y = 0; y < a.kernel[1]; ++y) {
      for (int64_t x = 0; x < a.kernel[2]; ++x) {
        const int64_t at =
            (z * a.dilation[0] * a.grid[1] + y * a.dilation[1]) * a.grid[2] + x * a.dilation[2];
        for (int64_t c = 0; c < depth; ++c, ++k) {
          sum +=
              (image[at * a.pixel_codes() + c] - zero) * packed_code(weight, Format::int8, k, lane);
        }
      }
      if (a.compact) k = round_up(k, 4);
    }
  }
  return sum;
}

void conv(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
          int64_t pixel_end) {
  for (int64_t i = pixel_begin; i < pixel_end; ++i) {
    const int64_t n = i / a.pixels(), pixel = i % a.pixels();
    const int64_t at[3] = {pixel / (a.out[1] * a.out[2]), pixel / a.out[2] % a.out[1],
                           pixel % a.out[2]};
    const int64_t corner =
        (at[0] * a.stride[0] * a.grid[1] + at[1] * a.stride[1]) * a.grid[2] + at[2] * a.stride[2];
    const int8_t* image =
        reinterpret_cast<const int8_t*>(a.image) + n * a.image_codes() + corner * a.pixel_codes();
    for (int64_t block = block_begin; block < block_end; ++block) {
      const uint8_t* weight = a.packed + block * a.shape.bytes;
      const int64_t group = block / a.group_blocks();
      const int64_t first = block % a.group_blocks() * kLanes;
      const int64_t outputs = a.depthwise ? a.out_channels : a.group_outputs();
      for (int lane = 0; lane < kLanes && first + lane < outputs; ++lane) {
        const int64_t o = group * outputs + first + lane;
        const int8_t* x = image + (a.depthwise ? o : group * a.group_channels);
        const int32_t sum = conv_dot(a, x, a.codes[n].zero, weight, lane);
        const float scale = load_float(weight + a.shape.scales, a.scale_type, lane);
        const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, o);
        float y = std::fma(a.codes[n].scale, static_cast<float>(sum) * scale, bias);
        const int64_t to = conv_output(a, n, pixel, o);
        if (a.residual != nullptr) y += conv_residual(a, to);
        conv_store(a, to, apply_epilogue(y, a.epilogue));
      }
    }
  }
}

const char* conv_name(bool depthwise) {
  return depthwise ? "conv_depthwise_w8a8_scalar" : "conv_w8a8_scalar";
}

const Kernels kTable = {
    "scalar",
    quantize,
    quantize_with,
    range,
    dequantize,
    fake_quantize,
    fake_quantize_backward,
    row_tile,
    block_tile,
    panel_bytes,
    prepare,
    linear,
    linear_name,
    backward,
    embedding,
    conv_code_bytes,
    conv_reads_codes,
    conv_prepare,
    conv,
    conv_name,
    max_pool,
    avg_pool,
    add,
    lookup,
    attention_tile,
    attention_scratch,
    attention,
    add_norm,
};

}  // namespace scalar

const Kernels* scalar_kernels() { return &scalar::kTable; }

}  // namespace qkernels
