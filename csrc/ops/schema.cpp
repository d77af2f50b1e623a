// Every op's schema. The fakes and gradients are in qkernels/ops*.py.
#include "ops/device.h"

QK_SCHEMAS(m) {
  m.def(
      "quantize(Tensor x, int format, int? group_size=-1, bool symmetric=True, "
      "ScalarType? scale_dtype=None) -> (Tensor data, Tensor scale, Tensor zero_point)");
  m.def(
      "quantize.out(Tensor x, int format, int? group_size=-1, bool symmetric=True, *, "
      "Tensor(a!) data, Tensor(b!) scale, Tensor(c!) zero_point) -> ()");
  m.def(
      "quantize_with(Tensor x, Tensor scale, Tensor? zero_point, int format, "
      "int? group_size=-1) -> Tensor");
  m.def(
      "quantize_with.out(Tensor x, Tensor scale, Tensor? zero_point, int format, "
      "int? group_size=-1, *, Tensor(a!) out) -> ()");
  m.def(
      "dequantize(Tensor data, Tensor scale, Tensor? zero_point, int format, int? group_size, "
      "int features, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize.out(Tensor data, Tensor scale, Tensor? zero_point, int format, int? group_size, "
      "*, Tensor(a!) out) -> ()");
  m.def(
      "fake_quantize(Tensor x, int format, int? group_size=-1, bool symmetric=True, "
      "ScalarType? scale_dtype=None) -> Tensor");
  m.def(
      "fake_quantize_with(Tensor x, Tensor scale, Tensor? zero_point, int format, "
      "int? group_size=-1) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, int format, "
      "int? group_size=-1) -> (Tensor x, Tensor scale, Tensor zero_point)");
  m.def(
      "pack(Tensor data, Tensor scale, Tensor? zero_point, int layout, int in_features, "
      "int group_size) -> Tensor");
  m.def(
      "unpack(Tensor packed, int layout, int in_features, int out_features, int group_size) "
      "-> (Tensor data, Tensor scale, Tensor zero_point)");
  m.def("int_mm(Tensor a, Tensor b) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? x_scale, Tensor? x_zero_point, "
      "Tensor? x_premul, Tensor? k_perm, int layout, int in_features, int out_features, "
      "int group_size, int activation, int epilogue) -> Tensor");
  m.def(
      "linear_shared(Tensor x, Tensor[] packed, Tensor?[] bias, int layout, int in_features, "
      "int[] out_features, int group_size, int activation, int[] epilogue) -> Tensor[]");
  m.def(
      "linear_differentiable(Tensor x, Tensor packed, Tensor? bias, Tensor? x_scale, "
      "Tensor? x_zero_point, Tensor? x_premul, Tensor? k_perm, int layout, int in_features, "
      "int out_features, int group_size, int activation, int epilogue) -> Tensor");
  m.def(
      "linear_backward_input(Tensor grad, Tensor packed, int layout, int in_features, "
      "int out_features, int group_size) -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor packed, int layout, int num_embeddings, "
      "int embedding_dim, int group_size, ScalarType dtype) -> Tensor");
  m.def(
      "pack_conv(Tensor data, Tensor scale, Tensor? zero_point, int layout, int taps, "
      "int group_channels, int groups, int group_size) -> Tensor");
  m.def(
      "unpack_conv(Tensor packed, int layout, int taps, int group_channels, int groups, "
      "int out_channels, int group_size) -> (Tensor data, Tensor scale, Tensor zero_point)");
  m.def(
      "conv(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? x_scale, "
      "Tensor? x_zero_point, Tensor? residual_scale, Tensor? residual_zero_point, Tensor? y_scale, "
      "Tensor? y_zero_point, int layout, int out_channels, int groups, int group_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool transposed, "
      "int activation, int epilogue, ScalarType? dtype=None) -> Tensor");
  m.def(
      "conv_differentiable(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? "
      "x_scale, "
      "Tensor? x_zero_point, Tensor? residual_scale, Tensor? residual_zero_point, Tensor? y_scale, "
      "Tensor? y_zero_point, int layout, int out_channels, int groups, int group_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool transposed, "
      "int activation, int epilogue, ScalarType? dtype=None) -> Tensor");
  m.def(
      "conv_sequence(Tensor[] inputs, Tensor?[] constants, int layout, int[] wiring, "
      "int[] settings, int[] outputs) -> Tensor[]");
  m.def(
      "max_pool(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode) -> Tensor");
  m.def(
      "avg_pool(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor? y_scale, "
      "Tensor? y_zero_point, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override, ScalarType? dtype=None) -> Tensor");
  m.def(
      "adaptive_avg_pool(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor? y_scale, "
      "Tensor? y_zero_point, int[] output_size, ScalarType? dtype=None) -> Tensor");
  m.def(
      "add(Tensor a, Tensor b, Tensor a_scale, Tensor? a_zero_point, Tensor b_scale, "
      "Tensor? b_zero_point, Tensor? y_scale, Tensor? y_zero_point, int epilogue, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "concat(Tensor[] xs, Tensor scales, Tensor? zero_points, Tensor y_scale, "
      "Tensor? y_zero_point, int dim) -> Tensor");
  m.def("lookup(Tensor x, Tensor table) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, float scale, bool causal) "
      "-> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, "
      "bool keep_sum) -> (Tensor y, Tensor sum)");
  m.def("op_sequence(Tensor[] inputs, int[] program, float[] factors, int[] outputs) -> Tensor[]");
}
