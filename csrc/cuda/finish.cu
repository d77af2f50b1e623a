// finish: bias and activation function, behind a product that torch has computed. A thread takes
// eight elements where they are of one channel or of eight neighbours.
#include "cuda/dispatch.cuh"
#include "cuda/elements.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kThreads = 256;

template <DType kType, bool kVectors>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs a) {
  constexpr int kUnit = kVectors ? kEight : 1;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kUnit;
  if (at >= a.count) return;
  const int64_t outer = divide(at, a.inner);
  const int64_t channel = outer - divide(outer, a.channels) * a.channels;
  const auto finished = [&](float x, int i) {
    const int64_t of = channel + (a.inner == 1 ? i : 0);
    const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_type, of);
    return apply_epilogue(x + bias, a.epilogue);
  };
  if constexpr (kVectors) {
    float x[kEight];
    load_eight<kType>(x, a.x, at);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = finished(x[i], i);
    store_eight<kType>(a.y, at, x);
  } else {
    store_element<kType>(a.y, at, finished(load_element<kType>(a.x, at), 0));
  }
}

}  // namespace

void finish(const FinishArgs& a, Stream stream) {
  if (a.count == 0) return;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vectors = aligned(a.x) && aligned(a.y) && a.count % kEight == 0 &&
                       (a.inner == 1 ? a.channels : a.inner) % kEight == 0;
  for_float(a.type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const auto kernel = vectors ? finish_kernel<kType, true> : finish_kernel<kType, false>;
    launch(kernel, dim3(blocks_for(a.count, vectors ? kThreads * kEight : kThreads)), kThreads, 0,
           stream, a);
  });
}

}  // namespace qkernels::cuda
