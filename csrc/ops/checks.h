// Argument checks: every op says its name, the argument, what it expected, what it got and the way
// out. Checks run before any work, so nothing is written when one fails.
#pragma once

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/codec.h"
#include "core/params.h"
#include "ops/device.h"

namespace qkernels {

inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, const char* part) { text += part; }
template <class Number>
  requires std::is_arithmetic_v<Number>
void append(std::string& text, Number part) {
  if constexpr (std::is_integral_v<Number>) {
    text += std::to_string(part);
  } else {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    text += digits;
  }
}

// std::runtime_error reaches Python as RuntimeError with exactly this text. No streams: they need
// the locales of libstdc++, which fail where a compiler links a part of it into the library.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::string text = std::string("qkernels::") + op + ": ";
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

inline std::string shape_text(const Tensor& t) { return text_of(shape_of(t)); }

// torch's Python names, for the types that users meet.
inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

// t, or a copy of it that is contiguous.
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = empty_on_device(shape_of(t), t.scalar_type());
  return torch::stable::copy_(copy, t);
}

inline void check_device(const char* op, const char* name, const Tensor& t) {
  if (!on_device(t)) {
    fail(op, name, " is on another device than the ", kDeviceName,
         " tensors of the call; move it with ", kMoveToDevice);
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  check_device(op, name, t);
  if (t.scalar_type() != want) {
    fail(op, name, " must be ", dtype_text(want), ", got ", dtype_text(t.scalar_type()),
         "; convert it with .to(torch.", dtype_text(want), ")");
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Shape& want) {
  if (shape_of(t) != want) {
    fail(op, name, " must have shape ", text_of(want), ", got ", shape_text(t));
  }
}

inline std::optional<DType> float_dtype(ScalarType type) {
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  return std::nullopt;
}

// The DType of a tensor that must hold floats.
inline DType check_float(const char* op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  const auto type = float_dtype(t.scalar_type());
  if (!type) {
    fail(op, name, " must be float32, bfloat16 or float16, got ", dtype_text(t.scalar_type()),
         "; convert it with .float()");
  }
  return *type;
}

inline DType check_float_type(const char* op, const char* name, ScalarType type) {
  const auto known = float_dtype(type);
  if (!known) {
    fail(op, name, " must be torch.float32, torch.bfloat16 or torch.float16, got torch.",
         dtype_text(type));
  }
  return *known;
}

inline Format check_format(const char* op, int64_t format) {
  if (format < 0 || format >= kFormatCount) {
    fail(op, "format must be a code from 0 to ", kFormatCount - 1, ", got ", format,
         "; qkernels.formats lists them");
  }
  return static_cast<Format>(format);
}

inline void check_group_size(const char* op, int64_t group_size) {
  if (group_size != -1 && group_size < 1) {
    fail(op, "group_size must be -1 (one group per row) or at least 1, got ", group_size);
  }
}

inline int64_t code_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Short ? 2 : 1; }

// The dtype of codes and of zero points in storage.
inline ScalarType storage_type(Format format) {
  if (format == Format::int16) return ScalarType::Short;
  return format == Format::int8 ? ScalarType::Char : ScalarType::Byte;
}

// int4 zero points lie between codes 0 and 15, in eighths. On a GPU nobody looks, and the
// kernels limit them.
inline void check_zero_points(const char* op, const Tensor& zero_point, Format format) {
  if (!kReadable || format != Format::int4) return;
  const uint8_t* at = zero_point.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < zero_point.numel(); ++i) {
    if (at[i] > 15 * info(format).zero_steps) {
      fail(op, "zero_point must hold eighths of int4 codes, from 0 to 120, got ",
           static_cast<int>(at[i]), "; take it from quantize, or clamp it");
    }
  }
}

// Scale and zero point of a whole tensor.
inline void check_single(const char* op, const char* name, const Tensor& t, ScalarType type) {
  check_dtype(op, name, t, type);
  if (t.numel() != 1) {
    fail(op, name, " must have one element (per tensor), got ", shape_text(t));
  }
}
inline float read_scale(const char* op, const char* name, const Tensor& t) {
  check_single(op, name, t, ScalarType::Float);
  const float scale = *t.const_data_ptr<float>();
  if (!(scale >= kSmallestScale && scale < INFINITY)) {
    fail(op, name, " must be a positive, finite, normal number, got ", scale, "; calibrate again");
  }
  return scale;
}
inline int read_zero_point(const char* op, const char* name, const Tensor& t) {
  check_single(op, name, t, ScalarType::Char);
  return *t.const_data_ptr<int8_t>();
}

// Scale and zero point as the device's kernels take them: numbers for a CPU, pointers for a GPU.
inline void read_codes(const char* op, const std::string& name, const Tensor& scale,
                       const std::optional<Tensor>& zero_point, GivenCodes* codes) {
  const std::string scale_name = name + "_scale", zero_name = name + "_zero_point";
  if constexpr (kReadable) {
    codes->scale = read_scale(op, scale_name.c_str(), scale);
    if (zero_point) codes->zero = read_zero_point(op, zero_name.c_str(), *zero_point);
  } else {
    check_single(op, scale_name.c_str(), scale, ScalarType::Float);
    codes->device_scale = scale.const_data_ptr<float>();
    if (!zero_point) return;
    check_single(op, zero_name.c_str(), *zero_point, ScalarType::Char);
    codes->device_zero = zero_point->const_data_ptr<int8_t>();
  }
}

// The layout behind an id, which must be one that this device's kernels read.
inline Layout check_layout(const char* op, int64_t id) {
  Layout layout;
  if (!decode_layout(id, &layout)) {
    fail(op, "layout ", id, " is not a packed layout that qkernels has written; take it from ",
         "qkernels._C.layout(format, scale_dtype, symmetric)");
  }
  if (layout.device != kDeviceFamily) {
    fail(op, "the weight is packed for another device (family ", layout.device,
         ") but the call runs on the ", kDeviceName, "; unpack it there, or move the module with ",
         kMoveToDevice);
  }
  const int version = layout_version(layout.format, layout.symmetric);
  if (layout.version != version) {
    fail(op, "the weight is packed in layout version ", layout.version, " but this build reads ",
         version, "; load the model from its file again");
  }
  return layout;
}

// How x is quantized, for integer sums over `length` products.
inline Activation check_activation(const char* op, const Layout& layout, int64_t length,
                                   int64_t code) {
  if (code < 0 || code >= kActivationCount) {
    fail(op, "activation must be 0 (float), 1 (int8 symmetric) or 2 (int8 asymmetric), got ", code);
  }
  const Activation activation = static_cast<Activation>(code);
  if (activation == Activation::float_) return activation;
  if (layout.format == Format::nf4) {
    fail(op, "an nf4 weight takes float activations, got activation=", code, "; pass activation=0");
  }
  const int64_t limit = max_accumulation(layout.format, layout.symmetric);
  if (length > limit) {
    fail(op, "an int32 sum over ", length, " products can overflow (the limit is ", limit,
         "); quantize the weight with group_size <= ", limit, " or keep the activations float");
  }
  return activation;
}

// A function of the result.
inline Epilogue check_epilogue(const char* op, int64_t code) {
  if (code < 0 || code >= kEpilogueCount) {
    fail(op, "epilogue must be a code from 0 to ", kEpilogueCount - 1,
         " (none, relu, gelu, gelu_tanh, silu, relu6, hardswish), got ", code);
  }
  return static_cast<Epilogue>(code);
}

// Checks that `packed` is the packed form of [out_features, in_features]; returns it contiguous.
inline Tensor check_packed(const char* op, const Tensor& packed, const BlockShape& shape,
                           int64_t out_features) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  const Shape want{(out_features + kLanes - 1) / kLanes, shape.bytes};
  if (shape_of(packed) != want) {
    fail(op, "packed must have shape ", text_of(want), " for a weight of (", out_features, ", ",
         shape.k, ") in this layout, got ", shape_text(packed),
         "; pack it with torch.ops.qkernels.pack and the same layout, sizes and group_size");
  }
  return dense(packed);
}

inline void check_sizes(const char* op, int64_t in_features, int64_t out_features,
                        int64_t group_size) {
  if (in_features < 0 || out_features < 0 || std::max(in_features, out_features) > kMaxFeatures) {
    fail(op, "in_features and out_features must be from 0 to 2^40, got ", in_features, " and ",
         out_features);
  }
  check_group_size(op, group_size);
}

}  // namespace qkernels
