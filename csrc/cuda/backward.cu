// linear_backward_input: dx[m, k] = sum over n of dy[m, n] * W[n, k]. A block makes a tile of dx.
// Step by step it turns codes of kStep outputs into numbers in shared memory, which all of its rows
// of dy meet there; two buffers of each, so that the next step is on its way meanwhile. Columns are
// padded k, as in core/format.h: a tile then consists of whole eights of codes, and what fills up a
// group is computed and dropped.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/packed.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 2 * kLanes;  // outputs, from two packed rows

// The eight codes that a thread turns into numbers, step after step: the same place of other rows.
template <Format kFormat>
struct Source {
  EightPlace place;
  int64_t group;
  bool exists;  // false behind the last column

  QK_DEVICE Source(const BackwardArgs& a, int64_t eight)
      : place(eight_in_memory<kFormat>(eight)), exists(place.kp < a.shape.k_padded) {
    group = exists ? min(divide(place.kp, a.shape.group_padded), a.shape.groups - 1) : 0;
  }
};

// The codes and what they need to become numbers.
template <Format kFormat>
struct Held {
  EightCodes codes;
  float scale;
  int zero;

  QK_DEVICE void load(const BackwardArgs& a, const Source<kFormat>& source, int64_t block) {
    if (source.exists && block * kLanes < a.n) {
      const uint8_t* row = a.packed + block * a.shape.bytes;
      codes = load_packed<kFormat>(row, source.place.kp, source.place.lane);
      scale = packed_scale(row, a.layout, a.shape, source.group, source.place.lane);
      zero = packed_zero<kFormat>(row, a.layout, a.shape, source.group, source.place.lane);
    } else {
      codes = EightCodes{};
      scale = 0.0f;
      zero = 0;
    }
  }
  QK_DEVICE void values(float (&w)[kEight]) const {
#pragma unroll
    for (int i = 0; i < kEight; ++i)
      w[i] = decode(code_of<kFormat>(codes, i), kFormat, scale, zero);
  }
};

// Where padded column `kp` belongs, or -1.
QK_DEVICE int64_t column_of(const BlockShape& s, int64_t kp) {
  const int64_t group = min(divide(kp, s.group_padded), s.groups - 1);
  const int64_t offset = kp - s.padded_begin(group);
  return offset < s.group_length(group) ? s.group_begin(group) + offset : -1;
}

struct Tile {
  int64_t token, kp;  // the first ones
};
QK_DEVICE Tile tile_of(const BackwardArgs& a, int tokens, int columns) {
  const int64_t across = (a.shape.k_padded + columns - 1) / columns;
  const int64_t down = divide(blockIdx.x, across);
  return {down * tokens, (blockIdx.x - down * across) * columns};
}

// ---- 16-bit dy: tensor cores --------------------------------------------------------------------
// W is rounded to the type of dy. Eight warps, two along the tokens and four along the columns,
// make 64 x 32 each. The 16-byte segments of a row of shared memory are permuted so that neither writing
// nor ldmatrix finds two of eight in the same banks.

constexpr int kTokens = 128, kColumns = 128;
constexpr int kWarpTokens = 64, kWarpColumns = 32;

// Of W, [kStep][kColumns]. The rows that a thread's neighbours write are 8 apart, the rows that
// ldmatrix reads are next to each other.
QK_DEVICE int panel_at(int n, int segment) {
  return n * kColumns + (segment ^ n % 8 ^ n / 8 % 2 * 6) * kEight;
}
// Of dy, [kTokens][kStep]: two rows fill the banks.
QK_DEVICE int dy_at(int token, int segment) {
  return token * kStep + (segment ^ token / 2 % 4) * kEight;
}

struct alignas(16) Shared {
  uint16_t panel[2][kStep * kColumns];
  uint16_t dy[2][kTokens * kStep];
};

template <DType kType>
QK_DEVICE uint4 narrow(const float (&w)[kEight]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] =
        kType == DType::bf16 ? pack_bf16(w[2 * i], w[2 * i + 1]) : pack_f16(w[2 * i], w[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// dy[token ..][n ..] into shared memory, zeros where there is none. Rows that start on vectors go
// in the background.
template <bool kVectors>
QK_DEVICE void load_dy(const BackwardArgs& a, int64_t first_token, int64_t first_n, uint16_t* to) {
  constexpr int kSegments = kStep / kEight;
#pragma unroll
  for (int i = 0; i < kTokens * kSegments / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    const int token = index / kSegments, segment = index % kSegments;
    const int64_t row = first_token + token, n = first_n + segment * kEight;
    const uint16_t* from = static_cast<const uint16_t*>(a.dy) + row * a.n + n;
    const int64_t left = row < a.rows ? a.n - n : 0;
    if constexpr (kVectors) {
      cp_async<16>(to + dy_at(token, segment), from, left > 0 ? 16 : 0);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (j < left) words[j / 2] |= static_cast<uint32_t>(from[j]) << j % 2 * 16;
      }
      store_shared_128(to + dy_at(token, segment),
                       make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

template <DType kType>
QK_DEVICE void multiply(const uint16_t* panel, const uint16_t* dy, int token, int column,
                        float (&sums)[4][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < kStep; n += 16) {
    uint32_t b[4][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t r[4];
      const int segment = column / kEight + j * 2 + lane / 16;
      ldmatrix_x4_trans(r, panel + panel_at(n + lane % 16, segment));
      b[j * 2][0] = r[0], b[j * 2][1] = r[1], b[j * 2 + 1][0] = r[2], b[j * 2 + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t d[4];
      ldmatrix_x4(d, dy + dy_at(token + i * 16 + lane % 16, n / kEight + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        kType == DType::bf16 ? mma_bf16(sums[i][j], d, b[j]) : mma_f16(sums[i][j], d, b[j]);
      }
    }
  }
}

// Two neighbouring padded columns of a row of dx; k[i] is -1 where there is none.
template <DType kType>
QK_DEVICE void store_pair(const BackwardArgs& a, int64_t row, const int64_t (&k)[2], float first,
                          float second) {
  if (row >= a.rows) return;
  const int64_t at = row * a.shape.k;
  if (k[1] >= 0 && (at + k[0]) % 2 == 0) {
    const uint32_t pair = kType == DType::bf16 ? pack_bf16(first, second) : pack_f16(first, second);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.dx) + at + k[0]) = pair;
    return;
  }
  if (k[0] >= 0) store_element<kType>(a.dx, at + k[0], first);
  if (k[1] >= 0) store_element<kType>(a.dx, at + k[1], second);
}

template <Format kFormat, DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2) backward_16_kernel(const BackwardArgs a) {
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int token = warp % 2 * kWarpTokens, column = warp / 2 * kWarpColumns;
  const Tile tile = tile_of(a, kTokens, kColumns);
  // kColumns of a packed row are as many eights as there are threads.
  const Source<kFormat> source(a, tile.kp / kColumns * kThreads + thread);
  const int segment = static_cast<int>(source.place.kp - tile.kp) / kEight;

  float sums[4][4][4] = {};
  Held<kFormat> held[2];
  held[0].load(a, source, 0);
  held[1].load(a, source, 1);
  load_dy<kVectors>(a, tile.token, 0, shared.dy[0]);
  cp_async_commit();
  int buffer = 0;
  for (int64_t n = 0; n < a.n; n += kStep, buffer ^= 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float w[kEight];
      held[i].values(w);
      store_shared_128(shared.panel[buffer] + panel_at(i * kLanes + source.place.lane, segment),
                       narrow<kType>(w));
      held[i].load(a, source, (n + kStep) / kLanes + i);
    }
    cp_async_wait<0>();
    // The other buffers are free as well: who is here has read them.
    __syncthreads();
    if (n + kStep < a.n) load_dy<kVectors>(a, tile.token, n + kStep, shared.dy[buffer ^ 1]);
    cp_async_commit();
    multiply<kType>(shared.panel[buffer], shared.dy[buffer], token, column, sums);
  }
  cp_async_wait<0>();

#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t kp = tile.kp + column + j * kEight + lane % 4 * 2;
    const int64_t k[2] = {column_of(a.shape, kp), column_of(a.shape, kp + 1)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = tile.token + token + i * 16 + lane / 4;
      store_pair<kType>(a, row, k, sums[i][j][0], sums[i][j][1]);
      store_pair<kType>(a, row + 8, k, sums[i][j][2], sums[i][j][3]);
    }
  }
}

// ---- float32 dy ---------------------------------------------------------------------------------
// By fma, in ascending order of n, as on the CPU. A thread makes 4 x 4 of 64 x 64.

constexpr int kTokens32 = 64, kColumns32 = 64;
constexpr int kDyStride = kTokens32 + 4;  // floats; writing dy[n] of a token meets few equal banks

struct alignas(16) Shared32 {
  float panel[2][kStep][kColumns32];
  float dy[2][kStep][kDyStride];
};

template <Format kFormat>
__global__ void __launch_bounds__(kThreads) backward_32_kernel(const BackwardArgs a) {
  Shared32& shared = *shared_memory<Shared32>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Tile tile = tile_of(a, kTokens32, kColumns32);
  constexpr int kEights = kColumns32 * kLanes / kEight;  // of a packed row
  const Source<kFormat> source(a, tile.kp / kColumns32 * kEights + thread % kEights);
  const int part = thread / kEights, place = static_cast<int>(source.place.kp - tile.kp);
  const int token = thread / 16 * 4, column = thread % 16 * 4;

  float sums[4][4] = {};
  Held<kFormat> held;
  held.load(a, source, part);
  int buffer = 0;
  for (int64_t n = 0; n < a.n; n += kStep, buffer ^= 1) {
    float w[kEight];
    held.values(w);
    held.load(a, source, (n + kStep) / kLanes + part);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      shared.panel[buffer][part * kLanes + source.place.lane][place + i] = w[i];
    }
#pragma unroll
    for (int i = 0; i < kTokens32; i += kThreads / kWarp) {
      const int64_t row = tile.token + i + warp;
      const bool exists = row < a.rows && n + lane < a.n;
      shared.dy[buffer][lane][i + warp] =
          exists ? static_cast<const float*>(a.dy)[row * a.n + n + lane] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const uint4 d = load_shared_128(&shared.dy[buffer][j][token]);
      const uint4 v = load_shared_128(&shared.panel[buffer][j][column]);
      const uint32_t dys[4] = {d.x, d.y, d.z, d.w}, ws[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums[t][c] = std::fma(bit_cast<float>(dys[t]), bit_cast<float>(ws[c]), sums[t][c]);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t k = column_of(a.shape, tile.kp + column + c);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int64_t row = tile.token + token + t;
      if (k >= 0 && row < a.rows) static_cast<float*>(a.dx)[row * a.shape.k + k] = sums[t][c];
    }
  }
}

dim3 grid_for(const BackwardArgs& a, int64_t tokens, int64_t columns) {
  return dim3(blocks_for(a.rows, tokens) * blocks_for(a.shape.k_padded, columns));
}

}  // namespace

void linear_backward_input(const BackwardArgs& a, Stream stream) {
  const bool vectors = reinterpret_cast<uintptr_t>(a.dy) % 16 == 0 && a.n % kEight == 0;
  for_packed(a.layout.format, [&](auto format) {
    constexpr Format kFormat = decltype(format)::value;
    if (a.type == DType::f32) {
      launch(backward_32_kernel<kFormat>, grid_for(a, kTokens32, kColumns32), kThreads,
             static_cast<int64_t>(sizeof(Shared32)), stream, a);
      return;
    }
    const auto run = [&](auto kernel) {
      launch(kernel, grid_for(a, kTokens, kColumns), kThreads, static_cast<int64_t>(sizeof(Shared)),
             stream, a);
    };
    if (a.type == DType::bf16) {
      run(vectors ? backward_16_kernel<kFormat, DType::bf16, true>
                  : backward_16_kernel<kFormat, DType::bf16, false>);
    } else {
      run(vectors ? backward_16_kernel<kFormat, DType::f16, true>
                  : backward_16_kernel<kFormat, DType::f16, false>);
    }
  });
}

}  // namespace qkernels::cuda
