// prepare: rows of x as int8 codes, with their scales and zero points. A block takes a row; what of
// it fits stays in registers between finding its range and making its codes, so that x is read
// once.
//
//   panel       codes in the order of the weight's padded k, 0 in the padding; see panel.cuh
//   group_sums  [groups][rows]: sums of the codes, where the weight has zero points, of int4 as
//               floats; for a tiled panel code_sum_pitch(rows) apart
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"
#include "cuda/int8.cuh"
#include "cuda/linear_int8.cuh"
#include "cuda/panel.cuh"
#include "cuda/range.cuh"

namespace qkernels::cuda {
namespace {

// Threads of a block at most, and eights of a thread that stay in registers. With many rows there
// are other blocks to run while one waits, and what a thread does once for its row counts; a few
// rows take as long as one thread does.
struct Many {
  static constexpr int kThreads = 256, kKept = 4;  // 8192 k
};
struct Few {
  static constexpr int kThreads = 1024, kKept = 2;  // 16384 k
};
// Of the kernel for rows without padding, whose threads keep a chunk each.
constexpr int kChunkThreads = 1024;

// Eight places of a row of the panel, and the `count` columns of the weight that are there.
struct Piece {
  int64_t k;
  int count;
};

QK_DEVICE Piece piece_at(const BlockShape& s, uint32_t eight) {
  const uint32_t at = eight * kEight;
  // Most weights have nothing between their groups.
  if (s.groups <= 1 || s.group_size == s.group_padded) {
    return {at, static_cast<int>(max(int64_t{0}, min(s.k - at, int64_t{kEight})))};
  }
  const uint32_t last = static_cast<uint32_t>(s.groups - 1);
  const uint32_t group = min(at / static_cast<uint32_t>(s.group_padded), last);
  const int64_t offset = at - s.padded_begin(group);
  const int64_t left = s.group_length(group) - offset;
  return {s.group_begin(group) + offset, static_cast<int>(max(int64_t{0}, min(left, int64_t{8})))};
}

// kVectors: the eight lie side by side in x, on a vector, or are all padding.
template <DType kType, bool kVectors>
QK_DEVICE void load_piece(const LinearArgs& a, int64_t row, uint32_t eight, float (&x)[kEight]) {
  const Piece p = piece_at(a.shape, eight);
#pragma unroll
  for (int i = 0; i < kEight; ++i) x[i] = 0.0f;
  if constexpr (kVectors) {
    if (p.count == 0) return;
    load_eight<kType>(x, a.x, row * a.shape.k + p.k);
    if (a.premul == nullptr) return;
    float factors[kEight];
    load_eight<DType::f32>(factors, a.premul, p.k);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] *= factors[i];
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i >= p.count) continue;
      const int64_t column = a.perm == nullptr ? p.k + i : a.perm[p.k + i];
      // An index from nowhere must not read there; the CPU refuses it, a GPU's glue cannot look.
      if (column < 0 || column >= a.shape.k) {
        x[i] = NAN;
        continue;
      }
      x[i] = load_element<kType>(a.x, row * a.shape.k + column);
      if (a.premul != nullptr) x[i] *= a.premul[column];
    }
  }
}

// ---- Scales -------------------------------------------------------------------------------------

QK_DEVICE Affine row_affine(const LinearArgs& a, const Range& range) {
  if (a.device_scale == nullptr) {
    const bool symmetric = a.activation == Activation::int8_symmetric;
    return choose_affine(range, Format::int8, symmetric, DType::f32);
  }
  const float scale = *a.device_scale;
  const int zero = a.device_zero_point == nullptr ? 0 : *a.device_zero_point;
  return {range.finite() ? scale : NAN, 1.0f / scale, zero};
}

// ---- Codes --------------------------------------------------------------------------------------

// Eight codes in the order in which the weight's fragments take k: as they are for int8, and as
// `weight_fragment` takes nibbles out of a word for 4 bits.
QK_DEVICE uint2 k_order(uint32_t low, uint32_t high, bool nibbles) {
  if (!nibbles) return make_uint2(low, high);
  return make_uint2(prmt(low, high, 0x5140), prmt(low, high, 0x7362));
}

// Whether a row's scale is chosen for it and its codes have no zero point: then its largest
// magnitude is all that is asked for, no quotient is beyond 127, and padding needs no care.
QK_HD inline bool is_plain(const LinearArgs& a) {
  return a.activation == Activation::int8_symmetric && a.device_scale == nullptr;
}

QK_DEVICE void extend_by(Range* range, const float (&x)[kEight], bool plain) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (plain) {
      range->magnitude = max(range->magnitude, bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    } else {
      extend(range, x[i]);
    }
  }
}

QK_DEVICE uint2 pack_codes(const uint32_t (&codes)[kEight], bool nibbles) {
  return k_order(low_bytes(codes[0], codes[1], codes[2], codes[3]),
                 low_bytes(codes[4], codes[5], codes[6], codes[7]), nibbles);
}

// Of numbers whose largest magnitude chose the scale.
QK_DEVICE uint2 encode_plain(float inverse, bool nibbles, const float (&x)[kEight]) {
  uint32_t codes[kEight];
#pragma unroll
  for (int i = 0; i < kEight; ++i) codes[i] = bit_cast<uint32_t>(x[i] * inverse + 0x1.8p23f);
  return pack_codes(codes, nibbles);
}

QK_DEVICE uint2 encode_piece(const LinearArgs& a, uint32_t eight, const Encoder& e, bool plain,
                             const float (&x)[kEight]) {
  const bool nibbles = a.layout.format == Format::int4;
  if (plain) return encode_plain(e.inverse, nibbles, x);
  uint32_t codes[kEight];
  const int count = piece_at(a.shape, eight).count;
#pragma unroll
  for (int i = 0; i < kEight; ++i) codes[i] = i < count ? encode_low_byte(e, x[i]) : 0;
  return pack_codes(codes, nibbles);
}

// The panel's finished row, a group at a time.
QK_DEVICE void sum_groups(const LinearArgs& a, int64_t row, const Panel& panel) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t g = threadIdx.x / kWarp; g < a.shape.groups; g += warps) {
    const int eights = static_cast<int>(a.shape.padded_length(g) / kEight);
    int32_t sum = 0;
    for (int i = threadIdx.x % kWarp; i < eights; i += kWarp) {
      const int64_t eight = a.shape.padded_begin(g) / kEight + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t v = *reinterpret_cast<const uint32_t*>(panel.word(row, eight, half));
        sum = dp4a(v, 0x01010101u, sum);
      }
    }
    sum = warp_sum(sum);
    // Exact: below 2^24.
    if (a.layout.format == Format::int4) sum = bit_cast<int32_t>(static_cast<float>(sum));
    const int64_t pitch = panel.tiled ? code_sum_pitch(a.rows) : a.rows;
    if (threadIdx.x % kWarp == 0) a.group_sums[g * pitch + row] = sum;
  }
}

template <DType kType, bool kVectors, class Rows>
__global__ void __launch_bounds__(Rows::kThreads)
    prepare_kernel(const LinearArgs a, const Panel panel, uint32_t eights) {
  constexpr int kKept = Rows::kKept;
  const int64_t row = blockIdx.x;
  const uint32_t step = blockDim.x;
  const bool plain = is_plain(a);
  float kept[kKept][kEight];
  Range range;
#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    const uint32_t eight = threadIdx.x + p * step;
    if (eight < eights) {
      load_piece<kType, kVectors>(a, row, eight, kept[p]);
      extend_by(&range, kept[p], plain);
    }
  }
  for (uint32_t eight = threadIdx.x + kKept * step; eight < eights; eight += step) {
    float x[kEight];
    load_piece<kType, kVectors>(a, row, eight, x);
    extend_by(&range, x, plain);
  }
  const Affine affine = row_affine(a, block_range(range));
  if (threadIdx.x == 0) {
    a.row_scale[row] = affine.scale;
    a.row_zero[row] = static_cast<float>(affine.zero_point);
  }
  const Encoder e = make_encoder(affine, a.activation == Activation::int8_symmetric);
#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    const uint32_t eight = threadIdx.x + p * step;
    if (eight < eights) panel.store(row, eight, encode_piece(a, eight, e, plain, kept[p]));
  }
  for (uint32_t eight = threadIdx.x + kKept * step; eight < eights; eight += step) {
    float x[kEight];
    load_piece<kType, kVectors>(a, row, eight, x);
    panel.store(row, eight, encode_piece(a, eight, e, plain, x));
  }
  if (!a.layout.symmetric) {
    __syncthreads();
    sum_groups(a, row, panel);
  }
}

// ---- Rows without padding, each with a scale of its own ----------------------------------------

// The usual case, with 11 instructions for a number instead of 28. A thread takes the 32 k of a
// chunk, whose codes are two vectors of the panel.
template <DType kType>
struct Chunk {
  static constexpr int kEights = kCudaChunk / kEight;
  Eight<kType> eights[kEights];

  QK_DEVICE void load(const LinearArgs& a, int64_t row, uint32_t chunk) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      eights[i].load(a.x, row * a.shape.k + chunk * kCudaChunk + i * kEight);
    }
  }

  // The largest magnitude, as a float's bits.
  QK_DEVICE uint32_t magnitude() const {
    constexpr bool kWide = kType == DType::f32;
    constexpr uint32_t kMask = kWide ? 0x7fffffff : 0x7fff7fff;
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
#pragma unroll
      for (int v = 0; v < Eight<kType>::kVectors; ++v) {
        const uint4 words = eights[i].vectors[v];
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          most = kWide ? max(most, w[j] & kMask) : max_u16x2(most, w[j] & kMask);
        }
      }
    }
    if constexpr (kWide) return most;
    const uint16_t half = static_cast<uint16_t>(max(most & 0xffff, most >> 16));
    return bit_cast<uint32_t>(kType == DType::bf16 ? bf16_to_float(half) : f16_to_float(half));
  }

  QK_DEVICE void encode(float inverse, bool nibbles, uint2 (&codes)[kEights]) const {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      float x[kEight];
      eights[i].widen(x);
      codes[i] = encode_plain(inverse, nibbles, x);
    }
  }
};

template <DType kType>
__global__ void __launch_bounds__(kChunkThreads)
    prepare_chunks_kernel(const LinearArgs a, const Panel panel, uint32_t chunks) {
  const int64_t row = blockIdx.x;
  const uint32_t real = static_cast<uint32_t>(a.shape.k) / kCudaChunk;
  let_next_begin();
  Chunk<kType> mine;
  uint32_t most = 0;
  if (threadIdx.x < real) {
    mine.load(a, row, threadIdx.x);
    most = mine.magnitude();
  }
  for (uint32_t chunk = threadIdx.x + blockDim.x; chunk < real; chunk += blockDim.x) {
    Chunk<kType> other;
    other.load(a, row, chunk);
    most = max(most, other.magnitude());
  }
  Range range;
  range.magnitude = block_max(most);
  const Affine affine = choose_affine(range, Format::int8, true, DType::f32);
  if (threadIdx.x == 0) {
    a.row_scale[row] = affine.scale;
    a.row_zero[row] = 0.0f;
  }
  const bool nibbles = a.layout.format == Format::int4;
  for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    uint2 codes[Chunk<kType>::kEights] = {};
    if (chunk != threadIdx.x && chunk < real) mine.load(a, row, chunk);
    if (chunk < real) mine.encode(affine.inverse, nibbles, codes);
    panel.store_chunk(row, chunk, codes);
  }
  if (!a.layout.symmetric) {
    __syncthreads();
    sum_groups(a, row, panel);
  }
}

// int_mm: the codes are given.
__global__ void __launch_bounds__(Many::kThreads)
    copy_codes_kernel(const LinearArgs a, const Panel panel, uint32_t eights) {
  const int64_t row = blockIdx.x;
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * a.shape.k;
  const bool vectors = a.shape.k % kEight == 0 && reinterpret_cast<uintptr_t>(a.x) % kEight == 0;
  for (uint32_t eight = threadIdx.x; eight < eights; eight += blockDim.x) {
    const Piece p = piece_at(a.shape, eight);
    uint2 v = make_uint2(0, 0);
    if (vectors && p.count == kEight) {
      v = load_64(x + p.k);
    } else {
      uint32_t bytes[kEight] = {};
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (i < p.count) bytes[i] = static_cast<uint8_t>(x[p.k + i]);
      }
      v = make_uint2(low_bytes(bytes[0], bytes[1], bytes[2], bytes[3]),
                     low_bytes(bytes[4], bytes[5], bytes[6], bytes[7]));
    }
    panel.store(row, eight, v);
  }
}

bool vectors_fit(const LinearArgs& a) {
  const BlockShape& s = a.shape;
  return a.perm == nullptr && s.k % kEight == 0 && (s.groups <= 1 || s.group_size % kEight == 0) &&
         reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(a.premul) % 16 == 0;
}

bool chunks_fit(const LinearArgs& a) {
  const BlockShape& s = a.shape;
  return is_plain(a) && vectors_fit(a) && a.premul == nullptr && s.k % kCudaChunk == 0 &&
         (s.groups <= 1 || s.group_size == s.group_padded);
}

}  // namespace

void prepare_int8(const LinearArgs& a, bool tiled, Stream stream) {
  const Panel panel = panel_of(a, tiled);
  const uint32_t eights = static_cast<uint32_t>(panel.pitch / (tiled ? kPanelRows : 1) / kEight);
  // Warps for so many eights of each thread.
  const auto threads = [&](int64_t each, int64_t most) {
    const int64_t wanted = round_up((eights + each - 1) / each, kWarp);
    return static_cast<unsigned>(max(int64_t{kWarp}, min(wanted, most)));
  };
  const dim3 grid(static_cast<unsigned>(a.rows));
  if (a.x_type == DType::i8) {
    return launch(copy_codes_kernel, grid, threads(1, Many::kThreads), 0, stream, a, panel, eights);
  }
  if (chunks_fit(a)) {
    const uint32_t chunks = eights / (kCudaChunk / kEight);
    const unsigned count =
        static_cast<unsigned>(min(round_up(chunks, kWarp), int64_t{kChunkThreads}));
    return for_float(a.x_type, [&](auto type) {
      launch(prepare_chunks_kernel<decltype(type)::value>, grid, max(count, unsigned{kWarp}),
             kRangeBytes, stream, a, panel, chunks);
    });
  }
  const bool few = a.rows <= multiprocessors();
  for_float(a.x_type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const bool vectors = vectors_fit(a);
    if (few) {
      const auto kernel =
          vectors ? prepare_kernel<kType, true, Few> : prepare_kernel<kType, false, Few>;
      launch(kernel, grid, threads(Few::kKept, Few::kThreads), kRangeBytes, stream, a, panel,
             eights);
    } else {
      const auto kernel =
          vectors ? prepare_kernel<kType, true, Many> : prepare_kernel<kType, false, Many>;
      launch(kernel, grid, threads(1, Many::kThreads), kRangeBytes, stream, a, panel, eights);
    }
  });
}

}  // namespace qkernels::cuda
