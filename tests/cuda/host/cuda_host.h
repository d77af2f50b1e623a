// What CUDA's compiler has built in, for g++: included before every .cu file that is emulated.
// A block's threads are fibers of one thread, and blocks run one after the other; see
// docs/TESTING.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// __shared__ is missing on purpose: memory that is not from shared_memory() is not poisoned.

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <class T>
struct alignas(2 * sizeof(T)) HostVector2 {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) HostVector4 {
  T x, y, z, w;
};
using uint2 = HostVector2<uint32_t>;
using uint4 = HostVector4<uint32_t>;
using int2 = HostVector2<int32_t>;
using int4 = HostVector4<int32_t>;
using float2 = HostVector2<float>;
using float4 = HostVector4<float>;
constexpr uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
constexpr uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
constexpr int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
constexpr int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace qkernels::host {

// Runs `thread` for every thread of every block, and throws what went wrong.
void run(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& thread);

// The same for blocks in clusters of `cluster` along x, which run together.
void run_clusters(dim3 grid, dim3 block, int64_t shared_bytes, unsigned cluster,
                  const std::function<void()>& thread);

// Kernels run one after the other here. What can be seen of one that may overlap with the one
// before it is whether it waits at all.
void wait_for_previous();
void check_waited();

// QKERNELS_HOST_MULTIPROCESSORS and QKERNELS_HOST_SM90, which say what device the kernels are
// chosen for.
int multiprocessors();
bool sm90();

// The running thread.
struct Place {
  dim3 thread, block, block_size, grid;
};
const Place& place();
int lane();

void* shared_memory();
void sync_threads();
void sync_warp();

// Ends the kernel with a sentence.
[[noreturn]] void fault(const std::string& what);
void check_alignment(const char* op, const void* at, int64_t bytes);
void check_shared(const char* op, const void* at, int64_t bytes);

// Notes an access to shared memory, to find races. Plain loads and stores of kernels are noted by
// themselves.
void reads(const char* op, const void* at, int64_t bytes);
void writes(const char* op, const void* at, int64_t bytes);
void adds(const char* op, const void* at, int64_t bytes);

void copy_async(void* to, const void* from, int bytes, int valid);
void commit_async();
void wait_async(int pending);

// All 32 lanes of the warp meet in the same `op`; the last to come calls whole(lanes), where
// lanes[i] is the argument of lane i, and then all go on.
void meet(const char* op, void* mine, const std::function<void(void* const*)>& whole);

// The same of the four warps of a warpgroup, each with its own `mine`.
void meet_warpgroup(const char* op, void* mine, const std::function<void(void* const*)>& whole);

// ---- sm_90 --------------------------------------------------------------------------------------

void barrier_init(uint64_t* at, int count);
void barrier_arrive(uint64_t* at, int rank);
void barrier_arrive(uint64_t* at);
void barrier_expect(uint64_t* at, int bytes);
void barrier_wait(uint64_t* at, uint32_t parity);
int cluster_rank();
void sync_cluster();
void sync_some(int number, int count);
void shared_fence();
void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier, uint32_t blocks);
void store_async(void* to, uint4 v, uint64_t* barrier, int rank);
void copy_to_block(void* to, const void* from, int bytes, uint64_t* barrier, int rank);
uint64_t shared_offset(const char* op, const void* at);

using Widen = float (*)(uint16_t);
using Narrow = uint16_t (*)(float);

// Products are computed when somebody waits for them, which is as late as can be.
struct WarpgroupProduct {
  void* sums;  // int32_t of int8, float of 16 bits
  int n;
  uint32_t a[4];
  uint64_t b;
  bool add;
  Widen widen;  // of 16 bits; null: int8
};
void warpgroup_mma(int32_t* sums, int n, const uint32_t (&a)[4], uint64_t b, bool add);
void warpgroup_mma_16(float* sums, int n, const uint32_t (&a)[4], uint64_t b, bool add,
                      Widen widen);
void warpgroup_commit();
void warpgroup_wait(int pending);
void multiply_warpgroup(const WarpgroupProduct* const* lanes);
// Byte k of 32 in column `column` of the matrix that a descriptor says.
const uint8_t* warpgroup_matrix(uint64_t descriptor, int column, int k);

// ---- Instructions -------------------------------------------------------------------------------

template <class T>
T aligned(const char* op, const void* at) {
  check_alignment(op, at, sizeof(T));
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <class T>
void store_aligned(const char* op, void* at, const T& value) {
  check_alignment(op, at, sizeof(T));
  std::memcpy(at, &value, sizeof(T));
}

template <class T>
T exchange(const char* op, T value, int from) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  struct Lane {
    T given, got;
    int from;
  } mine{value, value, from};
  meet(op, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane* lane = static_cast<Lane*>(lanes[i]);
      lane->got = static_cast<const Lane*>(lanes[lane->from & 31])->given;
    }
  });
  return mine.got;
}

template <class F>
uint32_t reduce(const char* op, uint32_t value, F join) {
  uint32_t mine = value;
  meet(op, &mine, [&](void* const* lanes) {
    uint32_t total = *static_cast<uint32_t*>(lanes[0]);
    for (int i = 1; i < 32; ++i) total = join(total, *static_cast<uint32_t*>(lanes[i]));
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(lanes[i]) = total;
  });
  return mine;
}

uint32_t ballot(bool predicate);
void add_shared(int32_t* at, int32_t value);
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]);

void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen);
void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint32_t fma_16(uint32_t a, uint32_t b, uint32_t c, Widen widen, Narrow narrow);

}  // namespace qkernels::host

#define threadIdx (::qkernels::host::place().thread)
#define blockIdx (::qkernels::host::place().block)
#define blockDim (::qkernels::host::place().block_size)
#define gridDim (::qkernels::host::place().grid)
#define __syncthreads ::qkernels::host::sync_threads
#define __syncwarp ::qkernels::host::sync_warp
