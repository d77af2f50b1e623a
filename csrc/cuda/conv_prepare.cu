// conv_prepare: scales and zero points of the images of x, and the images as int8 codes with the
// channels innermost and borders filled in.
#include "cuda/conv_int8.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/int8.cuh"
#include "cuda/range.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <DType kType>
__global__ void __launch_bounds__(kThreads) range_kernel(const ConvArgs a, Range* parts) {
  const int64_t elements = a.channels * a.in[0] * a.in[1] * a.in[2];
  const int64_t n = blockIdx.x / kRangeParts, part = blockIdx.x % kRangeParts;
  Range range;
  for (int64_t i = part * kThreads + threadIdx.x; i < elements;
       i += int64_t{kRangeParts} * kThreads) {
    extend(&range, load_element<kType>(a.x, n * elements + i));
  }
  range = block_range(range);
  if (threadIdx.x == 0) parts[blockIdx.x] = range;
}

QK_DEVICE ImageCodes image_codes(const ConvArgs& a, int64_t n, const Range* parts) {
  Range all;
  if (a.x_type != DType::i8) {
    for (int i = 0; i < kRangeParts; ++i) {
      const Range& part = parts[n * kRangeParts + i];
      all.min = min(all.min, part.min);
      all.max = max(all.max, part.max);
      all.magnitude = max(all.magnitude, part.magnitude);
    }
  }
  if (a.is_static) {
    const float scale = *a.x_codes.device_scale;
    const int zero = a.x_codes.device_zero == nullptr ? 0 : *a.x_codes.device_zero;
    return {all.finite() ? scale : NAN, 1.0f / scale, zero, false};
  }
  const Affine affine = choose_affine(all, Format::int8, a.symmetric, DType::f32);
  return {affine.scale, affine.inverse, affine.zero_point, all.finite()};
}

// A warp: the codes of image blockIdx.x, the weight sums of that packed row, a part of the pieces.
__global__ void __launch_bounds__(kWarp)
    setup_kernel(const ConvArgs a, const Range* parts, ImageCodes* codes, ConvTables tables,
                 int piece) {
  const int64_t block = blockIdx.x;
  const int lane = threadIdx.x;
  if (block < a.batch && lane == 0) codes[block] = image_codes(a, block, parts);
  if (block < a.blocks() && tables.weight_sums != nullptr) {
    const uint8_t* row = a.packed + block * a.shape.bytes;
    int32_t low = 0, high = 0;  // of features g and g + 8
#pragma unroll 8
    for (int64_t unit = 0; unit < a.shape.k_padded / kCudaChunk; ++unit) {
      const uint4 v = load_128(row + unit * kCudaUnit + lane * 16);
      low = dp4a(v.x, 0x01010101u, dp4a(v.y, 0x01010101u, low));
      high = dp4a(v.z, 0x01010101u, dp4a(v.w, 0x01010101u, high));
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      low += shuffle_xor(low, mask);
      high += shuffle_xor(high, mask);
    }
    if (lane % 4 == 0) {
      tables.weight_sums[block * kLanes + lane / 4] = low;
      tables.weight_sums[block * kLanes + lane / 4 + 8] = high;
    }
  }
  if (tables.pieces == nullptr) return;
  const int64_t count = a.depthwise ? a.taps() : panel_pitch(a.shape) / piece;
  for (int64_t i = block * kWarp + lane; i < count; i += int64_t{kWarp} * gridDim.x) {
    const int64_t tap = a.depthwise ? i : i * piece / a.group_channels;
    const int64_t c = a.depthwise ? 0 : i * piece % a.group_channels;
    const bool there = tap < a.taps();
    tables.pieces[i] = {there ? static_cast<int32_t>(tap_offset(a, tap) + c) : -1,
                        static_cast<int32_t>(tap % 32)};
  }
}

// Where position `at` of the grid's dimension `dim` comes from in x, or -1 where the grid is zero.
QK_DEVICE int64_t source_of(const ConvArgs& a, int dim, int64_t at) {
  int64_t source = at - a.before[dim];
  if (source < 0) return -1;
  if (a.step[dim] != 1) {
    const int64_t offset = source;
    source = divide(offset, a.step[dim]);
    if (source * a.step[dim] != offset) return -1;
  }
  return source < a.in[dim] ? source : -1;
}

// Codes of a thread: 16 of a pixel of the grid, or 4 where pixels do not consist of sixteens.
template <int kUnit>
QK_DEVICE void store_unit(uint8_t* to, const uint32_t (&words)[kUnit / 4]) {
  if constexpr (kUnit == 16) {
    store_128(to, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  }
}

// Neighbouring threads read what lies side by side in x: units of a pixel, or pixels. `same`: the
// grid's pixels have the channels of x, on vectors.
template <DType kType, int kUnit>
__global__ void __launch_bounds__(kThreads)
    image_kernel(const ConvArgs a, uint8_t* image, bool same) {
  const int64_t units = a.pixel_codes() / kUnit, pixels = a.grid[0] * a.grid[1] * a.grid[2];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.batch * pixels * units) return;
  const int64_t outer = divide(i, a.x_channels_last ? units : pixels);
  const int64_t inner = i - outer * (a.x_channels_last ? units : pixels);
  // Of channels last, `outer` counts pixels over all images; else images' units.
  const int64_t n = divide(outer, a.x_channels_last ? pixels : units);
  const int64_t rest = outer - n * (a.x_channels_last ? pixels : units);
  const int64_t pixel = a.x_channels_last ? rest : inner;
  const int64_t first = (a.x_channels_last ? inner : rest) * kUnit;

  const ImageCodes& codes = a.codes[n];
  const Affine affine{codes.scale, codes.inverse, codes.zero};
  const int64_t line = divide(pixel, a.grid[2]), plane = divide(line, a.grid[1]);
  const int64_t z = source_of(a, 0, plane), y = source_of(a, 1, line - plane * a.grid[1]);
  const int64_t x = source_of(a, 2, pixel - line * a.grid[2]);
  const bool inside = z >= 0 && y >= 0 && x >= 0;
  const int64_t from = (z * a.in[1] + y) * a.in[2] + x, in = a.in[0] * a.in[1] * a.in[2];
  uint8_t* const to = image + ((n * pixels + pixel) * units) * kUnit + first;
  uint32_t words[kUnit / 4] = {};
  if (!inside) {
#pragma unroll
    for (int j = 0; j < kUnit / 4; ++j) words[j] = static_cast<uint8_t>(codes.zero) * 0x01010101u;
    return store_unit<kUnit>(to, words);
  }
  if constexpr (kUnit == 16) {
    const int64_t k = (n * in + from) * a.channels + first;
    if constexpr (kType == DType::i8) {
      if (same) return store_128(to, load_128(static_cast<const int8_t*>(a.x) + k));
    } else if (same) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float values[kEight];
        load_eight<kType>(values, a.x, k + half * kEight);
#pragma unroll
        for (int j = 0; j < kEight; ++j) {
          const int code = encode(values[j], Format::int8, affine, a.symmetric);
          words[half * 2 + j / 4] |= static_cast<uint32_t>(code & 0xff) << j % 4 * 8;
        }
      }
      return store_unit<kUnit>(to, words);
    }
  }
  const int64_t group = divide(a.channels, a.groups);  // channels of a group in x
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    int64_t c = first + j;
    bool channel = c < a.channels;
    if (!a.depthwise) {
      const int64_t g = divide(c, a.group_channels), offset = c - g * a.group_channels;
      channel = offset < group;
      c = g * group + offset;
    }
    int code = codes.zero;
    if (channel) {
      const int64_t k =
          a.x_channels_last ? (n * in + from) * a.channels + c : (n * a.channels + c) * in + from;
      if constexpr (kType == DType::i8) {
        code = static_cast<const int8_t*>(a.x)[k];
      } else {
        code = encode(load_element<kType>(a.x, k), Format::int8, affine, a.symmetric);
      }
    }
    words[j / 4] |= static_cast<uint32_t>(code & 0xff) << j % 4 * 8;
  }
  store_unit<kUnit>(to, words);
}

template <DType kType>
void make_image(const ConvArgs& a, uint8_t* image, Stream stream) {
  const bool sixteens = a.pixel_codes() % 16 == 0;
  const bool same = a.x_channels_last && a.channels == a.pixel_codes() &&
                    reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  const unsigned blocks = blocks_for(a.batch * a.image_codes() / (sixteens ? 16 : 4), kThreads);
  const auto kernel = sixteens ? image_kernel<kType, 16> : image_kernel<kType, 4>;
  launch(kernel, blocks, kThreads, 0, stream, a, image, same);
}

}  // namespace

void conv_prepare(const ConvArgs& a, const ConvTables& tables, Range* ranges, ImageCodes* codes,
                  uint8_t* image, int piece, Stream stream) {
  if (a.x_type != DType::i8) {
    for_float(a.x_type, [&](auto type) {
      launch(range_kernel<decltype(type)::value>, static_cast<unsigned>(kRangeParts * a.batch),
             kThreads, kRangeBytes, stream, a, ranges);
    });
  }
  const dim3 grid(static_cast<unsigned>(max(a.batch, a.blocks())));
  launch(setup_kernel, grid, kWarp, 0, stream, a, ranges, codes, tables, piece);
  if (image == nullptr) return;
  if (a.x_type == DType::i8) return make_image<DType::i8>(a, image, stream);
  for_float(a.x_type, [&](auto type) { make_image<decltype(type)::value>(a, image, stream); });
}

}  // namespace qkernels::cuda
