// The formats, and the layout of a packed weight: the one place that knows both.
#pragma once

#include <cstdint>

// Marks what GPU code may call too; nothing for a C++ compiler.
#ifdef __CUDACC__
#define QK_HD __host__ __device__
#else
#define QK_HD
#endif

namespace qkernels {

// ---- Formats ------------------------------------------------------------------------------------

enum class Format : int { int8 = 0, int4 = 1, nf4 = 2, int16 = 3 };

struct FormatInfo {
  Format format;
  const char* name;
  int bits;
  // Codes a symmetric and an asymmetric quantizer may use, as numbers (int4 symmetric is stored
  // with offset 8, so that the kernels always read an unsigned nibble).
  int symmetric_min, symmetric_max;
  int asymmetric_min, asymmetric_max;
  // A symmetric scale is amax / symmetric_range. int4 uses 7.5: the largest magnitude lands half a
  // step outside of [-8, 7] on either side, which costs less than leaving code -8 unused.
  float symmetric_range;
  bool has_zero_point;  // the format knows asymmetric quantization
  int zero_steps;       // zero points count in 1 / zero_steps of a code
  bool packs;           // the format can be a packed weight
};

inline constexpr FormatInfo kFormats[] = {
    {Format::int8, "int8", 8, -127, 127, -128, 127, 127.0f, true, 1, true},
    {Format::int4, "int4", 4, -8, 7, 0, 15, 7.5f, true, 8, true},
    {Format::nf4, "nf4", 4, 0, 15, 0, 15, 1.0f, false, 1, true},
    {Format::int16, "int16", 16, -32767, 32767, -32768, 32767, 32767.0f, true, 1, false},
};
inline constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);

// GPU code has constants of its own but not the host's table at an index that it computes.
QK_HD inline constexpr FormatInfo info(Format format) {
  constexpr FormatInfo int8 = kFormats[0], int4 = kFormats[1], nf4 = kFormats[2],
                       int16 = kFormats[3];
  return format == Format::int8   ? int8
         : format == Format::int4 ? int4
         : format == Format::nf4  ? nf4
                                  : int16;
}

// Stored offset of symmetric int4 codes: nibble = code + 8.
inline constexpr int kInt4Offset = 8;

// The NF4 levels: quantiles of a normal distribution, scaled to [-1, 1] with an exact zero
// (Dettmers et al., "QLoRA", 2023, appendix E).
struct Nf4Table {
  float at[16];
};
inline constexpr Nf4Table kNf4Levels = {{
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
}};

// at[i] lies between levels i and i + 1: exact in double, rounded once.
inline constexpr Nf4Table nf4_middles() {
  Nf4Table middles{};
  for (int i = 0; i < 15; ++i) {
    middles.at[i] = static_cast<float>(
        (static_cast<double>(kNf4Levels.at[i]) + static_cast<double>(kNf4Levels.at[i + 1])) * 0.5);
  }
  middles.at[15] = 2.0f;  // above every quotient that has a code above it
  return middles;
}
inline constexpr Nf4Table kNf4Middles = nf4_middles();

// Element types of activations, outputs and scales; the first three may be a scale's type.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i32 = 4 };

QK_HD inline constexpr int64_t bytes_of(DType type) {
  constexpr int64_t bytes[] = {4, 2, 2, 1, 4};
  return bytes[static_cast<int>(type)];
}

// Bytes of `count` consecutive elements of a row in storage; a 4-bit row ends on a full byte.
QK_HD inline constexpr int64_t storage_bytes(Format format, int64_t count) {
  return (count * info(format).bits + 7) / 8;
}

// ---- Packed weights -----------------------------------------------------------------------------

// One integer says everything about a packed block but its shape. It travels with the bytes, so a
// weight packed for another device or by another version is an error and never a wrong result.
struct Layout {
  Format format;
  DType scale;
  bool symmetric;
  int device;
  int version;
};

inline constexpr int kDeviceX86 = 1;
inline constexpr int kDeviceCuda = 2;

// The version that this build writes and reads. It rises for what has changed, so that all else is
// still read: in version 1, int4 zero points were whole codes.
QK_HD inline constexpr int layout_version(Format format, bool symmetric) {
  return format == Format::int4 && !symmetric ? 2 : 1;
}

QK_HD inline constexpr int64_t encode_layout(const Layout& layout) {
  return static_cast<int64_t>(layout.version) | static_cast<int64_t>(layout.device) << 8 |
         static_cast<int64_t>(layout.scale) << 12 | static_cast<int64_t>(!layout.symmetric) << 16 |
         static_cast<int64_t>(layout.format) << 20;
}

// False when `id` is not a layout that any version has written.
QK_HD inline constexpr bool decode_layout(int64_t id, Layout* layout) {
  layout->version = static_cast<int>(id & 0xff);
  layout->device = static_cast<int>(id >> 8 & 0xf);
  const int scale = static_cast<int>(id >> 12 & 0xf);
  const int asymmetric = static_cast<int>(id >> 16 & 0xf);
  const int64_t format = id >> 20;
  if (id < 0 || scale > 2 || asymmetric > 1 || format >= kFormatCount) return false;
  layout->scale = static_cast<DType>(scale);
  layout->symmetric = asymmetric == 0;
  layout->format = static_cast<Format>(format);
  return info(layout->format).packs && (layout->symmetric || info(layout->format).has_zero_point);
}

// A packed weight is uint8 [ceil(N / 16), bytes]; a row of it holds 16 output features ("lanes").
// On x86:
//
//   codes   int8: per 4 k one 64-byte line,  byte[lane * 4 + k % 4] = code
//           4 bit: per 8 k one 64-byte line, byte[lane * 4 + k % 4] = code(k) | code(k + 4) << 4
//   scales  [groups][16] in their stored type
//   zeros   [groups][16] bytes, asymmetric only; int4: in eighths of a code
//   sums    [groups][16] int32, sum of the codes, int8 only: undoes the sign flip for vpdpbusd
//   bias    [16] float, integer formats only: sum over k of the dequantized weight, which turns an
//           activation's zero point into one multiplication
//
// Every group is padded to a multiple of 8 k with code 0 (activations are padded with 0 there), so
// a group starts on a line. Each part starts on a 64-byte line, and rows are whole lines.
//
// On CUDA the same without sums, and codes in the order in which the 32 threads of a warp feed the
// tensor cores. Groups are padded to chunks of 32 k, and 4-bit rows to two chunks, with the code of
// value 0 (asymmetric: the group's zero point, int4: rounded; nf4: level 7). Of a chunk, thread g *
// 4 + t holds the eight consecutive k from 8 * t on, e0 to e7, of the lanes g and g + 8. It reads
// 16 bytes, and the warp 512:
//
//   int8    one chunk:  [lane g: e0 to e7] [lane g + 8: e0 to e7]
//   4 bit   two chunks, a word each for [lane g, first chunk] [lane g + 8, first] [lane g, second]
//           [lane g + 8, second]; nibbles of a word, the lowest first: e0 e2 e4 e6 e1 e3 e5 e7, so
//           that (word >> 4 * j) & 0x000f000f is the pair e(2j), e(2j + 1)
inline constexpr int kLanes = 16;
inline constexpr int64_t kLine = 64;
inline constexpr int kGroupPad = 8;    // on x86
inline constexpr int kCudaChunk = 32;  // k
inline constexpr int kWarp = 32;       // threads
inline constexpr int kCudaUnit = 512;  // bytes that a warp reads at once

QK_HD inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct BlockShape {
  int64_t group_pad;                  // groups are padded to a multiple of so many k
  int64_t k;                          // in_features
  int64_t group_size;                 // in k; the last group may be shorter
  int64_t groups;                     // per output feature
  int64_t group_padded;               // padded k of every group but the last
  int64_t k_padded;                   // sum of the padded groups, and what fills up a row
  int64_t scales, zeros, sums, bias;  // byte offsets in a row; codes start at 0
  int64_t bytes;                      // of one row

  QK_HD constexpr int64_t group_begin(int64_t g) const { return g * group_size; }
  QK_HD constexpr int64_t group_length(int64_t g) const {
    return g + 1 < groups ? group_size : k - g * group_size;
  }
  QK_HD constexpr int64_t padded_begin(int64_t g) const { return g * group_padded; }
  QK_HD constexpr int64_t padded_length(int64_t g) const {
    return round_up(group_length(g), group_pad);
  }
};

// Larger sizes are refused, so that no byte count can overflow.
inline constexpr int64_t kMaxFeatures = int64_t{1} << 40;

// group_size is -1 (one group) or at least 1; k is at most kMaxFeatures.
QK_HD inline constexpr BlockShape block_shape(const Layout& layout, int64_t k, int64_t group_size) {
  const bool cuda = layout.device == kDeviceCuda;
  const int bits = info(layout.format).bits;
  BlockShape s{};
  s.group_pad = cuda ? kCudaChunk : kGroupPad;
  s.k = k;
  s.group_size = group_size < 0 || group_size > k ? k : group_size;
  s.groups = group_size < 0 ? 1 : k == 0 ? 0 : (k + s.group_size - 1) / s.group_size;
  s.group_padded = round_up(s.group_size, s.group_pad);
  s.k_padded = s.groups == 0 ? 0 : (s.groups - 1) * s.group_padded + s.padded_length(s.groups - 1);
  if (cuda && bits == 4) s.k_padded = round_up(s.k_padded, 2 * kCudaChunk);
  int64_t at = s.k_padded * kLanes * bits / 8;
  auto part = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, kLine);
    return begin;
  };
  const bool integer = layout.format != Format::nf4;
  s.scales = part(s.groups * kLanes * bytes_of(layout.scale));
  s.zeros = part(layout.symmetric ? 0 : s.groups * kLanes);
  s.sums = part(layout.format == Format::int8 && !cuda ? s.groups * kLanes * 4 : 0);
  s.bias = part(integer ? kLanes * 4 : 0);
  s.bytes = at;
  return s;
}

// How a convolution's weight [out_channels, taps * group_channels] is packed: `groups` matrices of
// [rows, columns], one behind the other. Whole-row int8 weights have each tap's channels filled up
// to `channels`, a multiple of 4, on a GPU from 16 on of 16, with weights of 0.
struct ConvPacking {
  bool depthwise;  // one matrix [out_channels, taps]
  int64_t groups, rows, columns, channels;

  int64_t blocks() const { return groups * ((rows + kLanes - 1) / kLanes); }
};

// Most taps of a convolution.
inline constexpr int64_t kConvTaps = 1024;

// Most taps that a depthwise weight may be packed with as such.
inline constexpr int64_t kDepthwiseTaps = 128;

inline constexpr ConvPacking conv_packing(const Layout& layout, int64_t taps,
                                          int64_t group_channels, int64_t groups,
                                          int64_t out_channels, int64_t group_size) {
  const int64_t rows = groups == 0 ? 0 : out_channels / groups;
  if (layout.format != Format::int8 || group_size != -1) {
    return {false, groups, rows, taps * group_channels, group_channels};
  }
  if (group_channels == 1 && rows == 1 && groups > 1 && taps <= kDepthwiseTaps) {
    return {true, 1, out_channels, taps, 1};
  }
  const bool wide = layout.device == kDeviceCuda && group_channels >= 16;
  const int64_t channels = round_up(group_channels, wide ? 16 : 4);
  return {false, groups, rows, taps * channels, channels};
}

// Byte offset of code k_padded `kp` of `lane` in a packed row of the x86 layout, and the nibble's
// shift for 4 bits.
QK_HD inline constexpr int64_t code_offset(Format format, int64_t kp, int lane) {
  return info(format).bits == 8 ? kp / 4 * kLine + lane * 4 + kp % 4
                                : kp / 8 * kLine + lane * 4 + kp % 4;
}
QK_HD inline constexpr int code_shift(int64_t kp) { return kp % 8 < 4 ? 0 : 4; }

// The same of the CUDA layout.
QK_HD inline constexpr int64_t cuda_code_offset(Format format, int64_t kp, int lane) {
  const int64_t thread = lane % 8 * 4 + kp % kCudaChunk / 8, half = lane / 8;
  if (info(format).bits == 8) {
    return kp / kCudaChunk * kCudaUnit + thread * 16 + half * 8 + kp % 8;
  }
  const int64_t byte = kp % 8 % 2 * 2 + kp % 8 / 4;
  return kp / (2 * kCudaChunk) * kCudaUnit + thread * 16 + kp / kCudaChunk % 2 * 8 + half * 4 +
         byte;
}

// ---- Codes of an op's arguments -----------------------------------------------------------------

enum class Activation : int { float_ = 0, int8_symmetric = 1, int8_asymmetric = 2 };
enum class Epilogue : int {
  none = 0,
  relu = 1,
  gelu = 2,
  gelu_tanh = 3,
  silu = 4,
  relu6 = 5,
  hardswish = 6,
};
inline constexpr int kActivationCount = 3;
inline constexpr int kEpilogueCount = 7;

// The longest accumulation whose int32 sum cannot overflow: 128 * 128 * 131071 < 2^31. Asymmetric
// int8 weights reach 255 * 128 per product.
QK_HD inline constexpr int64_t max_accumulation(Format format, bool symmetric) {
  return format == Format::int8 && !symmetric ? 65793 : 131071;
}

}  // namespace qkernels
