// linear with float activations: what runs for which shape. Plain C++, so that `explain` can ask.
#pragma once

#include <cstdlib>
#include <string>

#include "core/params.h"
#include "cuda/launch.h"

namespace qkernels::cuda {

// A kernel goes along k in steps, which are what a 128-byte line of 16-bit x holds, and turns of as
// many steps as it loads weights ahead, at most.
inline constexpr int64_t kStep = 64;
inline constexpr int64_t kTurn = 4;

// Rows of x up to which warps share out k instead of outputs.
inline constexpr int64_t kGemvRows = 8;

// Of a large GPU: an A100 has 108, an H100 132. And steps that are worth a warp's start. The
// emulator of the tests stands for a tiny GPU, so that small shapes take every way there is.
#ifdef QKERNELS_HOST
inline constexpr int64_t kMultiprocessors = 4, kLeastSteps = 4;
#else
inline constexpr int64_t kMultiprocessors = 128, kLeastSteps = 8;
#endif
inline constexpr int64_t kMostSlices = 8;

// K is cut into slices of consecutive steps. Each is summed up from 0, in order, and then their
// sums are added in order. That is what a result's bits depend on, and so the cut depends on N and
// K alone, but for one thing: on Hopper more than kGemvRows rows of 16-bit x have a kernel with a
// cut of its own, which again follows from N and K alone.
struct Slices {
  int64_t count;
  int64_t steps;  // of each but the last; whole turns
};

inline Slices slices_of(int64_t n, const BlockShape& shape) {
  const int64_t steps = (shape.k_padded + kStep - 1) / kStep;
  const int64_t blocks = (n + kLanes - 1) / kLanes;
  // So many warps of two blocks that each of the four schedulers of a multiprocessor has three or
  // four to choose from, since a warp issues an instruction in four cycles; but each with work for
  // a while.
  int64_t count = 1;
  while (count < kMostSlices && count * blocks < 28 * kMultiprocessors &&
         count * 2 * kLeastSteps <= steps) {
    count *= 2;
  }
  const int64_t each = steps == 0 ? kTurn : round_up((steps + count - 1) / count, kTurn);
  return {steps == 0 ? 1 : (steps + each - 1) / each, each};
}

// ---- Hopper's kernel (linear_float_warpgroups.cuh) ----

struct FloatWarpgroupTile {
  static constexpr int kConsumers = 4;  // warpgroups that multiply
  static constexpr int kMostOutputs = 64 * kConsumers;
};

// Clusters of 1, 2, 4 and 8 blocks that a GPU of 132 multiprocessors runs at once, each block with
// a multiprocessor of its own.
#ifdef QKERNELS_HOST
inline constexpr int64_t kClustersAtOnce[] = {6, 3, 1, 1};
#else
inline constexpr int64_t kClustersAtOnce[] = {132, 66, 30, 14};
#endif

// Cycles until the first products, and until the sums of a cluster are added up; of a stage of the
// four warpgroups, and what each team's x adds to it. Guesses from one profile.
inline constexpr int64_t kClusterStart = 3000, kClusterEnd = 1500, kStageCycles = 2200,
                         kTeamCycles = 500;

// Where k is cut: into a slice for each team of each block of a cluster. Slices are whole stages,
// which have at most so many steps.
inline constexpr int64_t kStageSteps = 4;
struct ClusterSlices {
  int teams;      // 1, 2 or 4 in a block, which has so many times less outputs
  Slices slices;  // `count` is blocks; of each team as many steps
};

// What takes the least time.
inline ClusterSlices cluster_slices_of(int64_t n, const BlockShape& shape) {
  const int64_t stages = (shape.k_padded + kStageSteps * kStep - 1) / (kStageSteps * kStep);
  ClusterSlices best{1, {1, kStageSteps * stages}};
  int64_t least = INT64_MAX;
  for (int teams = 1; teams <= FloatWarpgroupTile::kConsumers; teams *= 2) {
    const int64_t outputs = FloatWarpgroupTile::kMostOutputs / teams;
    const int64_t tiles = (n + outputs - 1) / outputs;
    for (int i = 0; i < 4; ++i) {
      const int64_t blocks = int64_t{1} << i, slices = blocks * teams;
      const int64_t rounds = (tiles + kClustersAtOnce[i] - 1) / kClustersAtOnce[i];
      const int64_t each = (stages + slices - 1) / slices;
      const int64_t cycles =
          rounds * (kClusterStart + each * (kStageCycles + teams * kTeamCycles)) +
          (blocks > 1 ? kClusterEnd : 0);
      if ((slices > 1 && slices > stages) || cycles >= least) continue;
      least = cycles;
      best = {teams, {blocks, kStageSteps * each}};
    }
  }
  return best;
}

// Products with float32 x have 24-bit significands, a tensor core's have 8 with bfloat16. So x is
// split into three bfloat16 that add up to it, without error, and each makes a row of its own; so
// are the levels of nf4. Codes less their zero point fit as they are.
inline constexpr int64_t kParts = 3;

struct FloatPlan {
  Slices slices;
  int64_t parts;   // rows of the panel for each row of x
  int64_t levels;  // times that the weight is read, each time with other levels
  int64_t rows;    // of x at a time; more are done in turns
  bool panel;      // x must be copied to be read: permuted, padded, split, or not on a line
  bool gemv;
  bool warpgroups;  // a cluster of as many blocks as there are slices; tiles is all that counts
  int teams;        // of warpgroups, which share out k
  int blocks;       // of 16 outputs, of a warp
  int tiles;        // of 8 rows, of a warp
  int warps;        // that share the rows of x, with outputs of their own
  int64_t cuts;     // blocks of threads that share out the slices of an output
  // Slice sums go to memory and are added up by a second kernel.
  bool partial() const { return !warpgroups && (cuts > 1 || parts > 1); }
};

// A tile of rows of x: thread blocks that a multiprocessor holds at a time, and cycles in which
// these do a step. From benchmarks/results/gpu-h200-mma/gpu.json: 16 rows of 8192 x 8192, 128 rows
// of the same, and 64 rows of 8192 x 28672.
struct TileTime {
  int tiles, warps;
  int64_t resident, cycles;
};
inline constexpr TileTime kTileTimes[] = {{2, 4, 2, 1100}, {4, 4, 2, 1400}, {8, 8, 1, 2400}};
// Until the first weights are there; the second kernel, which reads what the first one wrote.
inline constexpr int64_t kStartCycles = 3000, kAddCycles = 4000, kSumsInCycle = 340;

// Sums that wait in memory for the second kernel, at most.
inline constexpr int64_t kMostSums = int64_t{1} << 26;

// `hopper`: a GPU that runs code of sm_90a.
inline FloatPlan float_plan(const LinearArgs& a, bool hopper) {
  FloatPlan p{};
  const bool wide = a.x_type == DType::f32;
  const BlockShape& s = a.shape;
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  p.slices = slices_of(a.n, s);
  p.parts = wide ? kParts : 1;
  p.levels = wide && a.layout.format == Format::nf4 ? kParts : 1;
  p.panel = wide || a.premul != nullptr || a.perm != nullptr || s.k != s.k_padded ||
            s.k % kStep != 0 || (s.groups > 1 && s.group_size != s.group_padded) ||
            reinterpret_cast<uintptr_t>(a.x) % 16 != 0;
  p.rows = a.rows;
  if (wide) {
    const int64_t each = a.n * p.parts * p.levels * p.slices.count;
    p.rows = each * p.rows <= kMostSums ? p.rows : each >= kMostSums ? 1 : kMostSums / each;
  }
  const int64_t rows = p.rows * p.parts;
  p.gemv = rows <= kGemvRows;
  p.cuts = 1;
  p.warpgroups = hopper && !wide && !p.gemv;
  if (p.warpgroups) {
    const ClusterSlices cut = cluster_slices_of(a.n, s);
    p.slices = cut.slices;
    p.teams = cut.teams;
    p.tiles = rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
    return p;
  }
  if (p.gemv) {
    // A warp with more blocks of outputs needs less of x from the cache and less instructions
    // around a product, but there must be warps enough. Four blocks leave registers for four warps
    // in a thread block.
    const int64_t warps = blocks * p.slices.count;
    p.blocks = warps >= 48 * kMultiprocessors && p.slices.count <= 4 ? 4
               : warps >= 24 * kMultiprocessors                      ? 2
                                                                     : 1;
    p.tiles = 1;
    p.warps = 1;
    return p;
  }
  p.blocks = 2;
  // The tile that takes the least time, with its slices one after the other or in thread blocks of
  // their own.
  int64_t least = INT64_MAX;
  for (const TileTime& t : kTileTimes) {
    const int64_t tiles = (blocks + p.blocks * t.warps - 1) / (p.blocks * t.warps) *
                          ((rows + 8 * t.tiles - 1) / (8 * t.tiles));
    for (const int64_t cuts : {int64_t{1}, p.slices.count}) {
      const int64_t steps = cuts == 1 ? p.slices.count * p.slices.steps : p.slices.steps;
      const int64_t at_once = t.resident * kMultiprocessors;
      const int64_t rounds = (tiles * cuts + at_once - 1) / at_once;
      const int64_t sums = cuts == 1 ? 0 : kAddCycles + cuts * rows * a.n / kSumsInCycle;
      const int64_t cycles = rounds * (kStartCycles + steps * t.cycles) + sums;
      if (cycles >= least) continue;
      least = cycles;
      p.tiles = t.tiles;
      p.warps = t.warps;
      p.cuts = cuts;
    }
  }
  return p;
}

// ---- Many rows ----------------------------------------------------------------------------------

// Rows from which it is faster to dequantize W and to call torch's matmul: where our kernel and the
// two together take as long, in the mean of the shapes that gpu.json has, in benchmarks/results/
// gpu-h200 for Hopper's own kernels and gpu-h200-mma for those of the others
// (tests/cuda/test_matmul.py computes it). float32 x has the same kernels everywhere: int4 stays
// with them in all that was measured.
constexpr int64_t matmul_rows(Format format, DType x_type, bool hopper) {
  constexpr int64_t kNever = INT64_MAX;
  if (x_type == DType::f32) return format == Format::nf4 ? 24 : kNever;
  switch (format) {
    case Format::int8:
      return hopper ? 80 : 88;
    case Format::int4:
      return hopper ? 104 : 112;
    default:
      return hopper ? 96 : 64;
  }
}

// The same of linear_backward_input: its kernel takes 2 to 10 times as long for 16 to 256 rows, and
// as long for one as for 128, which are a tile. float32 stays: its kernel has the bits of the CPU.
constexpr int64_t backward_matmul_rows(DType type) { return type == DType::f32 ? INT64_MAX : 1; }

// A number of rows that the environment sets in place of the tables.
inline int64_t rows_or_environment(int64_t rows) {
  const char* const given = std::getenv("QKERNELS_MATMUL_ROWS");
  return given == nullptr || *given == 0 ? rows : std::strtoll(given, nullptr, 10);
}

// Matmul is slow for matrices whose rows do not begin on 16 bytes.
inline bool suits_matmul(int64_t rows, int64_t from, int64_t n, const BlockShape& shape) {
  return n % 8 == 0 && shape.k % 8 == 0 && n > 0 && shape.k > 0 && rows > 0 &&
         rows >= rows_or_environment(from);
}

inline bool by_matmul(const LinearArgs& a, bool hopper) {
  return suits_matmul(a.rows, matmul_rows(a.layout.format, a.x_type, hopper), a.n, a.shape);
}
inline bool by_matmul(const BackwardArgs& a) {
  return suits_matmul(a.rows, backward_matmul_rows(a.type), a.n, a.shape);
}

// What `explain` calls it.
inline std::string linear_float_name(const LinearArgs& a, bool hopper) {
  if (by_matmul(a, hopper)) return "dequantize + matmul";
  const FloatPlan p = float_plan(a, hopper);
  if (p.gemv) return "cuda gemv";
  if (p.warpgroups) {
    return "cuda wgmma " + std::to_string(8 * p.tiles) + "x" +
           std::to_string(FloatWarpgroupTile::kMostOutputs / p.teams);
  }
  return "cuda mma " + std::to_string(8 * p.tiles) + "x" +
         std::to_string(kLanes * p.blocks * p.warps);
}

// x [rows, k] as the weight sees it: multiplied by premul and in the order of perm, in its type.
void gather_rows(const LinearArgs& args, void* to, Stream stream);

// ---- The kernels --------------------------------------------------------------------------------

// What a call needs besides its arguments.
struct FloatWorkspace {
  int64_t panel_bytes;  // LinearArgs::panel
  int64_t sums;         // floats
};

inline FloatWorkspace linear_float_workspace(const LinearArgs& a, bool hopper) {
  const FloatPlan p = float_plan(a, hopper);
  const int64_t rows = p.rows * p.parts;
  // Of float32 x the last turn may have less rows, and so more cuts.
  const int64_t sums = p.levels * (p.parts > 1 ? p.slices.count : p.cuts);
  return {p.panel ? rows * round_up(a.shape.k_padded, kStep) * 2 : 0,
          p.partial() ? sums * rows * a.n : 0};
}

// y = f(x . W + bias); `sums` and args.panel as linear_float_workspace says.
void linear_float(const LinearArgs& args, float* sums, Stream stream);

}  // namespace qkernels::cuda
