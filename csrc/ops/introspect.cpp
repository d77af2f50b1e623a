// What Python may ask about this build and this machine. No torch here: pybind11 and the tables.
// Some releases of torch (2.11) refuse the pybind11 beside their headers where this is defined.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/conv_int8.h"
#include "cuda/linear_float.h"
#include "cuda/linear_int8.h"

namespace py = pybind11;

namespace qkernels {
namespace {

Layout decode(int64_t id) {
  Layout layout;
  if (!decode_layout(id, &layout)) {
    throw std::invalid_argument("layout " + std::to_string(id) +
                                " is not a packed layout that qkernels has written");
  }
  return layout;
}

py::list formats() {
  py::list rows;
  for (const FormatInfo& f : kFormats) {
    py::dict row;
    row["name"] = f.name;
    row["code"] = static_cast<int>(f.format);
    row["bits"] = f.bits;
    row["symmetric_min"] = f.symmetric_min;
    row["symmetric_max"] = f.symmetric_max;
    row["asymmetric_min"] = f.asymmetric_min;
    row["asymmetric_max"] = f.asymmetric_max;
    row["symmetric_range"] = f.symmetric_range;
    row["has_zero_point"] = f.has_zero_point;
    row["zero_steps"] = f.zero_steps;
    row["packs"] = f.packs;
    row["storage"] = f.format == Format::int16  ? "int16"
                     : f.format == Format::int8 ? "int8"
                                                : "uint8";
    rows.append(row);
  }
  return rows;
}

std::vector<std::string> isas(bool only_available) {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!only_available || kIsas[i].available()) names.emplace_back(kIsas[i].name);
  }
  return names;
}

int64_t layout(int format, int scale_dtype, bool symmetric, const std::string& device) {
  if (device != "cpu" && device != "cuda") {
    throw std::invalid_argument("device must be 'cpu' or 'cuda', got '" + device + "'");
  }
  const Layout wanted{static_cast<Format>(format), static_cast<DType>(scale_dtype), symmetric,
                      device == "cuda" ? kDeviceCuda : kDeviceX86,
                      layout_version(static_cast<Format>(format), symmetric)};
  Layout checked;
  if (format < 0 || scale_dtype < 0 || !decode_layout(encode_layout(wanted), &checked)) {
    throw std::invalid_argument(
        "no packed layout holds format " + std::to_string(format) + " with scale dtype " +
        std::to_string(scale_dtype) + (symmetric ? " and no zero points" : " and zero points") +
        "; formats are 0 (int8), 1 (int4), 2 (nf4, symmetric only), scale dtypes 0 (float32), 1 "
        "(bfloat16), 2 (float16)");
  }
  return encode_layout(wanted);
}

py::dict describe_layout(int64_t id) {
  const Layout l = decode(id);
  constexpr const char* scales[] = {"float32", "bfloat16", "float16"};
  py::dict result;
  result["format"] = info(l.format).name;
  result["scale_dtype"] = scales[static_cast<int>(l.scale)];
  result["symmetric"] = l.symmetric;
  result["device"] = l.device == kDeviceX86 ? "cpu" : l.device == kDeviceCuda ? "cuda" : "other";
  result["version"] = l.version;
  return result;
}

int64_t block_bytes(int64_t id, int64_t in_features, int64_t group_size) {
  if (in_features < 0 || in_features > kMaxFeatures || (group_size != -1 && group_size < 1)) {
    throw std::invalid_argument(
        "in_features must be from 0 to 2^40 and group_size -1 or >= 1, got " +
        std::to_string(in_features) + " and " + std::to_string(group_size));
  }
  return block_shape(decode(id), in_features, group_size).bytes;
}

std::pair<int64_t, int64_t> conv_packed_shape(int64_t id, int64_t taps, int64_t group_channels,
                                              int64_t groups, int64_t out_channels,
                                              int64_t group_size) {
  if (taps < 1 || taps > kConvTaps || group_channels < 0 || groups < 1 || out_channels < 0 ||
      out_channels % groups != 0) {
    throw std::invalid_argument("taps must be from 1 to " + std::to_string(kConvTaps) +
                                " and out_channels a multiple of groups, got " +
                                std::to_string(taps) + ", " + std::to_string(out_channels) +
                                " and " + std::to_string(groups));
  }
  const ConvPacking p =
      conv_packing(decode(id), taps, group_channels, groups, out_channels, group_size);
  return {p.blocks(), block_bytes(id, p.columns, group_size)};
}

int64_t longest_sum(int64_t id) {
  const Layout l = decode(id);
  return max_accumulation(l.format, l.symmetric);
}

// Of the kernels of the CPU, which are chosen by the instruction set.
Layout decode_cpu(int64_t id) {
  const Layout layout = decode(id);
  if (layout.device != kDeviceX86) {
    throw std::invalid_argument("layout " + std::to_string(id) +
                                " is packed for a GPU; cuda_kernel_name knows its kernels");
  }
  return layout;
}

void check_codes(int activation, int x_type) {
  if (activation < 0 || activation >= kActivationCount) {
    throw std::invalid_argument("activation must be 0, 1 or 2, got " + std::to_string(activation));
  }
  if (x_type < 0 || x_type > static_cast<int>(DType::f16)) {
    throw std::invalid_argument("x_type must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                std::to_string(x_type));
  }
}

// The choice that csrc/cuda makes for x on a line of 16 bytes.
std::string cuda_kernel_name(int64_t id, int activation, int64_t rows, int64_t in_features,
                             int64_t out_features, int64_t group_size, int x_type,
                             int64_t multiprocessors, bool hopper) {
  check_codes(activation, x_type);
  block_bytes(id, in_features, group_size);  // checks them
  LinearArgs a{};
  a.layout = decode(id);
  a.shape = block_shape(a.layout, in_features, group_size);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.n = out_features;
  a.x_type = static_cast<DType>(x_type);
  if (activation != 0) return cuda::linear_int8_name(a, {multiprocessors, hopper});
  return cuda::linear_float_name(a, hopper);
}

std::string kernel_name(int64_t id, int activation, int64_t rows, int x_type) {
  check_codes(activation, x_type);
  LinearArgs a{};
  a.layout = decode_cpu(id);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.x_type = static_cast<DType>(x_type);
  return kernels().linear_name(a);
}

std::string conv_kernel_name(int64_t id, int64_t taps, int64_t group_channels, int64_t groups,
                             int64_t out_channels, int64_t group_size, int activation, int x_type,
                             bool hopper) {
  const Layout layout = decode(id);
  const ConvPacking p =
      conv_packing(layout, taps, group_channels, groups, out_channels, group_size);
  if (layout.device == kDeviceCuda) {
    if (activation == 0) return "dequantize + convolution";
    return cuda::conv_int8_name(p.depthwise, groups, p.channels, taps, hopper);
  }
  if (activation != 0) return kernels().conv_name(p.depthwise);
  return p.depthwise ? "conv_depthwise_w8a16"
                     : "gathered rows, " + kernel_name(id, 0, kLanes, x_type);
}

py::dict cpu_features() {
  py::dict result;
  __builtin_cpu_init();
#define QK_FEATURE(name) result[name] = __builtin_cpu_supports(name) != 0
  QK_FEATURE("avx");
  QK_FEATURE("avx2");
  QK_FEATURE("fma");
  QK_FEATURE("avxvnni");
  QK_FEATURE("avx512f");
  QK_FEATURE("avx512bw");
  QK_FEATURE("avx512dq");
  QK_FEATURE("avx512vl");
  QK_FEATURE("avx512vnni");
  QK_FEATURE("avx512bf16");
  QK_FEATURE("gfni");
#undef QK_FEATURE
  return result;
}

py::dict build_info() {
  py::dict result;
  result["version"] = QKERNELS_VERSION;
  result["compiler"] = "g++ " __VERSION__;
  result["torch_abi"] = "stable, torch >= 2.10";
#ifdef QKERNELS_SM90A
  result["hopper"] = true;  // the CUDA kernels have code of Hopper
#else
  result["hopper"] = false;
#endif
  return result;
}

}  // namespace
}  // namespace qkernels

PYBIND11_MODULE(_C, m) {
  using namespace qkernels;
  m.doc() = "What this build of qkernels contains and what this machine runs.";
  m.def("formats", &formats, "One dict per format, in the order of their codes.");
  m.def("isas", [] { return isas(false); }, "Instruction sets compiled in, the best last.");
  m.def("available_isas", [] { return isas(true); }, "Those that this machine can run.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("cpu_features", &cpu_features, "Features of this CPU that kernels may use.");
  m.def("layout", &layout, py::arg("format"), py::arg("scale_dtype"), py::arg("symmetric"),
        py::arg("device") = "cpu",
        "Id of a device's packed layout for a format, scale dtype code and symmetry.");
  m.def("describe_layout", &describe_layout, py::arg("layout"), "What a layout id stands for.");
  m.def("block_bytes", &block_bytes, py::arg("layout"), py::arg("in_features"),
        py::arg("group_size"), "Bytes of a packed row, which holds 16 output features.");
  m.def("conv_packed_shape", &conv_packed_shape, py::arg("layout"), py::arg("taps"),
        py::arg("group_channels"), py::arg("groups"), py::arg("out_channels"),
        py::arg("group_size"), "Rows and bytes of a packed convolution weight.");
  m.def("conv_kernel_name", &conv_kernel_name, py::arg("layout"), py::arg("taps"),
        py::arg("group_channels"), py::arg("groups"), py::arg("out_channels"),
        py::arg("group_size"), py::arg("activation"), py::arg("x_type") = 0,
        py::arg("hopper") = false, "The kernel that conv runs for x of such a dtype code.");
  m.def("longest_sum", &longest_sum, py::arg("layout"),
        "Integer products that an int32 sum holds for certain.");
  m.attr("LONGEST_CONV_SUM") = max_accumulation(Format::int8, false);  // of a convolution
  m.attr("BLOCK_ROWS") = kLanes;  // output features in a row of a packed weight
  m.def("kernel_name", &kernel_name, py::arg("layout"), py::arg("activation"), py::arg("rows"),
        py::arg("x_type") = 0, "The kernel that linear runs for `rows` rows of such a dtype code.");
  m.def("cuda_kernel_name", &cuda_kernel_name, py::arg("layout"), py::arg("activation"),
        py::arg("rows"), py::arg("in_features"), py::arg("out_features"), py::arg("group_size"),
        py::arg("x_type"), py::arg("multiprocessors"), py::arg("hopper") = false,
        "The kernel that linear runs on a GPU with so many multiprocessors, of Hopper or not.");
  m.def("build_info", &build_info, "Version, compiler and interface of this build.");
}
