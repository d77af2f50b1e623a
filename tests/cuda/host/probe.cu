// Kernels for tests/cuda/test_emulator.py: what instructions compute, and mistakes to be noticed.
#include "cuda/ptx_wgmma.cuh"
#include "ops/checks.h"

namespace qkernels::cuda {
namespace {

// The fragments of a[16][k] and b[8][k] (rows of 32 bytes), as ptx.cuh describes them, and the
// thread's place in d[16][8].
struct Fragments {
  uint32_t a[4], b[2];
  int row, column;
};

QK_DEVICE Fragments fragments(const uint8_t* a, const uint8_t* b) {
  const int g = host::lane() / 4, t = host::lane() % 4;
  Fragments f;
  for (int half = 0; half < 2; ++half) {
    const int at = half * 16 + t * 4;
    f.a[half * 2] = load_32(a + g * 32 + at);
    f.a[half * 2 + 1] = load_32(a + (g + 8) * 32 + at);
    f.b[half] = load_32(b + g * 32 + at);
  }
  f.row = g;
  f.column = 2 * t;
  return f;
}

template <class T>
QK_DEVICE void store_fragment(void* to, const T (&d)[4], const Fragments& f) {
  for (int i = 0; i < 4; ++i) {
    static_cast<T*>(to)[(f.row + i / 2 * 8) * 8 + f.column + i % 2] = d[i];
  }
}

__global__ void mma_kernel(const uint8_t* a, const uint8_t* b, void* d, int type) {
  const Fragments f = fragments(a, b);
  if (type == 0) {
    int32_t sum[4] = {1, 1, 1, 1};
    mma_s8(sum, f.a, f.b);
    return store_fragment(d, sum, f);
  }
  float sum[4] = {1, 1, 1, 1};
  if (type == 1) {
    mma_bf16(sum, f.a, f.b);
  } else {
    mma_f16(sum, f.a, f.b);
  }
  store_fragment(d, sum, f);
}

// The A fragment by ldmatrix from rows of 32 bytes in shared memory.
__global__ void ldmatrix_kernel(const uint8_t* a, uint32_t* to) {
  uint8_t* rows = shared_memory<uint8_t>();
  const int lane = host::lane();
  cp_async<16>(rows + lane * 16, a + lane * 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, rows + lane % 16 * 32 + lane / 16 * 16);
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = r[i];
}

// Four matrices of 8 x 8 from fragments, transposed to rows of 16 bytes in shared memory.
__global__ void stmatrix_kernel(const uint32_t* from, uint32_t* to) {
  uint8_t* rows = shared_memory<uint8_t>();
  const int lane = host::lane();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = from[lane * 4 + i];
  stmatrix_x4_trans(rows + lane * 16, r);
  __syncthreads();
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = reinterpret_cast<uint32_t*>(rows)[lane * 4 + i];
}

// Each thread copies a word and reads the one of a neighbour `distance` away.
__global__ void copy_kernel(const uint32_t* from, uint32_t* to, int valid, bool wait, bool barrier,
                            int distance) {
  uint32_t* words = shared_memory<uint32_t>();
  const unsigned i = threadIdx.x;
  cp_async<4>(words + i, from + i, valid);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  if (barrier) __syncthreads();
  to[blockIdx.x * blockDim.x + i] = words[(i + distance) % blockDim.x];
  cp_async_wait<0>();
}

__global__ void unfinished_kernel(const uint32_t* from) {
  cp_async<4>(shared_memory<char>(), from);
}

__global__ void stray_write_kernel(int64_t at) {
  if (threadIdx.x == 0) shared_memory<uint8_t>()[at] = 1;
}

__global__ void crossing_store_kernel(int64_t at) {
  if (threadIdx.x == 0) *reinterpret_cast<uint64_t*>(shared_memory<uint8_t>() + at) = 1;
}

__global__ void stray_load_kernel(int64_t at) { load_shared_128(shared_memory<uint8_t>() + at); }

__global__ void half_barrier_kernel() {
  if (threadIdx.x < 40) return;
  __syncthreads();
}

__global__ void two_ops_kernel() {
  if (threadIdx.x % 2 == 0) {
    shuffle(1, 0);
  } else {
    warp_max(1);
  }
}

// Two blocks copy 16 bytes each, to both.
__global__ void cluster_kernel(const uint8_t* from, uint32_t* to, bool wait) {
  uint8_t* const shared = shared_memory<uint8_t>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(shared + 32);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  cluster_sync();
  const int at = cluster_rank() * 16;
  if (threadIdx.x == 0) {
    barrier_expect(barrier, 32);
    copy_bulk(shared + at, from + at, 16, barrier, 3);
  }
  if (wait) barrier_wait(barrier, 0);
  if (threadIdx.x < 8) {
    to[blockIdx.x * 8 + threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
  }
  barrier_wait(barrier, 0);
  cluster_sync();
}

// Each of two blocks stores its rank to the other one.
__global__ void store_async_kernel(uint32_t* to, bool wait) {
  uint8_t* const shared = shared_memory<uint8_t>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(shared + 16);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 16);
  }
  cluster_sync();
  const uint32_t mine = static_cast<uint32_t>(cluster_rank());
  if (threadIdx.x == 0) {
    store_async_128(shared, make_uint4(mine, mine, mine, mine), barrier, cluster_rank() ^ 1);
  }
  if (wait) barrier_wait(barrier, 0);
  if (threadIdx.x == 1) to[blockIdx.x] = *reinterpret_cast<uint32_t*>(shared);
  barrier_wait(barrier, 0);
  cluster_sync();
}

__global__ void unfinished_product_kernel() {
  int32_t sums[32] = {};
  const uint32_t a[4] = {};
  warpgroup_mma<64>(sums, a, matrix_in_shared(shared_memory<uint8_t>()), false);
  warpgroup_commit();
}

// What comes between two accesses to the same byte of shared memory, by different threads.
enum class Between { nothing, warp, some, block, arrival, distant_arrival, cluster };

QK_DEVICE void pass_on(Between between, Barrier* barrier) {
  if (between == Between::warp) __syncwarp();
  if (between == Between::some) sync_some(1, kWarp);
  if (between == Between::block) __syncthreads();
  if (between == Between::arrival) barrier_arrive(barrier);
  if (between == Between::distant_arrival) barrier_arrive(barrier, cluster_rank());
  if (between == Between::arrival || between == Between::distant_arrival) barrier_wait(barrier, 0);
  if (between == Between::cluster) cluster_sync();
}

// Thread 0 makes the first access and thread 1 the second: 'w' writes a word, 'b' a byte beside
// those that others take, 'r' reads, 'a' adds, 'c' copies there.
QK_DEVICE void access(uint32_t* words, char which, const uint8_t* from) {
  if (which == 'w') words[0] = 1;
  if (which == 'b') reinterpret_cast<uint8_t*>(words)[threadIdx.x] = 1;
  if (which == 'r' && words[0] == 0) words[2] = 0;
  if (which == 'a') add_shared(reinterpret_cast<int32_t*>(words), 1);
  if (which == 'c') copy_bulk(words, from, 16, reinterpret_cast<Barrier*>(words + 6));
}

__global__ void accesses_kernel(const uint8_t* from, char first, char second, Between between) {
  uint32_t* const words = shared_memory<uint32_t>();
  Barrier* const barriers = reinterpret_cast<Barrier*>(words + 4);
  if (threadIdx.x == 0) {
    barrier_init(barriers, kWarp);
    barrier_init(barriers + 1, 1);
    barrier_expect(barriers + 1, second == 'c' ? 16 : 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) access(words, first, from);
  pass_on(between, barriers);
  if (threadIdx.x == 1) access(words, second, from);
  barrier_wait(barriers + 1, 0);
}

// Threads store a matrix that they then multiply with.
__global__ void stored_matrix_kernel(bool fence, bool barrier) {
  uint32_t* const words = shared_memory<uint32_t>();
  for (unsigned i = threadIdx.x; i < 64 * 32; i += blockDim.x) words[i] = 0;
  if (fence) shared_fence();
  if (barrier) __syncthreads();
  int32_t sums[32] = {};
  const uint32_t a[4] = {};
  warpgroup_mma<64>(sums, a, matrix_in_shared(words), false);
  warpgroup_commit();
  warpgroup_wait<0>();
}

__global__ void no_barrier_kernel() { barrier_wait(shared_memory<Barrier>(), 0); }

void mma(const Tensor& a, const Tensor& b, const Tensor& d, int64_t type) {
  launch(mma_kernel, 1, 32, 0, nullptr, static_cast<const uint8_t*>(a.const_data_ptr()),
         static_cast<const uint8_t*>(b.const_data_ptr()), d.mutable_data_ptr(),
         static_cast<int>(type));
}

void ldmatrix(const Tensor& a, const Tensor& to) {
  launch(ldmatrix_kernel, 1, 32, 512, nullptr, static_cast<const uint8_t*>(a.const_data_ptr()),
         static_cast<uint32_t*>(to.mutable_data_ptr()));
}

void stmatrix(const Tensor& from, const Tensor& to) {
  launch(stmatrix_kernel, 1, 32, 512, nullptr, static_cast<const uint32_t*>(from.const_data_ptr()),
         static_cast<uint32_t*>(to.mutable_data_ptr()));
}

void copy(const Tensor& from, const Tensor& to, int64_t valid, bool wait, bool barrier,
          int64_t distance) {
  launch(copy_kernel, 2, 64, 256, nullptr, static_cast<const uint32_t*>(from.const_data_ptr()),
         static_cast<uint32_t*>(to.mutable_data_ptr()), static_cast<int>(valid), wait, barrier,
         static_cast<int>(distance));
}

void cluster(const Tensor& from, const Tensor& to, bool wait) {
  launch_with({.cluster = 2}, cluster_kernel, 2, 32, 64, nullptr,
              static_cast<const uint8_t*>(from.const_data_ptr()),
              static_cast<uint32_t*>(to.mutable_data_ptr()), wait);
}

void store_async(const Tensor& to, bool wait) {
  launch_with({.cluster = 2}, store_async_kernel, 2, 32, 64, nullptr,
              static_cast<uint32_t*>(to.mutable_data_ptr()), wait);
}

void accesses(const Tensor& from, const std::string& which, int64_t between) {
  launch(accesses_kernel, 1, 32, 32, nullptr, static_cast<const uint8_t*>(from.const_data_ptr()),
         which.at(0), which.at(1), static_cast<Between>(between));
}

void stored_matrix(bool fence, bool barrier) {
  launch(stored_matrix_kernel, 1, 128, 8192, nullptr, fence, barrier);
}

void mistake(const std::string& which) {
  static const uint32_t word = 0;
  if (which == "unfinished copy") launch(unfinished_kernel, 1, 32, 4, nullptr, &word);
  if (which == "write past the end") launch(stray_write_kernel, 1, 32, 64, nullptr, int64_t{64});
  if (which == "write before the start")
    launch(stray_write_kernel, 1, 32, 64, nullptr, int64_t{-1});
  if (which == "store across the end")
    launch(crossing_store_kernel, 1, 32, 60, nullptr, int64_t{56});
  if (which == "load past the end") launch(stray_load_kernel, 1, 32, 64, nullptr, int64_t{64});
  if (which == "unaligned load") launch(stray_load_kernel, 1, 32, 64, nullptr, int64_t{4});
  if (which == "half a barrier") launch(half_barrier_kernel, 1, 64, 0, nullptr);
  if (which == "two instructions") launch(two_ops_kernel, 1, 32, 0, nullptr);
  if (which == "half a warp") launch(half_barrier_kernel, 1, 48, 0, nullptr);
  if (which == "unfinished product") launch(unfinished_product_kernel, 1, 128, 8192, nullptr);
  if (which == "no barrier") launch(no_barrier_kernel, 1, 32, 64, nullptr);
  if (which == "too much memory") launch(half_barrier_kernel, 1, 64, 100 * 1024, nullptr);
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels_host, m) {
  m.def("probe_mma(Tensor a, Tensor b, Tensor(a!) d, int type) -> ()");
  m.def("probe_ldmatrix(Tensor a, Tensor(a!) to) -> ()");
  m.def("probe_stmatrix(Tensor a, Tensor(a!) to) -> ()");
  m.def("probe_store_async(Tensor(a!) to, bool wait) -> ()");
  m.def(
      "probe_copy(Tensor a, Tensor(a!) to, int valid, bool wait, bool barrier, int distance) -> "
      "()");
  m.def("probe_cluster(Tensor a, Tensor(a!) to, bool wait) -> ()");
  m.def("probe_accesses(Tensor from, str which, int between) -> ()");
  m.def("probe_stored_matrix(bool fence, bool barrier) -> ()");
  m.def("probe_mistake(str which) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels_host, CompositeExplicitAutograd, m) {
  m.impl("probe_mma", TORCH_BOX(&qkernels::cuda::mma));
  m.impl("probe_ldmatrix", TORCH_BOX(&qkernels::cuda::ldmatrix));
  m.impl("probe_stmatrix", TORCH_BOX(&qkernels::cuda::stmatrix));
  m.impl("probe_store_async", TORCH_BOX(&qkernels::cuda::store_async));
  m.impl("probe_copy", TORCH_BOX(&qkernels::cuda::copy));
  m.impl("probe_cluster", TORCH_BOX(&qkernels::cuda::cluster));
  m.impl("probe_accesses", TORCH_BOX(&qkernels::cuda::accesses));
  m.impl("probe_stored_matrix", TORCH_BOX(&qkernels::cuda::stored_matrix));
  m.impl("probe_mistake", TORCH_BOX(&qkernels::cuda::mistake));
}
