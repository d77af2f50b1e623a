// Products of a warpgroup with 16-bit floats, in sm_90's instructions as ptx_sm90.cuh has them.
#pragma once

#include "cuda/ptx_sm90.cuh"

namespace qkernels::cuda {

// The operands of sums, eight at a time.
#define QK_SUMS(i)                                                                           \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
// The instruction. Sums are the first operands; A's registers, B and `add` follow.
#define QK_WARPGROUP_MMA(type, n, list, a_list, b, add, ...)                                 \
  asm volatile(                                                                              \
      "{\n"                                                                                  \
      ".reg .pred add;\n"                                                                    \
      "setp.ne.b32 add, " add                                                                \
      ", 0;\n"                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list "}, {" a_list \
      "}, " b                                                                                \
      ", add, 1, 1, 0;\n"                                                                    \
      "}"                                                                                    \
      : __VA_ARGS__                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(more))

#define QK_SUMS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QK_SUMS_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define QK_SUMS_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define QK_SUMS_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define QK_SUMS_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define QK_SUMS_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define QK_SUMS_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define QK_SUMS_56 "%56, %57, %58, %59, %60, %61, %62, %63"

// sums (+)= A . B in the background: A[64][16] of 16-bit floats in registers, 16 rows of each warp
// as for mma_f16; B[kN][16] in shared memory. sums[4 * j + e] is element e of mma_f16's D for
// columns 8j to 8j + 7. Without `add` the sums begin at 0.
template <DType kType, int kN>
QK_DEVICE void warpgroup_mma(float (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t descriptor,
                             bool add) {
#ifdef QKERNELS_HOST
  host::warpgroup_mma_16(sums, kN, a, descriptor, add,
                         kType == DType::bf16 ? static_cast<host::Widen>(from_bf16) : from_f16);
#elif QK_SM90A
  const int more = static_cast<int>(add);
  if constexpr (kN == 16) {
    if constexpr (kType == DType::bf16) {
      QK_WARPGROUP_MMA("bf16", "16", QK_SUMS_0, "%8, %9, %10, %11", "%12", "%13", QK_SUMS(0));
    } else {
      QK_WARPGROUP_MMA("f16", "16", QK_SUMS_0, "%8, %9, %10, %11", "%12", "%13", QK_SUMS(0));
    }
  } else if constexpr (kN == 32) {
    if constexpr (kType == DType::bf16) {
      QK_WARPGROUP_MMA("bf16", "32", QK_SUMS_0 ", " QK_SUMS_8, "%16, %17, %18, %19", "%20", "%21",
                       QK_SUMS(0), QK_SUMS(8));
    } else {
      QK_WARPGROUP_MMA("f16", "32", QK_SUMS_0 ", " QK_SUMS_8, "%16, %17, %18, %19", "%20", "%21",
                       QK_SUMS(0), QK_SUMS(8));
    }
  } else if constexpr (kN == 64) {
    if constexpr (kType == DType::bf16) {
      QK_WARPGROUP_MMA("bf16", "64", QK_SUMS_0 ", " QK_SUMS_8 ", " QK_SUMS_16 ", " QK_SUMS_24,
                       "%32, %33, %34, %35", "%36", "%37", QK_SUMS(0), QK_SUMS(8), QK_SUMS(16),
                       QK_SUMS(24));
    } else {
      QK_WARPGROUP_MMA("f16", "64", QK_SUMS_0 ", " QK_SUMS_8 ", " QK_SUMS_16 ", " QK_SUMS_24,
                       "%32, %33, %34, %35", "%36", "%37", QK_SUMS(0), QK_SUMS(8), QK_SUMS(16),
                       QK_SUMS(24));
    }
  } else if constexpr (kN == 128) {
    if constexpr (kType == DType::bf16) {
      QK_WARPGROUP_MMA("bf16", "128",
                       QK_SUMS_0 ", " QK_SUMS_8 ", " QK_SUMS_16 ", " QK_SUMS_24 ", " QK_SUMS_32
                                 ", " QK_SUMS_40 ", " QK_SUMS_48 ", " QK_SUMS_56,
                       "%64, %65, %66, %67", "%68", "%69", QK_SUMS(0), QK_SUMS(8), QK_SUMS(16),
                       QK_SUMS(24), QK_SUMS(32), QK_SUMS(40), QK_SUMS(48), QK_SUMS(56));
    } else {
      QK_WARPGROUP_MMA("f16", "128",
                       QK_SUMS_0 ", " QK_SUMS_8 ", " QK_SUMS_16 ", " QK_SUMS_24 ", " QK_SUMS_32
                                 ", " QK_SUMS_40 ", " QK_SUMS_48 ", " QK_SUMS_56,
                       "%64, %65, %66, %67", "%68", "%69", QK_SUMS(0), QK_SUMS(8), QK_SUMS(16),
                       QK_SUMS(24), QK_SUMS(32), QK_SUMS(40), QK_SUMS(48), QK_SUMS(56));
    }
  } else {
    static_assert(kN == 16, "no such instruction");
  }
#endif
}

#undef QK_WARPGROUP_MMA
#undef QK_SUMS
#undef QK_SUMS_0
#undef QK_SUMS_8
#undef QK_SUMS_16
#undef QK_SUMS_24
#undef QK_SUMS_32
#undef QK_SUMS_40
#undef QK_SUMS_48
#undef QK_SUMS_56

}  // namespace qkernels::cuda
