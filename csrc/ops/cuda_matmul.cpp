// linear and its gradient by torch's matmul, of the weight dequantized.
#include "ops/cuda_matmul.h"

#include <algorithm>

#include "cuda/linear_float.h"
#include "ops/aten.h"
#include "ops/cuda_api.h"

namespace qkernels {
namespace {

// The weight is dequantized in pieces of kPieceBytes, or of as much more as it takes to give each
// multiprocessor of a large GPU a tile of the product, 128 x 256; but of at most kMostBytes, which
// an 8192 x 8192 in 16 bits has. All pieces of a weight use the same memory: where it stays in the
// L2 cache, what one piece left there is overwritten before it is written to memory. In the
// emulator of the tests small shapes have several pieces.
#ifdef QKERNELS_HOST
constexpr int64_t kPieceBytes = int64_t{8} << 10, kMostBytes = kPieceBytes;
#else
constexpr int64_t kPieceBytes = int64_t{32} << 20, kMostBytes = int64_t{128} << 20;
#endif
constexpr int64_t kProductTiles = int64_t{128} * 128 * 256;

// Into how large pieces `count` is cut, if each of them takes `bytes` and the product has `rows`:
// equal ones, multiples of `step`.
int64_t piece_of(int64_t count, int64_t bytes, int64_t rows, int64_t step) {
  const int64_t wanted = std::max(kPieceBytes / bytes, kProductTiles / rows);
  const int64_t most = std::max(step, std::min(wanted, kMostBytes / bytes) / step * step);
  const int64_t pieces = (count + most - 1) / most;
  return std::min(count, round_up((count + pieces - 1) / pieces, step));
}

const void* at(const void* data, int64_t element, DType type) {
  return static_cast<const uint8_t*>(data) + element * bytes_of(type);
}

}  // namespace

void linear_by_matmul(const LinearArgs& a) {
  const cuda::Stream stream = current_stream();
  const int64_t k = a.shape.k;
  const ScalarType type = scalar_type(a.x_type);
  std::optional<Tensor> gathered;
  if (a.premul != nullptr || a.perm != nullptr) {
    gathered = empty_on_device({a.rows, k}, type);
    cuda::gather_rows(a, gathered->mutable_data_ptr(), stream);
  }
  const Tensor x = gathered ? *gathered : view_on_device(a.x, {a.rows, k}, type);
  // A bias of x's type may be added before the result is rounded.
  const bool bias_is_theirs = a.bias != nullptr && a.bias_type == a.x_type;

  const int64_t piece = piece_of(a.n, k * bytes_of(a.x_type), a.rows, kLanes);
  const Tensor numbers = empty_on_device({piece, k}, type);
  DequantizePackedArgs d{nullptr, a.layout, a.shape, 1, 0, 0, k, numbers.mutable_data_ptr(),
                         a.x_type};
  for (int64_t begin = 0; begin < a.n; begin += piece) {
    d.n = std::min(piece, a.n - begin);
    d.packed = a.packed + begin / kLanes * a.shape.bytes;
    cuda::dequantize_packed(d, stream);
    std::optional<Tensor> bias;
    if (bias_is_theirs) bias = view_on_device(at(a.bias, begin, a.bias_type), {d.n}, type);
    linear_out(view_on_device(at(a.y, begin, a.y_type), {a.rows, d.n}, {a.n, 1}, type), x,
               view_on_device(d.y, {d.n, k}, type), bias);
  }
  const bool bias_is_ours = a.bias != nullptr && !bias_is_theirs;
  if (!bias_is_ours && a.epilogue == Epilogue::none) return;
  cuda::finish({a.y, a.y, a.y_type, a.rows * a.n, a.n, 1, bias_is_ours ? a.bias : nullptr,
                a.bias_type, a.epilogue},
               stream);
}

void backward_by_matmul(const BackwardArgs& a) {
  const int64_t k = a.shape.k;
  const ScalarType type = scalar_type(a.type);
  // Columns of W: each piece gives columns of dx, and nothing has to be added up.
  const int64_t piece = piece_of(k, a.n * bytes_of(a.type), a.rows, 64);
  const Tensor numbers = empty_on_device({a.n * piece}, type);
  const Tensor dy = view_on_device(a.dy, {a.rows, a.n}, type);
  DequantizePackedArgs d{a.packed, a.layout, a.shape, 1, a.n, 0, 0, numbers.mutable_data_ptr(),
                         a.type};
  for (int64_t begin = 0; begin < k; begin += piece) {
    d.k_begin = begin;
    d.k_end = std::min(k, begin + piece);
    const int64_t width = d.k_end - begin;
    cuda::dequantize_packed(d, current_stream());
    mm_out(view_on_device(at(a.dx, begin, a.type), {a.rows, width}, {k, 1}, type), dy,
           view_on_device(d.y, {a.n, width}, type));
  }
}

}  // namespace qkernels
