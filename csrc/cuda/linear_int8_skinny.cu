// linear with int8 activations for a few tokens, where reading the weight is all the work. A block
// has 16 outputs and all tokens; its warps share k. Each warp streams its part of the packed row
// through a ring of copies in shared memory, in which a thread reads only what it copied itself, so
// that nobody waits for anybody. Exact sums of each group meet in shared memory, where integers may
// be added in any order; all threads turn them into floats, and then a thread for each output adds
// up the groups in theirs.
#include "cuda/int8.cuh"
#include "cuda/linear_int8.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kRing = 8;  // units of a warp under way: 4 KiB, 32 of a block
constexpr int kRingBytes = kWarps * kRing * kCudaUnit;
// Words from a token's 16 sums to the next one's: the 8 outputs times 4 tokens that a warp adds to
// at once lie in different banks.
constexpr int kTokenPitch = 20;
constexpr int64_t kMostSumBytes = 40 * 1024;

// What a group has in shared memory: its sums, and for each output its scale and zero point.
int64_t group_bytes(const LinearArgs& a) { return (a.rows * kTokenPitch + 2 * kLanes) * 4; }

// Groups that are in shared memory at a time, in as many rounds as it takes: an even number, so
// that a round begins on a pair of chunks.
int64_t groups_at_once(const LinearArgs& a) {
  const int64_t most = kMostSumBytes / group_bytes(a) / 2 * 2;
  const int64_t rounds = max(int64_t{1}, (a.shape.groups + most - 1) / most);
  return round_up((a.shape.groups + rounds - 1) / rounds, 2);
}

// Where a warp is in the units of its weights: in a round, every warp has as many of them, one
// behind the other.
struct Cursor {
  int round = 0, unit = 0, end = 0;
};

template <Format kFormat>
struct Walk {
  static constexpr int kChunks = kFormat == Format::int8 ? 1 : 2;  // of a unit

  int rounds, units, round_units;

  QK_DEVICE Walk(const BlockShape& s, int groups) {
    const int chunks = static_cast<int>(s.k_padded / kCudaChunk);
    units = chunks / kChunks;
    round_units = groups * static_cast<int>(s.group_padded / kCudaChunk) / kChunks;
    // The last round ends with the row: what fills that up to a unit belongs to the last group.
    rounds = units == 0 ? 0 : static_cast<int>((s.groups + groups - 1) / groups);
  }

  // The warp's first unit in a round, or after it if it has none.
  QK_DEVICE Cursor at(int round) const {
    const int warp = threadIdx.x / kWarp;
    const int begin = round * round_units;
    const int count = (round + 1 == rounds ? units : begin + round_units) - begin;
    const int each = (count + kWarps - 1) / kWarps;
    return {round, begin + min(warp * each, count), begin + min((warp + 1) * each, count)};
  }

  // Goes on to the next unit there is; at the end, `round` is `rounds`.
  QK_DEVICE void settle(Cursor& c) const {
    while (c.unit == c.end && c.round < rounds) {
      ++c.round;
      if (c.round < rounds) c = at(c.round);
    }
  }
};

template <Format kFormat, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 4 ? 2 : 4)
    skinny_kernel(const LinearArgs a, int groups) {
  constexpr int kTokens = kTiles * 8;
  const int rows = static_cast<int>(a.rows), group_words = rows * kTokenPitch;
  constexpr int kChunks = Walk<kFormat>::kChunks;
  uint8_t* const shared = shared_memory<uint8_t>();
  int32_t* const group_sums = reinterpret_cast<int32_t*>(shared + kRingBytes);
  float* const scales = reinterpret_cast<float*>(group_sums + groups * group_words);
  int32_t* const zeros = reinterpret_cast<int32_t*>(scales + groups * kLanes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const Walk<kFormat> walk(a.shape, groups);
  const int last = static_cast<int>(a.shape.groups - 1);
  const int group_chunks = static_cast<int>(a.shape.group_padded / kCudaChunk);

  const uint8_t* const weights = a.packed + blockIdx.x * a.shape.bytes + lane * 16;
  uint8_t* const ring = shared + warp * kRing * kCudaUnit + lane * 16;
  Cursor next = walk.rounds > 0 ? walk.at(0) : Cursor{};
  if (walk.rounds > 0) walk.settle(next);
  int place = 0;  // in the ring, of the next unit that is asked for
  const auto ask = [&] {
    if (next.round < walk.rounds) {
      cp_async<16>(ring + place * kCudaUnit, weights + static_cast<int64_t>(next.unit) * kCudaUnit);
      ++next.unit;
      walk.settle(next);
    }
    cp_async_commit();
    place = (place + 1) % kRing;
  };
#pragma unroll 1
  for (int i = 0; i < kRing - 1; ++i) ask();

  // Outputs of a thread: feature threadIdx % 16, tokens 16 apart.
  constexpr int kOutputs = (kTokens + 15) / 16;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  float sums[kOutputs] = {};
  uint32_t exact[kOutputs] = {};

  int32_t acc[kTiles][4] = {};
  int used = 0;  // place in the ring of the unit that is next to be used
#pragma unroll 1
  for (int round = 0; round < walk.rounds; ++round) {
    const int first_group = round * groups;
    const int here = min(groups, last + 1 - first_group);
    for (int i = threadIdx.x; i < here * group_words; i += kThreads) group_sums[i] = 0;
    // Read while weights are on their way: the threads that add up groups have nothing to hide the
    // latency of memory behind.
    for (int i = threadIdx.x; i < here * kLanes; i += kThreads) {
      const int64_t output = static_cast<int64_t>(blockIdx.x) * kLanes + i % kLanes;
      scales[i] = scale_at(a, output, first_group + i / kLanes);
      if (!a.layout.symmetric) {
        zeros[i] = zero_factor_at<kFormat>(a, output, first_group + i / kLanes);
      }
    }
    __syncthreads();

    const Cursor run = walk.at(round);
    int group = min(run.unit * kChunks / group_chunks, last);
    int left = (group + 1) * group_chunks - run.unit * kChunks;  // chunks of the group
    const auto flush = [&] {
      int32_t* const to = group_sums + (group - first_group) * group_words;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = j * 8 + t * 2 + e % 2, lane_of_row = g + e / 2 * 8;
          if (token < rows) add_shared(to + token * kTokenPitch + lane_of_row, acc[j][e]);
          acc[j][e] = 0;
        }
      }
    };
#pragma unroll 1
    for (int unit = run.unit; unit < run.end; ++unit) {
      uint2 x[kChunks][kTiles];
#pragma unroll
      for (int half = 0; half < kChunks; ++half) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int64_t token = j * 8 + g;
          const int64_t at = token * panel_pitch(a.shape) +
                             (static_cast<int64_t>(unit) * kChunks + half) * kCudaChunk + t * 8;
          x[half][j] = token < a.rows ? load_64(a.panel + at) : make_uint2(0, 0);
        }
      }
      cp_async_wait<kRing - 2>();
      const uint4 codes = load_shared_128(ring + used * kCudaUnit);
      used = (used + 1) % kRing;
      ask();  // into the place that the unit before has left
#pragma unroll
      for (int half = 0; half < kChunks; ++half) {
        uint32_t fragment[4];
        weight_fragment<kFormat>(fragment, codes, half, opaque_zero(a.shape));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t b[2] = {x[half][j].x, x[half][j].y};
          mma_s8(acc[j], fragment, b);
        }
        if (--left == 0 && group < last) {
          flush();
          ++group;
          left = group_chunks;
        }
      }
    }
    // A run that ends with its group has begun the next one, of which there is nothing yet.
    if (run.unit < run.end && group < first_group + here) flush();
    __syncthreads();

    // To floats where they are, so that adding them up, one after the other, is little else.
    const int my_lane = threadIdx.x % kLanes;
    const bool integers = a.y_type == DType::i32;  // one group
    if (!integers) {
      // Sixteen at a time, of one token and many groups, or of a group and many tokens.
      const bool one = here == 1;
      const int outer = one ? 1 : rows, inner = one ? rows : here;
      for (int o = 0; o < outer; ++o) {
#pragma unroll 2
        for (int j = threadIdx.x / kLanes; j < inner; j += kThreads / kLanes) {
          const int i = one ? 0 : j, token = one ? j : o;
          int32_t* const at = group_sums + i * group_words + token * kTokenPitch + my_lane;
          int32_t sum = *at >> kSumShift<kFormat>;
          if (!a.layout.symmetric) {
            sum += zeros[i * kLanes + my_lane] * a.group_sums[(first_group + i) * a.rows + token];
          }
          *at = bit_cast<int32_t>(static_cast<float>(sum));
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int token = static_cast<int>(threadIdx.x) / kLanes + o * 16;
      if (token >= rows) continue;
      const int32_t* from = group_sums + token * kTokenPitch + my_lane;
      if (integers) {
        exact[o] = static_cast<uint32_t>(*from);
        continue;
      }
      const float* scale = scales + my_lane;
#pragma unroll 4
      for (int i = 0; i < here; ++i, from += group_words, scale += kLanes) {
        const int32_t bits = *from;
        sums[o] = std::fma(bit_cast<float>(bits), *scale, sums[o]);
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();

  const Outputs<1> outputs = load_outputs<1>(a, feature);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int64_t token = threadIdx.x / kLanes + o * 16;
    if (token >= a.rows) continue;
    if (a.y_type == DType::i32) {
      store_outputs<1>(a, token, outputs, {exact[o]});
    } else {
      finish<1>(a, token, load_token(a, token, false), outputs, {sums[o]});
    }
  }
}

template <Format kFormat, int kTiles>
void launch_as(const LinearArgs& a, Stream stream) {
  const int64_t groups = groups_at_once(a);
  launch(skinny_kernel<kFormat, kTiles>, blocks_for(a.n, kLanes), kThreads,
         kRingBytes + groups * group_bytes(a), stream, a, static_cast<int>(groups));
}

template <Format kFormat>
void launch_format(const LinearArgs& a, Stream stream) {
  if (a.rows <= 8) return launch_as<kFormat, 1>(a, stream);
  if (a.rows <= 16) return launch_as<kFormat, 2>(a, stream);
  launch_as<kFormat, 4>(a, stream);
}

}  // namespace

void linear_int8_skinny(const LinearArgs& a, Stream stream) {
  a.layout.format == Format::int8 ? launch_format<Format::int8>(a, stream)
                                  : launch_format<Format::int4>(a, stream);
}

}  // namespace qkernels::cuda
