// What the glue hands to a kernel: plain pointers and numbers, checked already.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace qkernels {

// Rows of codes and their scales, in storage layout. Groups are counted along a row.
struct QuantizeArgs {
  const void* x;  // [rows, cols]
  DType x_type;
  void* data;   // [rows, row_bytes]
  void* scale;  // [rows, groups]
  DType scale_type;
  void* zero_point;  // [rows, groups]; null when symmetric
  int64_t cols, groups, group_size, row_bytes;
  Format format;
  bool symmetric;
  bool shared_scale;  // per tensor: every row uses scale[0]
};

struct DequantizeArgs {
  const void* data;  // [rows, row_bytes]
  const void* scale;
  DType scale_type;
  const void* zero_point;  // null when symmetric
  void* y;                 // [rows, cols]
  DType y_type;
  int64_t cols, groups, group_size, row_bytes;
  Format format;
  bool shared_scale;
};

// y = x quantized and dequantized. Where `scale` is null, each group chooses its own.
struct FakeQuantizeArgs {
  const void* x;  // [rows, cols]
  void* y;        // [rows, cols]
  DType type;     // of x and y
  const void* scale;
  DType scale_type;
  const void* zero_point;  // null when symmetric, or chosen
  bool float_zeros;        // zero points are float32, in codes, and rounded to steps; CUDA alone
  int64_t cols, groups, group_size;
  Format format;
  bool symmetric;
  bool shared_scale;
};

struct FakeBackwardArgs {
  const void* grad;  // [rows, cols], of y
  const void* x;
  void* dx;
  DType type;  // of grad, x and dx
  const void* scale;
  DType scale_type;
  const void* zero_point;  // null when symmetric
  bool float_zeros;        // as above
  float* scale_grad;       // [rows, groups], also of a shared scale
  float* zero_grad;        // the same, or null
  int64_t cols, groups, group_size;
  Format format;
  bool symmetric;
  bool shared_scale;
};

// Storage layout to packed blocks, and back.
struct PackArgs {
  const void* data;        // [n, row_bytes], storage layout
  const void* scale;       // [n, groups], in the layout's type
  const void* zero_point;  // [n, groups] or null
  uint8_t* packed;         // [blocks, shape.bytes]
  int64_t n, row_bytes;
  Layout layout;
  BlockShape shape;
};

struct UnpackArgs {
  const uint8_t* packed;
  void* data;
  void* scale;
  void* zero_point;
  int64_t n, row_bytes;
  Layout layout;
  BlockShape shape;
};

// y[rows, n] = x[rows, k] . packed[n, k], in two steps. `prepare` turns rows of x into what the
// ISA's tiles read and writes the workspace; `linear` reads only the workspace and the weight.
struct LinearArgs {
  const void* x;  // [rows, k]
  DType x_type;   // i8: the codes themselves (int_mm)
  int64_t rows, n;
  const float* premul;  // [k] or null: x is multiplied by it first
  const int64_t* perm;  // [k] or null: column i of the weight belongs to x[perm[i]]

  const uint8_t* packed;
  Layout layout;
  BlockShape shape;

  Activation activation;
  bool is_static;  // scale and zero point are given below, not chosen per row
  float static_scale;
  int static_zero_point;
  const float* device_scale;        // the same for kernels on a GPU, in its memory
  const int8_t* device_zero_point;  // null: 0

  const void* bias;  // [n] or null
  DType bias_type;
  Epilogue epilogue;
  void* y;       // [rows, n]
  DType y_type;  // i32: raw sums (int_mm), no epilogue

  // Workspace, for all rows. `panel` holds `panel_bytes` of the ISA; the scales and zero points
  // are unused when the activations stay float.
  uint8_t* panel;
  float* row_scale;  // [rows]; NaN for a row that held NaN or Inf
  float* row_zero;   // [rows]; zero points as floats
  // [rows * groups], in an order that the ISA chooses: sums by group of the rows' codes or, where x
  // stays float and int4 weights have zero points, of x. What counts as a float has its bits here.
  int32_t* group_sums;
};

// Columns [k_begin, k_end) of packed matrices [n, k], one behind the other, as floats; CUDA alone.
struct DequantizePackedArgs {
  const uint8_t* packed;
  Layout layout;
  BlockShape shape;
  int64_t matrices, n;
  int64_t k_begin, k_end;
  void* y;  // [matrices * n, k_end - k_begin]
  DType y_type;
};

// y = f(x + bias), element by element; CUDA alone. Element i of x and y is of channel
// i / inner % channels. x may be y.
struct FinishArgs {
  const void* x;
  void* y;
  DType type;  // of both
  int64_t count, channels, inner;
  const void* bias;  // [channels] or null
  DType bias_type;
  Epilogue epilogue;
};

// dx[rows, k] = dy[rows, n] . W[n, k], dequantized a panel at a time.
struct BackwardArgs {
  const void* dy;  // [rows, n]
  int64_t rows, n;
  const uint8_t* packed;
  Layout layout;
  BlockShape shape;
  void* dx;
  DType type;  // of dy and dx
};

// How the numbers of an image became codes.
struct ImageCodes {
  float scale;  // NaN for an image that held NaN or Inf
  float inverse;
  int zero;
  bool plain;  // chosen for the image's own numbers: no quotient is NaN or far out of range
};

// Scale and zero point of a tensor of codes: numbers for kernels on a CPU, pointers for those on a
// GPU, where a zero point that is null is 0.
struct GivenCodes {
  float scale = 1.0f;
  int zero = 0;
  const float* device_scale = nullptr;
  const int8_t* device_zero = nullptr;
};

// A convolution with int8 weights and activations, in two steps. `conv_prepare` lays x out as
// `image`: int8 codes with the channels innermost and zeros around and between, in a form that the
// ISA chooses. `conv` reads the image. Spatial dimensions that x lacks come first and have size 1.
struct ConvArgs {
  int64_t batch, channels, out_channels, groups;
  int64_t in[3], out[3], kernel[3], stride[3], dilation[3];
  int64_t before[3];  // zeros in front of x; fewer than 0 cut it off
  int64_t step[3];    // from one element of x to the next, with zeros between
  int64_t grid[3];    // extent of the image that the kernel slides over
  // Packed as [out_channels, taps * group_channels], where channels that a group lacks have weight
  // 0; a depthwise weight as [channels, taps].
  bool depthwise;
  int64_t group_channels;
  // Fewer than 4 channels, side by side in image and weight: a row of the kernel is one of
  // row_codes() codes. The last ones belong to what follows in the image, and have weight 0.
  bool compact;

  const void* x;  // [batch, channels, in]
  DType x_type;   // i8: the codes themselves
  bool x_channels_last;
  bool symmetric;  // the codes of x
  bool is_static;  // x_codes are given for all images, not chosen for each
  GivenCodes x_codes;

  const uint8_t* packed;  // a group's blocks before the next one's
  BlockShape shape;
  DType scale_type;

  const void* bias;  // [out_channels] or null
  DType bias_type;
  const void* residual;  // as y, in a type of its own, or null
  DType residual_type;   // i8: codes
  GivenCodes residual_codes;
  float residual_scale;
  int residual_zero;
  Epilogue epilogue;
  void* y;       // [batch, out_channels, out]
  DType y_type;  // i8: codes
  GivenCodes y_codes;
  float y_inverse;
  int y_zero;
  bool y_channels_last;

  const uint8_t* image;     // workspace, or x itself, [batch, grid, pixel_codes()] codes
  const ImageCodes* codes;  // [batch]

  QK_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  QK_HD int64_t group_outputs() const { return out_channels / groups; }
  // Blocks of 16 outputs of a group; a depthwise convolution has one group for this purpose.
  QK_HD int64_t group_blocks() const {
    return ((depthwise ? out_channels : group_outputs()) + kLanes - 1) / kLanes;
  }
  QK_HD int64_t blocks() const { return depthwise ? group_blocks() : groups * group_blocks(); }
  // Codes of a pixel of the image.
  QK_HD int64_t pixel_codes() const {
    if (compact) return channels;
    return depthwise ? round_up(channels, kLanes) : groups * group_channels;
  }
  QK_HD int64_t row_codes() const { return round_up(kernel[2] * channels, 4); }
  QK_HD int64_t image_codes() const { return grid[0] * grid[1] * grid[2] * pixel_codes(); }
  QK_HD int64_t pixels() const { return out[0] * out[1] * out[2]; }  // of an image of y
};

// The largest or the mean code of every window of an image of int8 codes. Spatial dimensions that x
// lacks come first and have size 1.
struct PoolArgs {
  const int8_t* x;  // [batch, channels, in]
  void* y;          // [batch, channels, out]
  DType y_type;     // i8: codes
  bool channels_last;
  int64_t batch, channels;
  int64_t in[3], out[3];
  bool adaptive;  // windows follow from `in` and `out`, not from what is next
  int64_t kernel[3], stride[3], before[3], dilation[3];

  // Of means alone.
  GivenCodes x_codes, y_codes;
  int x_zero, y_zero;  // of them, on a CPU
  double scale;        // of x over that of y, on a CPU
  bool count_padding;  // a window's size counts what lies in the borders
  int64_t divisor;     // of every sum; 0: the size of its window

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  // Lines of y along its last spatial dimension.
  int64_t lines() const { return batch * (channels_last ? 1 : channels) * out[0] * out[1]; }
};

// y = epilogue(a + b), element by element.
struct AddArgs {
  const int8_t* a;
  const int8_t* b;
  GivenCodes a_codes, b_codes, y_codes;
  float a_scale, b_scale;  // of them, and what follows from them, on a CPU
  int a_zero, b_zero;
  Epilogue epilogue;
  void* y;
  DType y_type;  // i8: codes
  float y_inverse;
  int y_zero;
};

// y = table[x + 128], code by code.
struct LookupArgs {
  const int8_t* x;
  int8_t* y;
  const int8_t* table;  // [256]
};

// Rows of codes into rows of y, brought to its scale and zero point.
struct ConcatArgs {
  const int8_t* x;  // [rows, cols]
  int8_t* y;        // rows `pitch` codes apart
  int64_t rows, cols, pitch;
  GivenCodes x_codes, y_codes;
};

struct EmbeddingArgs {
  const int64_t* indices;
  int64_t n;  // output features of the weight
  const uint8_t* packed;
  Layout layout;
  BlockShape shape;
  void* y;  // [indices, k]
  DType y_type;
};

// softmax(scale * q . k^T + mask) . v for every head of every sequence. The last dimension of q, k,
// v and y is dense.
struct AttentionArgs {
  const void* q;  // [batch, heads, rows, head_size]
  const void* k;  // [batch, heads / group, keys, head_size]
  const void* v;  // [batch, heads / group, keys, value_size]
  void* y;        // [batch, heads, rows, value_size]
  DType type;     // of all four
  int64_t batch, heads, group, rows, keys, head_size, value_size;
  // In elements: from one sequence, one head and one row to the next.
  int64_t q_step[3], k_step[3], v_step[3], y_step[3];

  const void* mask;  // added to the scores; [batch, heads, rows, keys], or null
  DType mask_type;
  bool mask_is_bool;  // true adds 0 and false -Inf; mask_type does not matter
  int64_t mask_step[4];
  float scale;
  bool causal;  // row i sees keys up to i
};

// y = norm(x + residual) * weight + bias, row by row.
struct NormArgs {
  const void* x;         // [rows, cols]
  const void* residual;  // the same, or null
  void* y;
  void* sum;           // x + residual, rounded to the type; null if it is not wanted
  DType type;          // of all four
  const void* weight;  // [cols] or null
  const void* bias;    // [cols] or null
  DType weight_type;   // of both
  int64_t rows, cols;
  float eps;
  bool rms;  // the mean is not subtracted
};

}  // namespace qkernels
