// The instructions that kernels name, one function each, and `launch`. Nothing else in csrc/cuda
// but ptx_sm90*.cuh holds inline assembly or calls the CUDA runtime. With QKERNELS_HOST the kernels
// are compiled as C++ and run on the emulator of tests/cuda/host, so each function has a second
// half that says what the instruction does.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/codec.h"
#include "cuda/launch.h"

#ifndef QKERNELS_HOST
#include <cuda_runtime.h>
#endif

// What a kernel calls.
#define QK_DEVICE __device__ __forceinline__

namespace qkernels::cuda {

// ---- Launch -------------------------------------------------------------------------------------

// How a kernel is launched beside its grid.
struct LaunchOptions {
  unsigned cluster = 1;  // blocks along x that run together, from sm_90 on
  // The kernel may begin while the one before it in the stream still runs, and calls
  // wait_for_previous() in each thread before it reads or writes what that one writes or reads.
  bool overlaps = false;
};

#ifndef QKERNELS_HOST
// Whether kernels of the current device can begin before others have ended.
inline bool device_overlaps() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}
#endif

// Runs kernel(args...) with `shared_bytes` of shared memory. An empty grid is nothing to do.
template <class... Params, class... Args>
void launch_with(LaunchOptions options, void (*kernel)(Params...), dim3 grid, dim3 block,
                 int64_t shared_bytes, Stream stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef QKERNELS_HOST
  static_cast<void>(stream);
  host::run_clusters(grid, block, shared_bytes, options.cluster,
                     [&] { kernel(static_cast<Params>(args)...); });
  if (options.overlaps) host::check_waited();
#else
  cudaError_t error = cudaSuccess;
  // More than what every kernel may have must be asked for, on each device.
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (options.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = options.cluster;
      attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
      ++count;
    }
    if (options.overlaps && device_overlaps()) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count].val.programmaticStreamSerializationAllowed = 1;
      ++count;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("qkernels: a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
#endif
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes, Stream stream,
            const Args&... args) {
  launch_with({}, kernel, grid, block, shared_bytes, stream, args...);
}

// ---- Kernels that overlap -----------------------------------------------------------------------

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

// Blocks that cover `count` with `each`; grid.x goes to 2^31 - 1, y and z to 65535.
inline unsigned blocks_for(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

// Of the current device.
inline int multiprocessors() {
#ifdef QKERNELS_HOST
  return host::multiprocessors();
#else
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    throw std::runtime_error("qkernels: the CUDA device does not answer");
  }
  return count;
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

// ---- Memory -------------------------------------------------------------------------------------

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
QK_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QKERNELS_HOST
  return host::fma_16(a, b, c, from_f16, float_to_f16);
#else
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

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

// ---- By element type ----------------------------------------------------------------------------

// One element of a float tensor, its type known to the compiler.
template <DType kType>
QK_DEVICE float load_element(const void* data, int64_t i) {
  if constexpr (kType == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kType == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

template <DType kType>
QK_DEVICE void store_element(void* data, int64_t i, float value) {
  if constexpr (kType == DType::f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        kType == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  }
}

}  // namespace qkernels::cuda
