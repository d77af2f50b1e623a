// linear with int8 activations for a few tokens, where reading the weight is all the work. A block
// has 16 outputs and all tokens; its warps share k. Each warp streams its part of the packed row
// through a ring of copies in shared memory, in which a thread reads only what it copied itself, so
// that nobody waits for anybody.
//
// A warp takes whole groups. It leaves their exact sums in a table in shared memory, which a round
// of a few groups of each warp fills; then a thread for each output and token goes on adding up
// groups in their order, while others are in the next round already. Where a row is one group,
// each warp's part of it counts as one, and sums stay integers to the end.
#include "cuda/int8.cuh"
#include "cuda/linear_int8.cuh"
#include "cuda/ptx_sm90.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

// Four blocks fit on a multiprocessor, two of those with the most tokens; sm_80 is a register short
// with 16 of int4.
template <Format kFormat, int kTiles_>
struct Skinny {
  static constexpr int kTiles = kTiles_;
  static constexpr bool kShort = kTiles == 2 && kFormat == Format::int4 && !QK_SM90A;
  static constexpr int kBlocks = kTiles == 4 ? 2 : kShort ? 3 : 4;
  static constexpr int kChunks = kFormat == Format::int8 ? 1 : 2;  // of 32 k, in a unit
  static constexpr int kRing = kTiles == 1 ? 8 : 4;                // units of a warp under way
  static constexpr int kRingBytes = kRing * kCudaUnit;             // of a warp
  // Exact sums of a group, as the threads of a warp hold them: four for each tile of tokens.
  static constexpr int kSums = kTiles * 4 * kWarp;
  static constexpr int kOutputs = (kSums + kThreads - 1) / kThreads;  // of a thread
  static constexpr int kEach = 2;  // groups of a warp in a round, at most
};

// How the groups are shared out.
struct Rounds {
  bool one;  // the row is one group, and what is called groups here are parts of it
  int groups, group_chunks, units;
  int count, each;  // rounds, and groups of a warp in one

  QK_HD int round_groups() const { return kWarps * each; }
  // What a round keeps in shared memory beside sums.
  QK_HD int scale_bytes() const { return one ? 0 : round_groups() * kLanes * 4; }
  QK_HD int zero_bytes() const { return one ? 0 : round_groups() * kLanes; }
};

template <class T>
Rounds rounds_of(const BlockShape& s) {
  const int chunks = static_cast<int>(s.k_padded / kCudaChunk);
  Rounds r{};
  r.units = chunks / T::kChunks;
  r.one = s.groups == 1;
  r.each = 1;
  if (s.groups == 0) return r;
  if (r.one) {
    const int each = max(1, (r.units + kWarps - 1) / kWarps);
    r.groups = (r.units + each - 1) / each;
    r.group_chunks = each * T::kChunks;
    r.count = 1;
  } else {
    r.groups = static_cast<int>(s.groups);
    r.group_chunks = static_cast<int>(s.group_padded / kCudaChunk);
    const int most = kWarps * T::kEach;
    r.count = (r.groups + most - 1) / most;
    r.each = (r.groups + r.count * kWarps - 1) / (r.count * kWarps);
    // A warp's groups begin and end with a unit, as far as the row goes on.
    if (r.group_chunks % T::kChunks != 0) r.each = T::kEach;
    r.count = (r.groups + kWarps * r.each - 1) / (kWarps * r.each);
  }
  return r;
}

// A warp's part of a round.
struct Run {
  int group, end_group, unit, end;
};

template <class T>
QK_DEVICE Run run_of(const Rounds& r, int round) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = min((round * kWarps + warp) * r.each, r.groups);
  const int end_group = min(group + r.each, r.groups);
  // What fills the row up to a unit belongs to the last group.
  const auto unit_of = [&](int g) {
    return g == r.groups ? r.units : g * r.group_chunks / T::kChunks;
  };
  return {group, end_group, unit_of(group), unit_of(end_group)};
}

QK_DEVICE int scale_bytes(const Layout& layout) { return layout.scale == DType::f32 ? 4 : 2; }

// A round's scales and zero points, 16 bytes of each thread.
QK_DEVICE uint4 load_round(const LinearArgs& a, const Rounds& r, int round) {
  const int begin = round * r.round_groups(), count = min(r.round_groups(), r.groups - begin);
  const int scale_step = kLanes * scale_bytes(a.layout);
  const int thread = static_cast<int>(threadIdx.x), zeros_from = r.scale_bytes() / 16;
  const uint8_t* const row = a.packed + blockIdx.x * a.shape.bytes;
  if (thread < count * scale_step / 16) {
    return load_128(row + a.shape.scales + static_cast<int64_t>(begin) * scale_step + thread * 16);
  }
  const int zero = thread - zeros_from;
  if (!a.layout.symmetric && zero >= 0 && zero < count) {
    return load_128(row + a.shape.zeros + (static_cast<int64_t>(begin) + zero) * kLanes);
  }
  return make_uint4(0, 0, 0, 0);
}

// What adding up a round's groups for one output and token reads.
struct Table {
  const int32_t* words;   // `pitch` apart
  const uint8_t* scales;  // 16 of each group, this output's the first
  const uint8_t* zeros;   // the same
  const int32_t* codes;   // sums of x's codes, `rows` apart
  int count, pitch, rows;
};

template <Format kFormat, DType kScale, bool kZeros>
QK_DEVICE float add_groups(float sum, const Table& t) {
#pragma unroll 4
  for (int i = 0; i < t.count; ++i) {
    const int32_t exact = t.words[i * t.pitch] >> kSumShift<kFormat>;
    float value = static_cast<float>(exact);
    if constexpr (kZeros) {
      const auto factor = zero_factor<kFormat>(load_zero_point(t.zeros, kFormat, i * kLanes));
      value = group_value<kFormat>(exact, t.codes[static_cast<int64_t>(i) * t.rows], factor);
    }
    const float scale = load_element<kScale>(t.scales, i * kLanes);
    sum = std::fma(value, scale, sum);
  }
  return sum;
}

template <Format kFormat, bool kZeros>
QK_DEVICE float add_groups(float sum, const Table& t, DType scale) {
  if (scale == DType::f32) return add_groups<kFormat, DType::f32, kZeros>(sum, t);
  if (scale == DType::bf16) return add_groups<kFormat, DType::bf16, kZeros>(sum, t);
  return add_groups<kFormat, DType::f16, kZeros>(sum, t);
}

template <Format kFormat, int kTiles>
__global__ void __launch_bounds__(kThreads, Skinny<kFormat, kTiles>::kBlocks)
    skinny_kernel(const LinearArgs a, const Rounds rounds) {
  using T = Skinny<kFormat, kTiles>;
  constexpr int kChunks = T::kChunks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int rows = static_cast<int>(a.rows);
  uint8_t* const shared = shared_memory<uint8_t>();
  // Two of each: one is filled while the other is read.
  int32_t* const tables = reinterpret_cast<int32_t*>(shared + kWarps * T::kRingBytes);
  const int table_words = rounds.round_groups() * T::kSums;
  uint8_t* const factors = reinterpret_cast<uint8_t*>(tables + 2 * table_words);
  const int factor_bytes = rounds.scale_bytes() + rounds.zero_bytes();

  // ---- The ring ----
  const uint8_t* const weights = a.packed + blockIdx.x * a.shape.bytes + lane * 16;
  uint8_t* const ring = shared + warp * T::kRingBytes + lane * 16;
  uint8_t* const ring_end = ring + T::kRingBytes;
  const uint8_t* next = nullptr;  // unit to be asked for, and how many there are of its round
  int next_left = 0, next_round = 0;
  const auto ask = [&](uint8_t* to) {
    while (next_left == 0 && next_round < rounds.count) {
      const Run run = run_of<T>(rounds, next_round++);
      next = weights + static_cast<int64_t>(run.unit) * kCudaUnit;
      next_left = run.end - run.unit;
    }
    if (next_left > 0) {
      cp_async<16>(to, next);
      next += kCudaUnit;
      --next_left;
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < T::kRing - 1; ++i) ask(ring + i * kCudaUnit);
  uint8_t *used = ring, *freed = ring_end - kCudaUnit;
  wait_for_previous();  // which prepares x; all before this concerns the weight alone

  // ---- x ----
  // Tokens that do not exist read the last one's codes; the results go nowhere.
  const uint8_t* panel[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    panel[j] = a.panel + min(j * 8 + g, rows - 1) * panel_pitch(a.shape) + t * 8;
  }
  const uint8_t* from[kTiles];  // of the next unit
  uint2 x[kChunks][kTiles];
  const auto load_x = [&] {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int half = 0; half < kChunks; ++half) x[half][j] = load_64(from[j] + half * kCudaChunk);
      from[j] += kChunks * kCudaChunk;
    }
  };

  // Outputs of this thread: numbers threadIdx.x and so on of those in a group's sums.
  float sums[T::kOutputs] = {};
  uint32_t exact[T::kOutputs] = {};
  int32_t acc[kTiles][4] = {};
  const uint32_t zero = opaque_zero(a.shape);
#pragma unroll 1
  for (int round = 0; round < rounds.count; ++round) {
    int32_t* const table = tables + round % 2 * table_words;
    uint8_t* const scales = factors + round % 2 * factor_bytes;
    uint4 factor = make_uint4(0, 0, 0, 0);
    if (factor_bytes > 0) factor = load_round(a, rounds, round);
    const Run run = run_of<T>(rounds, round);
    int group = run.group;
    // Chunks until a group ends; the last one never does, what fills up the row belongs to it.
    const auto chunks_of = [&](int i) { return i + 1 < rounds.groups ? rounds.group_chunks : -1; };
    int left = chunks_of(group);
    const int first_group = round * rounds.round_groups();
    int32_t* to = table + (group - first_group) * T::kSums + lane * 4;
    const auto leave = [&] {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        store_shared_128(to + j * 4 * kWarp, bit_cast<uint4>(acc[j]));
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] = 0;
      }
      to += T::kSums;
      ++group;
      left = chunks_of(group);
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      from[j] = panel[j] + static_cast<int64_t>(run.unit) * kChunks * kCudaChunk;
    }
    if (run.unit < run.end) load_x();
#pragma unroll 1
    for (int units = run.end - run.unit; units > 0; --units) {
      uint2 now[kChunks][kTiles];
#pragma unroll
      for (int i = 0; i < kChunks * kTiles; ++i) {
        now[i / kTiles][i % kTiles] = x[i / kTiles][i % kTiles];
      }
      if (units > 1) load_x();
      cp_async_wait<T::kRing - 2>();
      const uint4 codes = load_shared_128(used);
      ask(freed);  // where the unit before was
      freed = used;
      used = used + kCudaUnit == ring_end ? ring : used + kCudaUnit;
#pragma unroll
      for (int half = 0; half < kChunks; ++half) {
        uint32_t fragment[4];
        weight_fragment<kFormat>(fragment, codes, half, zero);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t b[2] = {now[half][j].x, now[half][j].y};
          mma_s8(acc[j], fragment, b);
        }
        if (--left == 0) leave();
      }
    }
    if (group < run.end_group) leave();
    if (static_cast<int>(threadIdx.x) * 16 < factor_bytes) {
      store_shared_128(scales + threadIdx.x * 16, factor);
    }
    __syncthreads();

    const int count = min(rounds.round_groups(), rounds.groups - first_group);
#pragma unroll
    for (int o = 0; o < T::kOutputs; ++o) {
      const int at = static_cast<int>(threadIdx.x) + o * kThreads;
      const int token = at / (4 * kWarp) * 8 + at / 4 % 4 * 2 + at % 2;
      const int lane_of_row = at % (4 * kWarp) / 16 + at % 4 / 2 * 8;
      if (at >= T::kSums || token >= rows) continue;
      if (rounds.one) {
        for (int i = 0; i < count; ++i) exact[o] += static_cast<uint32_t>(table[i * T::kSums + at]);
        continue;
      }
      const Table groups{table + at,
                         scales + lane_of_row * scale_bytes(a.layout),
                         scales + rounds.scale_bytes() + lane_of_row,
                         a.group_sums + first_group * a.rows + token,
                         count,
                         T::kSums,
                         rows};
      sums[o] = a.layout.symmetric ? add_groups<kFormat, false>(sums[o], groups, a.layout.scale)
                                   : add_groups<kFormat, true>(sums[o], groups, a.layout.scale);
    }
  }
  cp_async_wait<0>();

  // To y by shared memory, so that neighbours write side by side.
  int32_t* const turned = shared_memory<int32_t>();
  __syncthreads();
#pragma unroll
  for (int o = 0; o < T::kOutputs; ++o) {
    const int at = static_cast<int>(threadIdx.x) + o * kThreads;
    const int token = at / (4 * kWarp) * 8 + at / 4 % 4 * 2 + at % 2;
    const int lane_of_row = at % (4 * kWarp) / 16 + at % 4 / 2 * 8;
    if (at >= T::kSums) continue;
    turned[token * kLanes + lane_of_row] =
        rounds.one ? static_cast<int32_t>(exact[o]) : bit_cast<int32_t>(sums[o]);
  }
  __syncthreads();
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const RowOutputs<kFormat, 1> outputs = load_row_outputs<kFormat, 1>(a, feature);
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < rows * kLanes; at += kThreads) {
    const int64_t token = at / kLanes;
    if (rounds.one) {
      finish_exact<kFormat, 1>(a, token, load_token(a, token, !a.layout.symmetric), outputs,
                               {static_cast<uint32_t>(turned[at])});
    } else {
      finish<1>(a, token, load_token(a, token, false), outputs.all, {bit_cast<float>(turned[at])});
    }
  }
}

template <Format kFormat, int kTiles>
void launch_as(const LinearArgs& a, Stream stream) {
  using T = Skinny<kFormat, kTiles>;
  const Rounds rounds = rounds_of<T>(a.shape);
  const int64_t bytes = kWarps * T::kRingBytes + 2 * (rounds.round_groups() * T::kSums * 4 +
                                                      rounds.scale_bytes() + rounds.zero_bytes());
  launch_with({.overlaps = true}, skinny_kernel<kFormat, kTiles>, blocks_for(a.n, kLanes), kThreads,
              bytes, stream, a, rounds);
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
