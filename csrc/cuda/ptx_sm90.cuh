// Instructions of sm_90 (Hopper) alone, one function each, as in ptx.cuh: barriers in shared
// memory, copies of many bytes that count on them, clusters of blocks, and products of a warpgroup
// (four warps). Where QK_SM90A is 0 they are declared but never called: kernels that use them have
// an empty body there, and are not launched.
#pragma once

#include "cuda/ptx.cuh"

#if defined(QKERNELS_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_SM90A 1
#else
#define QK_SM90A 0
#endif

namespace qkernels::cuda {

inline constexpr int kWarpgroup = 128;  // threads

// ---- Launch -------------------------------------------------------------------------------------

// Whether the current device runs code of sm_90a, and the library has it.
inline bool has_sm90a() {
#if defined(QKERNELS_HOST)
  return host::sm90();
#elif defined(QKERNELS_SM90A)
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    throw std::runtime_error("qkernels: the CUDA device does not answer");
  }
  return major == 9;
#else
  return false;
#endif
}

// ---- Registers ----------------------------------------------------------------------------------

// Of each thread of the warpgroup from here on: what one gives up, another can take. Who asks for
// more than that waits for ever.

// Whether it suffices where `taking` of `threads` threads take `most` and the others keep `least`:
// a block that has a multiprocessor to itself starts with the same for each.
constexpr bool registers_suffice(int threads, int taking, int most, int least) {
  const int first = 65536 / threads / 8 * 8;
  return (most - first) * taking <= (first - least) * (threads - taking);
}

template <int kCount>
QK_DEVICE void give_registers() {
#if !defined(QKERNELS_HOST) && QK_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kCount));
#endif
}

template <int kCount>
QK_DEVICE void take_registers() {
#if !defined(QKERNELS_HOST) && QK_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kCount));
#endif
}

// ---- Barriers in shared memory ------------------------------------------------------------------
// A phase ends when `count` threads have arrived and all bytes that were announced have landed.

using Barrier = uint64_t;

QK_DEVICE void barrier_init(Barrier* at, int count) {
#ifdef QKERNELS_HOST
  host::check_shared("barrier_init", at, 8);
  host::barrier_init(at, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(at)), "r"(count)
               : "memory");
#endif
}

// Makes barriers that were set up known to copies and to other blocks of the cluster; a barrier of
// all threads concerned has to follow.
QK_DEVICE void barrier_init_fence() {
#ifndef QKERNELS_HOST
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#endif
}

// Arrives at the barrier in the same place of block `rank` of the cluster: what this thread has
// read of shared memory may be overwritten. What it wrote is not said to be there, in another
// block: that would cost a memory barrier of the whole GPU, a thousand cycles.
QK_DEVICE void barrier_arrive(Barrier* at, int rank) {
#ifdef QKERNELS_HOST
  host::barrier_arrive(at, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}"
      :
      : "r"(shared_address(at)), "r"(rank)
      : "memory");
#endif
}

// The same in this block, and who waits sees what this thread wrote before.
QK_DEVICE void barrier_arrive(Barrier* at) {
#ifdef QKERNELS_HOST
  host::barrier_arrive(at);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(at)) : "memory");
#endif
}

// Arrives when all that this thread has copied by cp_async has landed.
QK_DEVICE void barrier_arrive_copied(Barrier* at) {
#ifdef QKERNELS_HOST
  host::commit_async();
  host::wait_async(0);
  host::barrier_arrive(at);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
               :
               : "r"(shared_address(at))
               : "memory");
#endif
}

// Arrives and announces `bytes` of copies, for this phase.
QK_DEVICE void barrier_expect(Barrier* at, int bytes) {
#ifdef QKERNELS_HOST
  host::barrier_expect(at, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(at)), "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase of this parity (0 is the first one's) has ended. The copies that counted
// on it have landed.
QK_DEVICE void barrier_wait(Barrier* at, uint32_t parity) {
#ifdef QKERNELS_HOST
  host::barrier_wait(at, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}"
      :
      : "r"(shared_address(at)), "r"(parity)
      : "memory");
#endif
}

// ---- Clusters -----------------------------------------------------------------------------------

QK_DEVICE int cluster_rank() {
#ifdef QKERNELS_HOST
  return host::cluster_rank();
#else
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#endif
}

// A barrier of all threads of the cluster. It orders nothing but the threads themselves.
QK_DEVICE void cluster_sync() {
#ifdef QKERNELS_HOST
  host::sync_cluster();
#else
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               :
               :
               : "memory");
#endif
}

// A barrier of `count` threads of the block, one of numbers 1 to 15.
QK_DEVICE void sync_some(int number, int count) {
#ifdef QKERNELS_HOST
  host::sync_some(number, count);
#else
  asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(count) : "memory");
#endif
}

// ---- Copies -------------------------------------------------------------------------------------
// By one thread, of a multiple of 16 bytes, in the background; the bytes count on the barrier.

QK_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
#ifdef QKERNELS_HOST
  host::copy_bulk(to, from, bytes, barrier, 1u << host::cluster_rank());
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// To the same place of every block whose bit is set in `blocks`, counting on its own barrier.
QK_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, uint32_t blocks) {
#ifdef QKERNELS_HOST
  host::copy_bulk(to, from, bytes, barrier, blocks);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)),
        "h"(static_cast<uint16_t>(blocks))
      : "memory");
#endif
}

// Brings consecutive bytes, both a multiple of 16, to the L2 cache.
QK_DEVICE void prefetch_bulk([[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#ifdef QKERNELS_HOST
  host::check_alignment("prefetch_bulk", from, 16);
  device_assert(bytes > 0 && bytes % 16 == 0, "prefetch_bulk");
#elif QK_SM90A
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
#endif
}

// Stores 16 bytes in the background to the same place of block `rank` of the cluster; they count on
// its barrier.
QK_DEVICE void store_async_128(void* to, uint4 v, Barrier* barrier, int rank) {
#ifdef QKERNELS_HOST
  host::store_async(to, v, barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %6;\n"
      "mapa.shared::cluster.u32 counter, %1, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%2, %3, %4, %5}, "
      "[counter];\n"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(barrier)), "r"(v.x), "r"(v.y), "r"(v.z),
        "r"(v.w), "r"(rank)
      : "memory");
#endif
}

// From this block's shared memory to the same place of block `rank`'s as `to` is of this one's,
// counting on its barrier.
QK_DEVICE void copy_to_block(void* to, const void* from, int bytes, Barrier* barrier, int rank) {
#ifdef QKERNELS_HOST
  host::copy_to_block(to, from, bytes, barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 there, counts;\n"
      "mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 counts, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, "
      "[counts];\n"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(from)), "r"(bytes),
        "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

// ---- Matrices -----------------------------------------------------------------------------------

// Stores four matrices of 8 x 8 16-bit elements transposed, one register each: a thread holds
// elements 2t and 2t + 1 of row g, which become column g of rows 2t and 2t + 1. Lane i gives the
// address of row i % 8 of matrix i / 8.
QK_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
#ifdef QKERNELS_HOST
  host::stmatrix_x4_trans(row, r);
#elif QK_SM90A
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// ---- Products of a warpgroup --------------------------------------------------------------------

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

// sums (+)= A . B in the background: A[64][32] is int8 in registers, 16 rows of each warp as for
// mma_s8; B[kN][32] is int8 in shared memory. sums[4 * j + e] is element e of mma_s8's D for
// columns 8j to 8j + 7. Without `add` the sums begin at 0.
template <int kN>
QK_DEVICE void warpgroup_mma(int32_t (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                             bool add) {
#ifdef QKERNELS_HOST
  host::warpgroup_mma(sums, kN, a, b, add);
#elif QK_SM90A
  if constexpr (kN == 32) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else if constexpr (kN == 64) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]),
          "+r"(sums[16]), "+r"(sums[17]), "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]),
          "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]), "+r"(sums[24]), "+r"(sums[25]),
          "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]), "+r"(sums[30]),
          "+r"(sums[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else if constexpr (kN == 96) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]),
          "+r"(sums[16]), "+r"(sums[17]), "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]),
          "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]), "+r"(sums[24]), "+r"(sums[25]),
          "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]), "+r"(sums[30]),
          "+r"(sums[31]), "+r"(sums[32]), "+r"(sums[33]), "+r"(sums[34]), "+r"(sums[35]),
          "+r"(sums[36]), "+r"(sums[37]), "+r"(sums[38]), "+r"(sums[39]), "+r"(sums[40]),
          "+r"(sums[41]), "+r"(sums[42]), "+r"(sums[43]), "+r"(sums[44]), "+r"(sums[45]),
          "+r"(sums[46]), "+r"(sums[47])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else if constexpr (kN == 128) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]),
          "+r"(sums[16]), "+r"(sums[17]), "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]),
          "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]), "+r"(sums[24]), "+r"(sums[25]),
          "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]), "+r"(sums[30]),
          "+r"(sums[31]), "+r"(sums[32]), "+r"(sums[33]), "+r"(sums[34]), "+r"(sums[35]),
          "+r"(sums[36]), "+r"(sums[37]), "+r"(sums[38]), "+r"(sums[39]), "+r"(sums[40]),
          "+r"(sums[41]), "+r"(sums[42]), "+r"(sums[43]), "+r"(sums[44]), "+r"(sums[45]),
          "+r"(sums[46]), "+r"(sums[47]), "+r"(sums[48]), "+r"(sums[49]), "+r"(sums[50]),
          "+r"(sums[51]), "+r"(sums[52]), "+r"(sums[53]), "+r"(sums[54]), "+r"(sums[55]),
          "+r"(sums[56]), "+r"(sums[57]), "+r"(sums[58]), "+r"(sums[59]), "+r"(sums[60]),
          "+r"(sums[61]), "+r"(sums[62]), "+r"(sums[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else if constexpr (kN == 192) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "{%96, %97, %98, %99}, %100, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]),
          "+r"(sums[16]), "+r"(sums[17]), "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]),
          "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]), "+r"(sums[24]), "+r"(sums[25]),
          "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]), "+r"(sums[30]),
          "+r"(sums[31]), "+r"(sums[32]), "+r"(sums[33]), "+r"(sums[34]), "+r"(sums[35]),
          "+r"(sums[36]), "+r"(sums[37]), "+r"(sums[38]), "+r"(sums[39]), "+r"(sums[40]),
          "+r"(sums[41]), "+r"(sums[42]), "+r"(sums[43]), "+r"(sums[44]), "+r"(sums[45]),
          "+r"(sums[46]), "+r"(sums[47]), "+r"(sums[48]), "+r"(sums[49]), "+r"(sums[50]),
          "+r"(sums[51]), "+r"(sums[52]), "+r"(sums[53]), "+r"(sums[54]), "+r"(sums[55]),
          "+r"(sums[56]), "+r"(sums[57]), "+r"(sums[58]), "+r"(sums[59]), "+r"(sums[60]),
          "+r"(sums[61]), "+r"(sums[62]), "+r"(sums[63]), "+r"(sums[64]), "+r"(sums[65]),
          "+r"(sums[66]), "+r"(sums[67]), "+r"(sums[68]), "+r"(sums[69]), "+r"(sums[70]),
          "+r"(sums[71]), "+r"(sums[72]), "+r"(sums[73]), "+r"(sums[74]), "+r"(sums[75]),
          "+r"(sums[76]), "+r"(sums[77]), "+r"(sums[78]), "+r"(sums[79]), "+r"(sums[80]),
          "+r"(sums[81]), "+r"(sums[82]), "+r"(sums[83]), "+r"(sums[84]), "+r"(sums[85]),
          "+r"(sums[86]), "+r"(sums[87]), "+r"(sums[88]), "+r"(sums[89]), "+r"(sums[90]),
          "+r"(sums[91]), "+r"(sums[92]), "+r"(sums[93]), "+r"(sums[94]), "+r"(sums[95])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else if constexpr (kN == 256) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
        "%127}, "
        "{%128, %129, %130, %131}, %132, add;\n"
        "}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]),
          "+r"(sums[11]), "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]),
          "+r"(sums[16]), "+r"(sums[17]), "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]),
          "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]), "+r"(sums[24]), "+r"(sums[25]),
          "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]), "+r"(sums[30]),
          "+r"(sums[31]), "+r"(sums[32]), "+r"(sums[33]), "+r"(sums[34]), "+r"(sums[35]),
          "+r"(sums[36]), "+r"(sums[37]), "+r"(sums[38]), "+r"(sums[39]), "+r"(sums[40]),
          "+r"(sums[41]), "+r"(sums[42]), "+r"(sums[43]), "+r"(sums[44]), "+r"(sums[45]),
          "+r"(sums[46]), "+r"(sums[47]), "+r"(sums[48]), "+r"(sums[49]), "+r"(sums[50]),
          "+r"(sums[51]), "+r"(sums[52]), "+r"(sums[53]), "+r"(sums[54]), "+r"(sums[55]),
          "+r"(sums[56]), "+r"(sums[57]), "+r"(sums[58]), "+r"(sums[59]), "+r"(sums[60]),
          "+r"(sums[61]), "+r"(sums[62]), "+r"(sums[63]), "+r"(sums[64]), "+r"(sums[65]),
          "+r"(sums[66]), "+r"(sums[67]), "+r"(sums[68]), "+r"(sums[69]), "+r"(sums[70]),
          "+r"(sums[71]), "+r"(sums[72]), "+r"(sums[73]), "+r"(sums[74]), "+r"(sums[75]),
          "+r"(sums[76]), "+r"(sums[77]), "+r"(sums[78]), "+r"(sums[79]), "+r"(sums[80]),
          "+r"(sums[81]), "+r"(sums[82]), "+r"(sums[83]), "+r"(sums[84]), "+r"(sums[85]),
          "+r"(sums[86]), "+r"(sums[87]), "+r"(sums[88]), "+r"(sums[89]), "+r"(sums[90]),
          "+r"(sums[91]), "+r"(sums[92]), "+r"(sums[93]), "+r"(sums[94]), "+r"(sums[95]),
          "+r"(sums[96]), "+r"(sums[97]), "+r"(sums[98]), "+r"(sums[99]), "+r"(sums[100]),
          "+r"(sums[101]), "+r"(sums[102]), "+r"(sums[103]), "+r"(sums[104]), "+r"(sums[105]),
          "+r"(sums[106]), "+r"(sums[107]), "+r"(sums[108]), "+r"(sums[109]), "+r"(sums[110]),
          "+r"(sums[111]), "+r"(sums[112]), "+r"(sums[113]), "+r"(sums[114]), "+r"(sums[115]),
          "+r"(sums[116]), "+r"(sums[117]), "+r"(sums[118]), "+r"(sums[119]), "+r"(sums[120]),
          "+r"(sums[121]), "+r"(sums[122]), "+r"(sums[123]), "+r"(sums[124]), "+r"(sums[125]),
          "+r"(sums[126]), "+r"(sums[127])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else {
    static_assert(kN == 32, "no such instruction");
  }
#endif
}

}  // namespace qkernels::cuda
