// Products of a warpgroup (`wgmma`), in sm_90's instructions as ptx_sm90.cuh has them.
#pragma once

#include "cuda/ptx_sm90.cuh"

namespace qkernels::cuda {

// A matrix [n][128 bytes of k] in shared memory from a multiple of 1024 bytes on, for
// `warpgroup_mma`; the 16 bytes c of row r lie at 128 r + 16 (c ^ r % 8). Adding 2 moves on by 32
// k.
QK_DEVICE uint64_t matrix_in_shared(const void* at) {
#ifdef QKERNELS_HOST
  const uint64_t address = host::shared_offset("matrix_in_shared", at);
#else
  const uint64_t address = shared_address(at);
#endif
  constexpr uint64_t kEightRows = 1024, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows >> 4 << 32 | kSwizzle128 << 62;
}

// Before a barrier after which products of a warpgroup read what this thread stored in shared
// memory: they go another way there than loads do.
QK_DEVICE void shared_fence() {
#if defined(QKERNELS_HOST)
  host::shared_fence();
#elif QK_SM90A
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

QK_DEVICE void warpgroup_fence() {
#if !defined(QKERNELS_HOST) && QK_SM90A
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}

// Closes a group of products.
QK_DEVICE void warpgroup_commit() {
#ifdef QKERNELS_HOST
  host::warpgroup_commit();
#elif QK_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}

// Returns when all groups but the last `kPending` are done. Until then nobody may touch their sums
// and operands.
template <int kPending>
QK_DEVICE void warpgroup_wait() {
#ifdef QKERNELS_HOST
  host::warpgroup_wait(kPending);
#elif QK_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
#endif
}

// Where the compiler may think again about registers that products use in the background: it must
// neither read sums nor give operands to others before.
template <class T, int kCount>
QK_DEVICE void warpgroup_keep(T (&registers)[kCount]) {
#ifdef QKERNELS_HOST
  static_cast<void>(registers);
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i]) : : "memory");
#endif
}

template <int kCount>
QK_DEVICE void warpgroup_keep(float (&registers)[kCount]) {
#ifdef QKERNELS_HOST
  static_cast<void>(registers);
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i]) : : "memory");
#endif
}

// ---- The instruction ----------------------------------------------------------------------------
// With n columns of B. Its operands are a thread's n / 2 sums, the four registers of A, B, and
// whether to add to what the sums were. Assembly names them by number, in texts of their own for
// each n.

#define QK_WGMMA_SUMS_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QK_WGMMA_SUMS_TEXT_32 QK_WGMMA_SUMS_TEXT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QK_WGMMA_SUMS_TEXT_64                                                     \
  QK_WGMMA_SUMS_TEXT_32                                                           \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define QK_WGMMA_SUMS_TEXT_96                                                     \
  QK_WGMMA_SUMS_TEXT_64                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47"
#define QK_WGMMA_SUMS_TEXT_128                                                    \
  QK_WGMMA_SUMS_TEXT_96                                                           \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define QK_WGMMA_SUMS_TEXT_192                                                              \
  QK_WGMMA_SUMS_TEXT_128                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QK_WGMMA_SUMS_TEXT_256                                                                 \
  QK_WGMMA_SUMS_TEXT_192                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

#define QK_WGMMA_A_AND_B_TEXT_16 "{%8, %9, %10, %11}, %12"
#define QK_WGMMA_A_AND_B_TEXT_32 "{%16, %17, %18, %19}, %20"
#define QK_WGMMA_A_AND_B_TEXT_64 "{%32, %33, %34, %35}, %36"
#define QK_WGMMA_A_AND_B_TEXT_96 "{%48, %49, %50, %51}, %52"
#define QK_WGMMA_A_AND_B_TEXT_128 "{%64, %65, %66, %67}, %68"
#define QK_WGMMA_A_AND_B_TEXT_192 "{%96, %97, %98, %99}, %100"
#define QK_WGMMA_A_AND_B_TEXT_256 "{%128, %129, %130, %131}, %132"

#define QK_WGMMA_ADD_TEXT_16 "%13"
#define QK_WGMMA_ADD_TEXT_32 "%21"
#define QK_WGMMA_ADD_TEXT_64 "%37"
#define QK_WGMMA_ADD_TEXT_96 "%53"
#define QK_WGMMA_ADD_TEXT_128 "%69"
#define QK_WGMMA_ADD_TEXT_192 "%101"
#define QK_WGMMA_ADD_TEXT_256 "%133"

// `kind` is "+r" or "+f".
#define QK_WGMMA_EIGHT_SUMS(kind, i)                                                         \
  kind(sums[i]), kind(sums[i + 1]), kind(sums[i + 2]), kind(sums[i + 3]), kind(sums[i + 4]), \
      kind(sums[i + 5]), kind(sums[i + 6]), kind(sums[i + 7])
#define QK_WGMMA_SUMS_16(kind) QK_WGMMA_EIGHT_SUMS(kind, 0)
#define QK_WGMMA_SUMS_32(kind) QK_WGMMA_SUMS_16(kind), QK_WGMMA_EIGHT_SUMS(kind, 8)
#define QK_WGMMA_SUMS_64(kind) \
  QK_WGMMA_SUMS_32(kind), QK_WGMMA_EIGHT_SUMS(kind, 16), QK_WGMMA_EIGHT_SUMS(kind, 24)
#define QK_WGMMA_SUMS_96(kind) \
  QK_WGMMA_SUMS_64(kind), QK_WGMMA_EIGHT_SUMS(kind, 32), QK_WGMMA_EIGHT_SUMS(kind, 40)
#define QK_WGMMA_SUMS_128(kind) \
  QK_WGMMA_SUMS_96(kind), QK_WGMMA_EIGHT_SUMS(kind, 48), QK_WGMMA_EIGHT_SUMS(kind, 56)
#define QK_WGMMA_SUMS_192(kind)                                                          \
  QK_WGMMA_SUMS_128(kind), QK_WGMMA_EIGHT_SUMS(kind, 64), QK_WGMMA_EIGHT_SUMS(kind, 72), \
      QK_WGMMA_EIGHT_SUMS(kind, 80), QK_WGMMA_EIGHT_SUMS(kind, 88)
#define QK_WGMMA_SUMS_256(kind)                                                           \
  QK_WGMMA_SUMS_192(kind), QK_WGMMA_EIGHT_SUMS(kind, 96), QK_WGMMA_EIGHT_SUMS(kind, 104), \
      QK_WGMMA_EIGHT_SUMS(kind, 112), QK_WGMMA_EIGHT_SUMS(kind, 120)

#define QK_WGMMA(n, types, kind, rest)                                         \
  asm volatile(                                                                \
      "{\n"                                                                    \
      ".reg .pred add;\n"                                                      \
      "setp.ne.b32 add, " QK_WGMMA_ADD_TEXT_##n                                \
      ", 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #n types " {" QK_WGMMA_SUMS_TEXT_##n \
      "}, " QK_WGMMA_A_AND_B_TEXT_##n ", add" rest ";\n}"                      \
      : QK_WGMMA_SUMS_##n(kind)                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define QK_WGMMA_INT8(n) QK_WGMMA(n, "k32.s32.s8.s8", "+r", "")
#define QK_WGMMA_FLOAT(n, type) QK_WGMMA(n, "k16.f32." type "." type, "+f", ", 1, 1, 0")

// sums (+)= A . B in the background: A[64][32] is int8 in registers, 16 rows of each warp as for
// mma_s8; B[kN][32] is int8 in shared memory. sums[4 * j + e] is element e of mma_s8's D for
// columns 8j to 8j + 7. Without `add` the sums begin at 0.
template <int kN>
QK_DEVICE void warpgroup_mma(int32_t (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                             bool add) {
#ifdef QKERNELS_HOST
  host::warpgroup_mma(sums, kN, a, b, add);
#elif QK_SM90A
  static_assert(kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (kN == 32) QK_WGMMA_INT8(32);
  if constexpr (kN == 64) QK_WGMMA_INT8(64);
  if constexpr (kN == 96) QK_WGMMA_INT8(96);
  if constexpr (kN == 128) QK_WGMMA_INT8(128);
  if constexpr (kN == 192) QK_WGMMA_INT8(192);
  if constexpr (kN == 256) QK_WGMMA_INT8(256);
#endif
}

// The same of 16-bit floats: A[64][16] as for mma_f16, B[kN][16].
template <DType kType, int kN>
QK_DEVICE void warpgroup_mma(float (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
#ifdef QKERNELS_HOST
  host::warpgroup_mma_16(sums, kN, a, b, add,
                         kType == DType::bf16 ? static_cast<host::Widen>(from_bf16) : from_f16);
#elif QK_SM90A
  static_assert(kN == 16 || kN == 32 || kN == 64);
  constexpr bool kBf16 = kType == DType::bf16;
  if constexpr (kN == 16 && kBf16) QK_WGMMA_FLOAT(16, "bf16");
  if constexpr (kN == 16 && !kBf16) QK_WGMMA_FLOAT(16, "f16");
  if constexpr (kN == 32 && kBf16) QK_WGMMA_FLOAT(32, "bf16");
  if constexpr (kN == 32 && !kBf16) QK_WGMMA_FLOAT(32, "f16");
  if constexpr (kN == 64 && kBf16) QK_WGMMA_FLOAT(64, "bf16");
  if constexpr (kN == 64 && !kBf16) QK_WGMMA_FLOAT(64, "f16");
#endif
}

}  // namespace qkernels::cuda
