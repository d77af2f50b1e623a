// Packing of conv's weights, for the CPU and for CUDA.
#include "ops/conv.h"
#include "ops/weights.h"

namespace qkernels {

ConvWeight check_conv_weight(const char* op, int64_t layout_id, int64_t taps,
                             int64_t group_channels, int64_t groups, int64_t out_channels,
                             int64_t group_size) {
  if (taps < 1 || taps > kConvTaps) {
    fail(op, "the kernel must have from 1 to ", kConvTaps, " taps, got ", taps);
  }
  if (groups < 1 || out_channels < 0 || out_channels % groups != 0) {
    fail(op, "out_channels must be a multiple of groups, got ", out_channels, " and ", groups);
  }
  if (group_channels < 0 || group_channels > kMaxFeatures / taps) {
    fail(op, "the channels of a group must be from 0 to 2^40 / taps, got ", group_channels);
  }
  check_sizes(op, taps * group_channels, out_channels, group_size);
  ConvWeight w;
  w.layout = check_layout(op, layout_id);
  w.packing = conv_packing(w.layout, taps, group_channels, groups, out_channels, group_size);
  w.shape = block_shape(w.layout, w.packing.columns, group_size);
  return w;
}

void check_packed_shape(const char* op, const Tensor& packed, const ConvWeight& w) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  const Shape want{w.packing.blocks(), w.shape.bytes};
  if (shape_of(packed) != want) {
    fail(op, "packed must have shape ", text_of(want), " for this convolution, got ",
         shape_text(packed), "; pack the weight with torch.ops.qkernels.pack_conv and the same ",
         "layout, sizes and group_size");
  }
}

namespace {

Tensor pack_conv(const Tensor& data_any, const Tensor& scale_any,
                 const std::optional<Tensor>& zero_point, int64_t layout_id, int64_t taps,
                 int64_t group_channels, int64_t groups, int64_t group_size) {
  const DeviceGuard guard(data_any);
  const char* op = "pack_conv";
  if (data_any.dim() != 2) {
    fail(op, "data must have two dimensions (out_channels, taps * channels of a group as stored), ",
         "got ", shape_text(data_any));
  }
  const int64_t out_channels = data_any.size(0);
  const ConvWeight w =
      check_conv_weight(op, layout_id, taps, group_channels, groups, out_channels, group_size);
  const Layout& layout = w.layout;
  const int64_t given = taps * group_channels;
  check_dtype(op, "data", data_any, storage_type(layout.format));
  check_shape(op, "data", data_any, {out_channels, storage_bytes(layout.format, given)});
  check_dtype(op, "scale", scale_any, scalar_type(layout.scale));
  check_shape(op, "scale", scale_any, {out_channels, w.shape.groups});
  if (layout.symmetric && zero_point && zero_point->numel() != 0) {
    fail(op, "zero_point is given but the layout is symmetric; pass zero_point=None, or a layout ",
         "with symmetric=False");
  }
  std::optional<Tensor> zeros;
  if (!layout.symmetric) {
    if (!zero_point) fail(op, "the layout is asymmetric but zero_point is None; pass zero_point");
    check_dtype(op, "zero_point", *zero_point, storage_type(layout.format));
    check_shape(op, "zero_point", *zero_point, {out_channels, w.shape.groups});
    zeros = dense(*zero_point);
    check_zero_points(op, *zeros, layout.format);
  }
  Tensor data = dense(data_any);
  const Tensor scale = dense(scale_any);
  if (w.packing.columns != given) {  // channels are filled up
    const int64_t channels = w.packing.channels, rest = channels - group_channels;
    Tensor padded = empty_on_device({out_channels, taps, channels}, ScalarType::Char);
    const Shape stored{out_channels, taps, group_channels};
    Tensor front = torch::stable::narrow(padded, 2, 0, group_channels);
    torch::stable::copy_(front, torch::stable::reshape(data, stored));
    Tensor behind = torch::stable::narrow(padded, 2, group_channels, rest);
    if (zeros) {
      torch::stable::copy_(behind, torch::stable::reshape(*zeros, {out_channels, 1, 1}));
    } else {
      torch::stable::zero_(behind);
    }
    data = padded;
  }
  const Tensor packed = empty_on_device({w.packing.blocks(), w.shape.bytes}, ScalarType::Byte);
  if (packed.numel() == 0) return packed;
  PackArgs a{};
  a.layout = layout;
  a.shape = w.shape;
  a.n = w.packing.rows;
  a.row_bytes = storage_bytes(layout.format, w.packing.columns);
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  const int64_t code_size = code_bytes(data), scale_size = bytes_of(layout.scale);
  const uint8_t* codes = static_cast<const uint8_t*>(data.const_data_ptr());
  const uint8_t* scales = static_cast<const uint8_t*>(scale.const_data_ptr());
  const uint8_t* zero_codes =
      zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  for (int64_t group = 0; group < w.packing.groups; ++group) {
    const int64_t row = group * a.n;
    a.data = codes + row * a.row_bytes * code_size;
    a.scale = scales + row * w.shape.groups * scale_size;
    a.zero_point = zero_codes == nullptr ? nullptr : zero_codes + row * w.shape.groups;
    a.packed = packed.mutable_data_ptr<uint8_t>() + group * blocks * w.shape.bytes;
    run_pack(a);
  }
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_conv(const Tensor& packed_any, int64_t layout_id,
                                               int64_t taps, int64_t group_channels, int64_t groups,
                                               int64_t out_channels, int64_t group_size) {
  const DeviceGuard guard(packed_any);
  const char* op = "unpack_conv";
  const ConvWeight w =
      check_conv_weight(op, layout_id, taps, group_channels, groups, out_channels, group_size);
  check_packed_shape(op, packed_any, w);
  const Tensor packed = dense(packed_any);
  const ScalarType type = storage_type(w.layout.format);
  const int64_t row_bytes = storage_bytes(w.layout.format, w.packing.columns);
  Tensor data = empty_on_device({out_channels, row_bytes}, type);
  Tensor scale = empty_on_device({out_channels, w.shape.groups}, scalar_type(w.layout.scale));
  Tensor zeros =
      empty_on_device(w.layout.symmetric ? Shape{0} : Shape{out_channels, w.shape.groups}, type);
  UnpackArgs a{};
  a.layout = w.layout;
  a.shape = w.shape;
  a.n = w.packing.rows;
  a.row_bytes = row_bytes;
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  const int64_t matrices = scale.numel() == 0 ? 0 : w.packing.groups;
  for (int64_t group = 0; group < matrices; ++group) {
    const int64_t row = group * a.n;
    a.packed = packed.const_data_ptr<uint8_t>() + group * blocks * w.shape.bytes;
    a.data = static_cast<uint8_t*>(data.mutable_data_ptr()) + row * row_bytes * code_bytes(data);
    a.scale = static_cast<uint8_t*>(scale.mutable_data_ptr()) +
              row * w.shape.groups * bytes_of(w.layout.scale);
    a.zero_point = w.layout.symmetric
                       ? nullptr
                       : static_cast<uint8_t*>(zeros.mutable_data_ptr()) + row * w.shape.groups;
    run_unpack(a);
  }
  const int64_t given = taps * group_channels;
  if (w.packing.columns != given) {
    Tensor wide = torch::stable::reshape(data, {out_channels, taps, w.packing.channels});
    const Tensor plain = dense(torch::stable::narrow(wide, 2, 0, group_channels));
    data = torch::stable::reshape(plain, {out_channels, given});
  }
  return {data, scale, zeros};
}

}  // namespace
}  // namespace qkernels

QK_OPS(m) {
  m.impl("pack_conv", TORCH_BOX(&qkernels::pack_conv));
  m.impl("unpack_conv", TORCH_BOX(&qkernels::unpack_conv));
}
