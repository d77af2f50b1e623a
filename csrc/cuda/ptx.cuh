// The instructions that kernels name, one function each: those on memory are in ptx_memory.cuh,
// those of sm_90 alone in ptx_sm90.cuh and ptx_wgmma.cuh. Nothing else in csrc/cuda holds inline
// assembly. With QKERNELS_HOST the kernels are compiled as C++ and run on the emulator of
// tests/cuda/host, so each function has a second half that says what the instruction does.
#pragma once

#include <cassert>
#include <cstdint>

#include "core/codec.h"
#include "cuda/ptx_memory.cuh"
#include "cuda/runtime.cuh"

namespace qkernels::cuda {

// ---- The kernel ---------------------------------------------------------------------------------

// All that the kernels before this one have written can be read, and what they read be overwritten.
QK_DEVICE void wait_for_previous() {
#if defined(QKERNELS_HOST)
  host::wait_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// The next kernel may begin, if it overlaps, as soon as all blocks have come this far or ended.
QK_DEVICE void let_next_begin() {
#if !defined(QKERNELS_HOST) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Stops the kernel, and with it the process's use of the GPU, as an assertion of torch does.
QK_DEVICE void device_assert(bool holds, const char* what) {
  if (holds) return;
#ifdef QKERNELS_HOST
  host::fault(what);
#else
  __assert_fail(what, __FILE__, __LINE__, "qkernels");
#endif
}

// ---- Within a warp ------------------------------------------------------------------------------
// All 32 threads take part in each of these.

// The value of another lane, of whose number the five lowest bits count; T has 32 bits.
template <class T>
QK_DEVICE T shuffle(T value, int lane) {
#ifdef QKERNELS_HOST
  return host::exchange("shuffle", value, lane & (kWarp - 1));
#else
  return __shfl_sync(0xffffffffu, value, lane);
#endif
}

template <class T>
QK_DEVICE T shuffle_xor(T value, int mask) {
#ifdef QKERNELS_HOST
  return host::exchange("shuffle_xor", value, host::lane() ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

// Of the lane `delta` further; the last lanes keep their own.
template <class T>
QK_DEVICE T shuffle_down(T value, int delta) {
#ifdef QKERNELS_HOST
  const int from = host::lane() + delta;
  return host::exchange("shuffle_down", value, from < kWarp ? from : host::lane());
#else
  return __shfl_down_sync(0xffffffffu, value, delta);
#endif
}

// Bit i is set if the predicate is true in lane i.
QK_DEVICE uint32_t warp_ballot(bool predicate) {
#ifdef QKERNELS_HOST
  return host::ballot(predicate);
#else
  return __ballot_sync(0xffffffffu, predicate);
#endif
}

QK_DEVICE uint32_t warp_max(uint32_t value) {
#ifdef QKERNELS_HOST
  return host::reduce("warp_max", value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
#else
  return __reduce_max_sync(0xffffffffu, value);
#endif
}

// Of both halves.
QK_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) {
#ifdef QKERNELS_HOST
  const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  return low | ((a >> 16) > (b >> 16) ? a : b) >> 16 << 16;
#else
  return __vmaxu2(a, b);
#endif
}

QK_DEVICE int32_t warp_sum(int32_t value) {
#ifdef QKERNELS_HOST
  return static_cast<int32_t>(host::reduce("warp_sum", static_cast<uint32_t>(value),
                                           [](uint32_t a, uint32_t b) { return a + b; }));
#else
  return __reduce_add_sync(0xffffffffu, value);
#endif
}

// ---- Tensor cores -------------------------------------------------------------------------------
// Fragments of a warp, with g = lane / 4 and t = lane % 4. A[16][k]: a[0] row g and a[1] row g + 8
// of the first half of k, a[2] and a[3] of the second; B[k][8]: b[0] of the first half, b[1] of the
// second, column g. A register holds consecutive k from t * (k / 8) on, the lowest bits first.
// D[16][8]: d[0] and d[1] are row g, columns 2t and 2t + 1; d[2] and d[3] row g + 8.

// Four 8 x 8 matrices of 16 bits. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes);
// r[j] is row g, columns 2t and 2t + 1, of matrix j.
QK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef QKERNELS_HOST
  host::check_shared("ldmatrix_x4", row, 16);
  host::ldmatrix_x4(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same, and each matrix transposed: r[j] is column g, rows 2t and 2t + 1, of matrix j.
QK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef QKERNELS_HOST
  host::check_shared("ldmatrix_x4_trans", row, 16);
  host::ldmatrix_x4_trans(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// d += A . B, k = 16.
QK_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef QKERNELS_HOST
  host::mma_16(d, a, b, from_f16);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

QK_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef QKERNELS_HOST
  host::mma_16(d, a, b, from_bf16);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same of int8, k = 32; sums wrap around.
QK_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef QKERNELS_HOST
  host::mma_s8(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Integers -----------------------------------------------------------------------------------

// sum + the products of four int8 each.
QK_DEVICE int32_t dp4a(uint32_t a, uint32_t b, int32_t sum) {
#ifdef QKERNELS_HOST
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  }
  return sum;
#else
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#endif
}

// Any function of three bits: bit (4a + 2b + c) of kTable. (a & b) | c is 0xea, a ^ b ^ c 0x96.
template <int kTable>
QK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QKERNELS_HOST
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t bits = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    result |= (static_cast<uint32_t>(kTable) >> bits & 1) << i;
  }
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
#endif
}

// Byte i of the result is byte (nibble i of selector, 0 to 7) of b:a, of which a is the lower half.
QK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef QKERNELS_HOST
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> 4 * i & 0x7;
    result |= static_cast<uint32_t>(both >> 8 * byte & 0xff) << 8 * i;
  }
  return result;
#else
  return __byte_perm(a, b, selector);
#endif
}

// ---- 16-bit floats ------------------------------------------------------------------------------
// Two in a register, the first in the low half. NaN of any kind becomes the type's one NaN, 0x7fff.

QK_DEVICE uint16_t float_to_bf16(float x) {
#ifdef QKERNELS_HOST
  return x != x ? 0x7fff : to_bf16(x);
#else
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

QK_DEVICE uint16_t float_to_f16(float x) {
#ifdef QKERNELS_HOST
  return x != x ? 0x7fff : to_f16(x);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

QK_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef QKERNELS_HOST
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#else
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#endif
}

QK_DEVICE uint32_t pack_f16(float low, float high) {
#ifdef QKERNELS_HOST
  return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16;
#else
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#endif
}

QK_DEVICE float f16_to_float(uint16_t bits) {
#ifdef QKERNELS_HOST
  return from_f16(bits);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}

QK_DEVICE float bf16_to_float(uint16_t bits) { return from_bf16(bits); }

// a * b + c of both halves, each rounded once.
QK_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QKERNELS_HOST
  return host::fma_16(a, b, c, from_bf16, float_to_bf16);
#else
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

QK_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
#ifdef QKERNELS_HOST
  return host::fma_16(b, 0xbc00bc00u, a, from_f16, float_to_f16);
#else
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

}  // namespace qkernels::cuda
