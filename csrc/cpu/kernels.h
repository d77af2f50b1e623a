// The kernel table: one function pointer per operation, one table per ISA. Kernels take ranges and
// never start threads; ops/ splits the work.
#pragma once

#include <cstdint>

#include "core/codec.h"
#include "core/params.h"

namespace qkernels {

struct Kernels {
  const char* isa;

  // Rows [begin, end): scales, zero points and codes, one pass over memory.
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);
  // The same with the scales given.
  void (*quantize_with)(const QuantizeArgs&, int64_t begin, int64_t end);
  // Range of `count` consecutive elements, for a scale shared by the tensor.
  Range (*range)(const void* x, DType type, int64_t begin, int64_t end);
  void (*dequantize)(const DequantizeArgs&, int64_t begin, int64_t end);

  // Rows [begin, end): quantized and dequantized in one pass, and the gradients of that.
  void (*fake_quantize)(const FakeQuantizeArgs&, int64_t begin, int64_t end);
  void (*fake_quantize_backward)(const FakeBackwardArgs&, int64_t begin, int64_t end);

  // Rows per tile of a prepared panel, and blocks of 16 output features that a tile spans. Work is
  // best split on these; any split is correct as long as `prepare` begins on a row tile.
  int (*row_tile)(const LinearArgs&);
  int (*block_tile)(const LinearArgs&);
  // Bytes of the whole panel for args.rows rows.
  int64_t (*panel_bytes)(const LinearArgs&);
  // Rows [begin, end) of x into the workspace; begin is a multiple of the row tile.
  void (*prepare)(const LinearArgs&, int64_t begin, int64_t end);
  // Blocks [block_begin, block_end) times rows [row_begin, row_end); row_begin as above.
  void (*linear)(const LinearArgs&, int64_t block_begin, int64_t block_end, int64_t row_begin,
                 int64_t row_end);
  // The name of the tile that `linear` runs for such a layout, activation, number of rows and type
  // of x; nothing else is read.
  const char* (*linear_name)(const LinearArgs&);

  // Columns [k_begin, k_end) of rows of dx, kBackwardColumns at most; best a multiple of
  // kBackwardStep of them.
  // scratch holds kBackwardScratch floats. Any split gives the same bits.
  void (*backward)(const BackwardArgs&, int64_t row_begin, int64_t row_end, int64_t k_begin,
                   int64_t k_end, float* scratch);

  // Rows [begin, end) of y.
  void (*embedding)(const EmbeddingArgs&, int64_t begin, int64_t end);

  // Bytes of a code of the image, and whether they are the codes themselves, as they are in x.
  int (*conv_code_bytes)(const ConvArgs&);
  bool (*conv_reads_codes)(const ConvArgs&);
  // Rows [begin, end) of the image, which has batch * grid[0] * grid[1] of them.
  void (*conv_prepare)(const ConvArgs&, uint8_t* image, int64_t begin, int64_t end);
  // Blocks [block_begin, block_end) times pixels [pixel_begin, pixel_end) of batch * pixels(); any
  // split gives the same bits.
  void (*conv)(const ConvArgs&, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
               int64_t pixel_end);
  const char* (*conv_name)(bool depthwise);

  // Lines [begin, end) of y, which has lines() of them.
  void (*max_pool)(const PoolArgs&, int64_t begin, int64_t end);
  void (*avg_pool)(const PoolArgs&, int64_t begin, int64_t end);
  // Elements [begin, end).
  void (*add)(const AddArgs&, int64_t begin, int64_t end);
  void (*lookup)(const LookupArgs&, int64_t begin, int64_t end);

  // Rows of a head that are computed together, and floats of scratch that this takes.
  int64_t (*attention_tile)(const AttentionArgs&);
  int64_t (*attention_scratch)(const AttentionArgs&);
  // Tiles [begin, end) of all heads of all sequences. Any split gives the same bits.
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end, float* scratch);
  // Rows [begin, end).
  void (*add_norm)(const NormArgs&, int64_t begin, int64_t end);
};

// Floats of scratch that `backward` uses, and the widest k range that it takes in one call.
inline constexpr int64_t kBackwardColumns = 256;
inline constexpr int64_t kBackwardStep = 64;
inline constexpr int64_t kBackwardScratch = kBackwardColumns * (512 + 256 + 9);

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avxvnni_evex_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

// The table in use: the best that this machine runs, or the one that QKERNELS_ISA names. Throws
// std::runtime_error when it names one that is unknown or that the machine lacks.
const Kernels& kernels();

struct Isa {
  const char* name;
  const Kernels* (*table)();
  bool (*available)();
};
extern const Isa kIsas[];
extern const int kIsaCount;

// ---- Packing: byte shuffles, the same for every ISA (pack.cpp) ----------------------------------

// Blocks [begin, end).
void pack_blocks(const PackArgs&, int64_t begin, int64_t end);

void unpack_blocks(const UnpackArgs&, int64_t begin, int64_t end);

// Blocks of a packed convolution's weight [rows, taps of a row, channels filled up to 4] without
// the filling: [rows, row_codes()]. Both shapes are of whole-row int8 weights.
void compact_blocks(const ConvArgs&, const BlockShape& compact, uint8_t* out);

// Output pixels [begin, end) of a convolution whose activations stay floats: the elements of x that
// group `group` of channels sees at each, as rows of a matrix [pixels, taps * group_channels] in
// x's type. Zeros stand for borders and for channels that the group lacks.
void gather_pixels(const ConvArgs&, int64_t group, int64_t begin, int64_t end, void* rows);

// The same pixels of a depthwise convolution with the float weight [taps, channels].
void depthwise_float(const ConvArgs&, const float* weight, int64_t begin, int64_t end);

// Packs columns of a plain int8 matrix b[k, n] (any strides) as an int8 weight without scales.
void pack_int8_columns(const int8_t* b, int64_t stride_k, int64_t stride_n, int64_t n,
                       const BlockShape& shape, uint8_t* packed, int64_t begin, int64_t end);

// ---- Reading a packed row, lane by lane ---------------------------------------------------------

static inline int packed_code(const uint8_t* row, Format format, int64_t kp, int lane) {
  const uint8_t byte = row[code_offset(format, kp, lane)];
  if (format == Format::int8) return static_cast<int8_t>(byte);
  return byte >> code_shift(kp) & 0xf;
}

static inline float packed_scale(const uint8_t* row, const Layout& layout, const BlockShape& shape,
                                 int64_t group, int lane) {
  return load_float(row + shape.scales, layout.scale, group * kLanes + lane);
}

static inline int packed_zero(const uint8_t* row, const Layout& layout, const BlockShape& shape,
                              int64_t group, int lane) {
  if (layout.symmetric) return symmetric_zero(layout.format);
  const uint8_t byte = row[shape.zeros + group * kLanes + lane];
  return layout.format == Format::int8 ? static_cast<int8_t>(byte) : byte;
}

}  // namespace qkernels
