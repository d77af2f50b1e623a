// The stages of k that linear_float_warpgroups.cuh has in shared memory, and the copies into them.
#pragma once

#include "cuda/linear_float.cuh"
#include "cuda/warpgroups.cuh"

namespace qkernels::cuda {

template <Format kFormat_, bool kAsymmetric_, DType kType_, int kTokens_>
struct FloatWarpgroups {
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kAsymmetric = kAsymmetric_;
  static constexpr DType kType = kType_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kConsumers = FloatWarpgroupTile::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kWarps = kConsumers * kWarpgroup / kWarp;  // that multiply

  // Of a packed row in a stage. Few rows of x leave room for long stages, which take fewer
  // instructions.
  static constexpr int kUnits = kTokens == 16 ? 4 : 2, kRowBytes = kUnits * kCudaUnit;
  static constexpr bool kBytes = info(kFormat).bits == 8;
  static constexpr int kChunks = kBytes ? kUnits : 2 * kUnits;
  static constexpr int kStageK = kChunks * kCudaChunk;
  static constexpr int kMatrices = kStageK / static_cast<int>(kStep);  // of x
  static constexpr int kMatrixBytes = kTokens * 128;
  static constexpr int kTokenBytes = kMatrices * kMatrixBytes;  // of a team
  static constexpr int kWeightBytes = kWarps * kRowBytes;

  // A stage has at most so many groups. Of each packed row it has their scales, then their zero
  // points.
  static constexpr int kGroups = kChunks;
  static constexpr int kZeros = kGroups * kLanes * 4;
  static constexpr int kGroupBytes = kZeros + kGroups * kLanes;

  static constexpr int kSharedBytes = 227 * 1024;  // that a block may have
  static constexpr int kBarrierBytes = 256, kMostStages = 8;
  using Pairs = CodePairs<kFormat, kType>;
  static constexpr int kStagesAt = Pairs::kTableBytes;

  // Operands of two products, where registers allow: the other warpgroups compute meanwhile.
  static constexpr int kLefts = kTokens == 64 && kFormat == Format::int4 && kAsymmetric ? 1 : 2;

  // From here on what depends on the number of teams.
  QK_HD static constexpr int stage_bytes(int teams) { return teams * kTokenBytes + kWeightBytes; }
  QK_HD static constexpr int stages(int teams) {
    const int fit =
        (kSharedBytes - kStagesAt - kBarrierBytes) / (stage_bytes(teams) + kWarps * kGroupBytes);
    return fit < kMostStages ? fit : kMostStages;
  }
  QK_HD static constexpr int bytes(int teams) {
    return kStagesAt + kBarrierBytes + stages(teams) * (stage_bytes(teams) + kWarps * kGroupBytes);
  }
  // Words from a row of x to the next in the sums: what a warp writes at once, 8 outputs of every
  // second row, lies in different banks.
  QK_HD static constexpr int pitch(int teams) { return kWarps * kLanes / teams + 4; }
  // All sums of the block, and a share of those of up to seven others.
  static constexpr bool sums_fit(int teams) {
    return 2 * kTokens * pitch(teams) * 4 <= stages(teams) * stage_bytes(teams);
  }
  static_assert(sums_fit(1) && sums_fit(2) && sums_fit(4));
  static_assert(8 * (2 * kMostStages + 1) <= kBarrierBytes);

  struct Shared {
    uint8_t* at;
    int teams, stages, stage_bytes, pitch;

    QK_DEVICE explicit Shared(int count)
        : at(shared_memory<uint8_t>() + kStagesAt),
          teams(count),
          stages(FloatWarpgroups::stages(count)),
          stage_bytes(FloatWarpgroups::stage_bytes(count)),
          pitch(FloatWarpgroups::pitch(count)) {}
    // Packed rows, which the warps of a team have.
    QK_DEVICE int rows() const { return kWarps / teams; }
    QK_DEVICE uint8_t* tokens(int stage, int team) const {
      return at + stage * stage_bytes + team * kTokenBytes;
    }
    QK_DEVICE uint8_t* weights(int stage, int warp) const {
      return tokens(stage, teams) + warp * kRowBytes;
    }
    QK_DEVICE uint8_t* groups(int stage, int warp) const {
      return at + stages * stage_bytes + kBarrierBytes + (stage * kWarps + warp) * kGroupBytes;
    }
    QK_DEVICE Barrier* filled(int stage) const {
      return reinterpret_cast<Barrier*>(at + stages * stage_bytes) + stage;
    }
    QK_DEVICE Barrier* emptied(int stage) const { return filled(kMostStages + stage); }
    QK_DEVICE Barrier* received() const { return filled(2 * kMostStages); }
    // The sums of this block, and those that another one sent.
    QK_DEVICE float* sums() const { return reinterpret_cast<float*>(at); }
    QK_DEVICE float* sums_from(int sender, int words) const {
      return sums() + kTokens * pitch + sender * words;
    }
  };
};

// What of the product a block has.
struct WarpgroupPart {
  int64_t row, token;  // the first packed row, the first row of x
  int tokens;          // rows of x that there are
  int begin, stages;   // of k, for the first team
  int each;            // stages from a team's first to the next one's
};

// The chunk where the group that chunk `at` is in begins.
QK_DEVICE int first_group_of(const FloatKernelArgs& a, int at) {
  return min(at, a.group_end - 1) / a.group_chunks * a.group_chunks;
}

// ---- Copies -------------------------------------------------------------------------------------

template <class T>
QK_DEVICE void copy_operands(const FloatKernelArgs& a, const WarpgroupPart& part,
                             const typename T::Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;

  // ---- Weights ---- One of eight threads has what a warp multiplies.
  const int slot = thread / 8;
  const int begin = part.begin + slot / shared.rows() * part.each;
  const int64_t row = part.row + slot % shared.rows();
  const bool there = row < (a.n + kLanes - 1) / kLanes;
  const uint8_t* const packed = a.packed + row * a.row_bytes;
  const int scale_bytes = a.scale_type == DType::f32 ? kLanes * 4 : kLanes * 2;
  int group_at = first_group_of(a, begin * T::kChunks), group = group_at / a.group_chunks;
  const auto copy_weights = [&](int stage, int to) {
    const int chunk = (begin + stage) * T::kChunks;
    const int chunks = there ? min(a.chunks - chunk, T::kChunks) : 0;
    Barrier* const filled = shared.filled(to);
    if (chunks <= 0) return barrier_expect(filled, 0);
    while (group_at + a.group_chunks <= min(chunk, a.group_end - 1)) {
      ++group, group_at += a.group_chunks;
    }
    const int last = min(chunk + T::kChunks, a.group_end);
    int groups = 1;
    for (int at = group_at + a.group_chunks; at < last; at += a.group_chunks) ++groups;
    constexpr int kChunkBytes = T::kRowBytes / T::kChunks;
    const int zeros = T::kAsymmetric ? groups * kLanes : 0;
    barrier_expect(filled, chunks * kChunkBytes + groups * scale_bytes + zeros);
    uint8_t* const at = shared.groups(to, slot);
    copy_bulk(shared.weights(to, slot), packed + chunk * kChunkBytes, chunks * kChunkBytes, filled);
    copy_bulk(at, packed + a.scales + int64_t{group} * scale_bytes, groups * scale_bytes, filled);
    if (T::kAsymmetric) {
      copy_bulk(at + T::kZeros, packed + a.zeros + int64_t{group} * kLanes, zeros, filled);
    }
  };

  // ---- x ---- A warp copies 128 consecutive bytes of a row to other places of 128 bytes, so that
  // it meets in no bank. It has every fourth pair of rows.
  const int lane = thread % kWarp, first = thread / kWarp * 2;
  const uint16_t* const x = a.x + (part.token + first) * a.ld + lane * 2;
  const int to = first * 128 + lane / 16 * 64 + lane % 4 * 16 + lane % 16 / 4 * 4;
  const int places[2] = {to ^ first * 16, (to ^ (first + 1) * 16) + 128};
  const auto copy_x = [&](int stage, int at) {
#pragma unroll 1
    for (int team = 0; team < shared.teams; ++team) {
      const int step = (part.begin + team * part.each + stage) * T::kMatrices;
      uint8_t* const tokens = shared.tokens(at, team);
      const uint16_t* from = x + int64_t{step} * kStep;
      // Rows that are not there stay what they are: their sums go nowhere.
#pragma unroll 2
      for (int token = 0; token < T::kTokens; token += 8, from += 8 * a.ld) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (token + first + i >= part.tokens) continue;
#pragma unroll
          for (int m = 0; m < T::kMatrices; ++m) {
            cp_async<4>(tokens + m * T::kMatrixBytes + token * 128 + places[i],
                        from + i * a.ld + m * kStep, step + m < a.steps ? 4 : 0);
          }
        }
      }
    }
  };

  Turn turn;
#pragma unroll 1
  for (int stage = 0; stage < part.stages; ++stage, turn.next(shared.stages)) {
    if (stage >= shared.stages) barrier_wait(shared.emptied(turn.stage), turn.parity ^ 1);
    if (thread % 8 == 0) copy_weights(stage, turn.stage);
    copy_x(stage, turn.stage);
    barrier_arrive_copied(shared.filled(turn.stage));
  }
}

}  // namespace qkernels::cuda
