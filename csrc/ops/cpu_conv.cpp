// How a CPU runs conv with int8 activations: workspace, threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/conv.h"
#include "ops/workspace.h"

namespace qkernels {
namespace {

// Elements of x per thread below which starting another costs more than it gains.
constexpr int64_t kImageGrain = 16 * 1024;

// Images are taken as many at a time as their workspace stays below this.
constexpr int64_t kImageCap = int64_t{3} << 20;

// The range of each of `count` images from image `first` on.
void find_codes(const ConvArgs& a, int64_t first, int64_t count, ImageCodes* codes) {
  const GivenCodes& given = a.x_codes;
  const ImageCodes fixed{given.scale, 1.0f / given.scale, given.zero, false};
  if (a.x_type == DType::i8) return std::fill(codes, codes + count, fixed);
  const Kernels& table = kernels();
  const int64_t elements = a.channels * a.in[0] * a.in[1] * a.in[2];
  const int64_t pieces = (elements + 8 * kImageGrain - 1) / (8 * kImageGrain);
  const int64_t piece = pieces == 0 ? 0 : (elements + pieces - 1) / pieces;
  std::vector<Range> ranges(count * pieces);
  parallel(count * pieces, grain_for(kImageGrain, piece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (first + i / pieces) * elements, from = i % pieces * piece;
      ranges[i] = table.range(a.x, a.x_type, at + std::min(from, elements),
                              at + std::min(from + piece, elements));
    }
  });
  for (int64_t n = 0; n < count; ++n) {
    Range all;
    for (int64_t i = n * pieces; i < (n + 1) * pieces; ++i) {
      all.min = std::min(all.min, ranges[i].min);
      all.max = std::max(all.max, ranges[i].max);
      all.magnitude = std::max(all.magnitude, ranges[i].magnitude);
    }
    if (a.is_static) {
      codes[n] = fixed;
      if (!all.finite()) codes[n].scale = NAN;
    } else {
      const Affine affine = choose_affine(all, Format::int8, a.symmetric, DType::f32);
      codes[n] = {affine.scale, affine.inverse, affine.zero_point, all.finite()};
    }
  }
}

// Whether x is the image that the kernel slides over: nothing to quantize, to move or to fill in.
bool is_image(const ConvArgs& a) {
  if (a.x_type != DType::i8 || !a.x_channels_last || a.channels != a.pixel_codes()) return false;
  if (a.depthwise || a.compact) return false;  // these may read past the last code
  for (int i = 0; i < 3; ++i) {
    if (a.step[i] != 1 || a.before[i] != 0 || a.grid[i] > a.in[i]) return false;
  }
  return kernels().conv_reads_codes(a);
}

}  // namespace

void run_conv_int8(const ConvArgs& whole, const Layout& layout) {
  const Kernels& table = kernels();
  ConvArgs a = whole;
  a.compact = !a.depthwise && a.groups == 1 && a.channels > 0 && a.channels < 4 &&
              a.kernel[2] > 1 && a.dilation[2] == 1 && table.conv_reads_codes(a);
  const BlockShape compact =
      a.compact ? block_shape(layout, a.taps() / a.kernel[2] * a.row_codes(), -1) : a.shape;
  const bool no_copy = is_image(a);
  if (no_copy) std::copy(a.in, a.in + 3, a.grid);
  const int64_t image_bytes = a.image_codes() * table.conv_code_bytes(a);
  const int64_t chunk =
      no_copy ? a.batch
              : std::min(a.batch, std::max<int64_t>(1, kImageCap / std::max<int64_t>(1, image_bytes)));
  const int64_t space = no_copy ? 0 : chunk * image_bytes + std::max(kLine, a.pixel_codes());
  const int64_t weights = a.compact ? a.blocks() * compact.bytes : 0;
  Workspace workspace(Workspace::bytes<uint8_t>(space) + Workspace::bytes<uint8_t>(weights) +
                      Workspace::bytes<ImageCodes>(chunk));
  uint8_t* const image = workspace.take<uint8_t>(space);
  if (a.compact) {
    uint8_t* const packed = workspace.take<uint8_t>(weights);
    compact_blocks(a, compact, packed);
    a.packed = packed;
    a.shape = compact;
  }
  ImageCodes* codes = workspace.take<ImageCodes>(chunk);
  a.codes = codes;
  const int64_t x_image = a.channels * a.in[0] * a.in[1] * a.in[2] * bytes_of(a.x_type);
  const int64_t y_image = a.out_channels * a.pixels();
  for (int64_t first = 0; first < whole.batch; first += chunk) {
    a.batch = std::min(chunk, whole.batch - first);
    a.x = static_cast<const uint8_t*>(whole.x) + first * x_image;
    a.y = static_cast<uint8_t*>(whole.y) + first * y_image * bytes_of(a.y_type);
    if (a.residual != nullptr) {
      a.residual =
          static_cast<const uint8_t*>(whole.residual) + first * y_image * bytes_of(a.residual_type);
    }
    find_codes(a, 0, a.batch, codes);
    a.image = no_copy ? static_cast<const uint8_t*>(a.x) : image;
    if (!no_copy) {
      parallel(a.batch * a.grid[0] * a.grid[1], grain_for(kImageGrain, a.grid[2] * a.pixel_codes()),
               [&](int64_t begin, int64_t end) { table.conv_prepare(a, image, begin, end); });
    }
    // Each thread reads all of the smaller one of weight and image.
    const int64_t pixels = a.batch * a.pixels(), blocks = a.blocks();
    const int64_t products = kLanes * a.shape.k;
    if (blocks * a.shape.bytes > a.batch * image_bytes &&
        blocks >= torch::stable::get_num_threads()) {
      parallel(blocks, grain_for(kConvGrain, products * pixels),
               [&](int64_t begin, int64_t end) { table.conv(a, begin, end, 0, pixels); });
    } else {
      const int64_t steps = (pixels + kPixelStep - 1) / kPixelStep;
      parallel(steps, grain_for(kConvGrain, products * blocks * kPixelStep),
               [&](int64_t begin, int64_t end) {
                 table.conv(a, 0, blocks, begin * kPixelStep, std::min(pixels, end * kPixelStep));
               });
    }
  }
}

}  // namespace qkernels
