// Instructions of sm_90 (Hopper) alone, one function each, as in ptx.cuh: barriers in shared
// memory, copies of many bytes that count on them, and clusters of blocks; products of a warpgroup
// are in ptx_wgmma.cuh. Where QK_SM90A is 0 they are declared but never called: kernels that use
// them have an empty body there, and are not launched.
#pragma once

#include "cuda/ptx.cuh"

#if defined(QKERNELS_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_SM90A 1
#else
#define QK_SM90A 0
#endif

namespace qkernels::cuda {

inline constexpr int kWarpgroup = 128;  // threads, of four warps

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

}  // namespace qkernels::cuda
