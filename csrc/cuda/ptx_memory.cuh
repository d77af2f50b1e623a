// Loads, stores and copies in the background, one function each, as in ptx.cuh.
#pragma once

#include <cstdint>

#include "cuda/runtime.cuh"

namespace qkernels::cuda {

// The block's shared memory, of the size given to `launch`. Its content is undefined at the start.
template <class T>
QK_DEVICE T* shared_memory() {
#ifdef QKERNELS_HOST
  return static_cast<T*>(host::shared_memory());
#else
  extern __shared__ __align__(1024) uint8_t qkernels_shared[];
  return reinterpret_cast<T*>(qkernels_shared);
#endif
}

#ifndef QKERNELS_HOST
QK_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif

// 16 bytes of global memory that no kernel writes meanwhile. `at` is a multiple of 16.
QK_DEVICE uint4 load_128(const void* at) {
#ifdef QKERNELS_HOST
  return host::aligned<uint4>("load_128", at);
#else
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
#endif
}

// As load_128, of bytes that are read once, such as weights: they leave L1 to the others.
QK_DEVICE uint4 load_stream_128(const void* at) {
#ifdef QKERNELS_HOST
  return host::aligned<uint4>("load_stream_128", at);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
#endif
}

QK_DEVICE uint2 load_64(const void* at) {
#ifdef QKERNELS_HOST
  return host::aligned<uint2>("load_64", at);
#else
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
#endif
}

QK_DEVICE uint32_t load_32(const void* at) {
#ifdef QKERNELS_HOST
  return host::aligned<uint32_t>("load_32", at);
#else
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
#endif
}

QK_DEVICE void store_128(void* at, uint4 v) {
#ifdef QKERNELS_HOST
  host::store_aligned("store_128", at, v);
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

QK_DEVICE void store_64(void* at, uint2 v) {
#ifdef QKERNELS_HOST
  host::store_aligned("store_64", at, v);
#else
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(at), "r"(v.x), "r"(v.y) : "memory");
#endif
}

// Shared memory.
QK_DEVICE uint4 load_shared_128(const void* at) {
#ifdef QKERNELS_HOST
  host::check_shared("load_shared_128", at, 16);
  return host::aligned<uint4>("load_shared_128", at);
#else
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(at))
               : "memory");
  return v;
#endif
}

QK_DEVICE uint2 load_shared_64(const void* at) {
#ifdef QKERNELS_HOST
  host::check_shared("load_shared_64", at, 8);
  return host::aligned<uint2>("load_shared_64", at);
#else
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(shared_address(at))
               : "memory");
  return v;
#endif
}

QK_DEVICE uint32_t load_shared_32(const void* at) {
#ifdef QKERNELS_HOST
  host::check_shared("load_shared_32", at, 4);
  return host::aligned<uint32_t>("load_shared_32", at);
#else
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(at)) : "memory");
  return v;
#endif
}

// *at += value, whoever else adds to it.
QK_DEVICE void add_shared(int32_t* at, int32_t value) {
#ifdef QKERNELS_HOST
  host::add_shared(at, value);
#else
  asm volatile("red.shared.add.s32 [%0], %1;" : : "r"(shared_address(at)), "r"(value) : "memory");
#endif
}

QK_DEVICE void store_shared_128(void* at, uint4 v) {
#ifdef QKERNELS_HOST
  host::check_shared("store_shared_128", at, 16);
  host::store_aligned("store_shared_128", at, v);
#else
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(at)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// Copies `kBytes` (4, 8 or 16) from global to shared memory in the background, the first `valid` of
// them from `from` and zeros for the rest; `from` is not read when `valid` is 0. 16 bytes go by L2
// alone.
template <int kBytes>
QK_DEVICE void cp_async(void* to, const void* from, int valid = kBytes) {
#ifdef QKERNELS_HOST
  host::check_shared("cp_async", to, kBytes);
  host::copy_async(to, from, kBytes, valid);
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
  }
#endif
}

// The same of 16 bytes by way of L1, where they are likely to be read again; zeros unless `there`.
QK_DEVICE void cp_async_cached(void* to, const void* from, bool there) {
#ifdef QKERNELS_HOST
  cp_async<16>(to, from, there ? 16 : 0);
#else
  asm volatile(
      "{\n"
      ".reg .pred missing;\n"
      "setp.eq.b32 missing, %2, 0;\n"
      "cp.async.ca.shared.global [%0], [%1], 16, missing;\n"
      "}"
      :
      : "r"(shared_address(to)), "l"(from), "r"(static_cast<int>(there))
      : "memory");
#endif
}

// Closes a group of this thread's copies, which may be empty.
QK_DEVICE void cp_async_commit() {
#ifdef QKERNELS_HOST
  host::commit_async();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Returns when all groups of this thread but the last `kPending` have landed. What other threads
// copied is there after a __syncthreads() that follows.
template <int kPending>
QK_DEVICE void cp_async_wait() {
#ifdef QKERNELS_HOST
  host::wait_async(kPending);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
#endif
}

}  // namespace qkernels::cuda
