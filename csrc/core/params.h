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
  float* scale_grad;       // [rows, groups], also of a shared scale
  float* zero_grad;        // the same, or null
  int64_t cols, groups, group_size;
  Format format;
  bool symmetric;
  bool shared_scale;
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

  const void* bias;  // [n] or null
  DType bias_type;
  Epilogue epilogue;
  void* y;       // [rows, n]
  DType y_type;  // i32: raw sums (int_mm), no epilogue

  // Workspace, for all rows. `panel` holds `panel_bytes` of the ISA; the others are unused when the
  // activations stay float.
  uint8_t* panel;
  float* row_scale;     // [rows]; NaN for a row that held NaN or Inf
  float* row_zero;      // [rows]; zero points as floats
  int32_t* group_sums;  // sums of the rows' codes by group, in an order that the ISA chooses
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

struct EmbeddingArgs {
  const int64_t* indices;
  const uint8_t* packed;
  Layout layout;
  BlockShape shape;
  void* y;  // [indices, k]
  DType y_type;
};

}  // namespace qkernels
