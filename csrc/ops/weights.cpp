// pack, unpack and embedding: checks and allocation, for the CPU and for CUDA.
#include "ops/weights.h"

#include "ops/checks.h"

namespace qkernels {
namespace {

Tensor pack(const Tensor& data_any, const Tensor& scale_any,
            const std::optional<Tensor>& zero_point, int64_t layout_id, int64_t in_features,
            int64_t group_size) {
  const DeviceGuard guard(data_any);
  const char* op = "pack";
  const Layout layout = check_layout(op, layout_id);
  check_sizes(op, in_features, 0, group_size);
  check_dtype(op, "data", data_any, storage_type(layout.format));
  if (data_any.dim() != 2) {
    fail(op, "data must have two dimensions (out_features, in_features as stored), got ",
         shape_text(data_any));
  }
  const int64_t n = data_any.size(0);
  PackArgs a{};
  a.layout = layout;
  a.shape = block_shape(layout, in_features, group_size);
  a.n = n;
  a.row_bytes = storage_bytes(layout.format, in_features);
  check_shape(op, "data", data_any, {n, a.row_bytes});
  check_dtype(op, "scale", scale_any, scalar_type(layout.scale));
  check_shape(op, "scale", scale_any, {n, a.shape.groups});
  const Tensor data = dense(data_any), scale = dense(scale_any);
  std::optional<Tensor> zeros;
  if (layout.symmetric && zero_point && zero_point->numel() != 0) {
    fail(op, "zero_point is given but the layout is symmetric; pass zero_point=None, or a layout ",
         "with symmetric=False");
  }
  if (!layout.symmetric) {
    if (!zero_point) fail(op, "the layout is asymmetric but zero_point is None; pass zero_point");
    check_dtype(op, "zero_point", *zero_point, storage_type(layout.format));
    check_shape(op, "zero_point", *zero_point, {n, a.shape.groups});
    zeros = dense(*zero_point);
    check_zero_points(op, *zeros, layout.format);
  }
  const int64_t blocks = (n + kLanes - 1) / kLanes;
  Tensor packed = empty_on_device({blocks, a.shape.bytes}, ScalarType::Byte);
  a.data = data.const_data_ptr();
  a.scale = scale.const_data_ptr();
  a.zero_point = zeros ? zeros->const_data_ptr() : nullptr;
  a.packed = packed.mutable_data_ptr<uint8_t>();
  if (packed.numel() != 0) run_pack(a);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed_any, int64_t layout_id,
                                          int64_t in_features, int64_t out_features,
                                          int64_t group_size) {
  const DeviceGuard guard(packed_any);
  const char* op = "unpack";
  const Layout layout = check_layout(op, layout_id);
  check_sizes(op, in_features, out_features, group_size);
  UnpackArgs a{};
  a.layout = layout;
  a.shape = block_shape(layout, in_features, group_size);
  a.n = out_features;
  a.row_bytes = storage_bytes(layout.format, in_features);
  const Tensor packed = check_packed(op, packed_any, a.shape, out_features);
  const ScalarType type = storage_type(layout.format);
  Tensor data = empty_on_device({out_features, a.row_bytes}, type);
  Tensor scale = empty_on_device({out_features, a.shape.groups}, scalar_type(layout.scale));
  Tensor zeros =
      empty_on_device(layout.symmetric ? Shape{0} : Shape{out_features, a.shape.groups}, type);
  a.packed = packed.const_data_ptr<uint8_t>();
  a.data = data.mutable_data_ptr();
  a.scale = scale.mutable_data_ptr();
  a.zero_point = zeros.mutable_data_ptr();
  if (scale.numel() != 0) run_unpack(a);
  return {data, scale, zeros};
}

Tensor embedding(const Tensor& indices_any, const Tensor& packed_any, int64_t layout_id,
                 int64_t num_embeddings, int64_t embedding_dim, int64_t group_size,
                 ScalarType dtype) {
  const DeviceGuard guard(packed_any);
  const char* op = "embedding";
  EmbeddingArgs a{};
  a.layout = check_layout(op, layout_id);
  check_sizes(op, embedding_dim, num_embeddings, group_size);
  a.shape = block_shape(a.layout, embedding_dim, group_size);
  a.n = num_embeddings;
  a.y_type = check_float_type(op, "dtype", dtype);
  const Tensor packed = check_packed(op, packed_any, a.shape, num_embeddings);
  check_device(op, "indices", indices_any);
  const ScalarType given = indices_any.scalar_type();
  if (given != ScalarType::Long && given != ScalarType::Int) {
    fail(op, "indices must be int64 or int32, got ", dtype_text(given),
         "; convert them with .long()");
  }
  Tensor indices = dense(indices_any);
  if (given == ScalarType::Int) indices = torch::stable::to(indices, ScalarType::Long);
  a.indices = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();
  // A GPU's kernel looks itself.
  for (int64_t i = 0; kReadable && i < count; ++i) {
    if (a.indices[i] < 0 || a.indices[i] >= num_embeddings) {
      fail(op, "index ", a.indices[i], " is out of range for num_embeddings=", num_embeddings);
    }
  }
  Shape shape = shape_of(indices);
  shape.push_back(embedding_dim);
  Tensor y = empty_on_device(shape, dtype);
  a.packed = packed.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  run_embedding(a, count);
  return y;
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("pack", TORCH_BOX(&qkernels::pack));
  m.impl("unpack", TORCH_BOX(&qkernels::unpack));
  m.impl("embedding", TORCH_BOX(&qkernels::embedding));
}
