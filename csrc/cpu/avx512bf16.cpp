// The table for AVX-512 with bfloat16: that of AVX-512, but for layers whose activations stay
// bfloat16. Headers come before the target region, so that nothing of theirs is compiled for this
// ISA and then shared with code that runs elsewhere.

// GCC 12's own header trips over its _mm512_undefined_*() once it is inlined (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace qkernels {
namespace {

// Not asked for by dispatch.cpp: Cooper Lake has bfloat16 without it.
bool has_vbmi() { return __builtin_cpu_supports("avx512vbmi") != 0; }

}  // namespace
}  // namespace qkernels

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")

namespace qkernels {
namespace avx512bf16 {
namespace {

#include "cpu/simd_avx512.h"
#include "cpu/unroll.inl"
#include "cpu/codes.inl"
#include "cpu/embedding.inl"
#include "cpu/backward.inl"
#include "cpu/epilogue.inl"
#include "cpu/prepare.inl"
#include "cpu/lines_avx512.inl"
#include "cpu/matmul_avx512bf16.inl"
#include "cpu/matmul.inl"
#include "cpu/matmul_wide.inl"
#include "cpu/matmul_table.inl"
#include "cpu/backward_avx512bf16.inl"

}  // namespace
}  // namespace avx512bf16
}  // namespace qkernels

#pragma GCC pop_options

namespace qkernels {
namespace {

// Factors would have to be rounded into x.
bool is_bf16(const LinearArgs& a) {
  return a.activation == Activation::float_ && a.x_type == DType::bf16 && a.premul == nullptr;
}

int row_tile(const LinearArgs& a) {
  return is_bf16(a) ? avx512bf16::row_tile(a) : avx512_kernels()->row_tile(a);
}

int block_tile(const LinearArgs& a) {
  return is_bf16(a) ? avx512bf16::block_tile(a) : avx512_kernels()->block_tile(a);
}

int64_t panel_bytes(const LinearArgs& a) {
  return is_bf16(a) ? avx512bf16::panel_bytes(a) : avx512_kernels()->panel_bytes(a);
}

void prepare(const LinearArgs& a, int64_t begin, int64_t end) {
  (is_bf16(a) ? avx512bf16::prepare : avx512_kernels()->prepare)(a, begin, end);
}

void linear(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
            int64_t row_end) {
  (is_bf16(a) ? avx512bf16::linear : avx512_kernels()->linear)(a, block_begin, block_end, row_begin,
                                                               row_end);
}

const char* linear_name(const LinearArgs& a) {
  return (is_bf16(a) ? avx512bf16::linear_name : avx512_kernels()->linear_name)(a);
}

void backward(const BackwardArgs& a, int64_t row_begin, int64_t row_end, int64_t k_begin,
              int64_t k_end, float* scratch) {
  if (a.type == DType::bf16) {
    avx512bf16::backward_as<avx512bf16::Pairs, DType::bf16>(a, row_begin, row_end, k_begin, k_end,
                                                            scratch);
  } else {
    avx512_kernels()->backward(a, row_begin, row_end, k_begin, k_end, scratch);
  }
}

}  // namespace

const Kernels* avx512bf16_kernels() {
  static const Kernels table = [] {
    Kernels t = *avx512_kernels();
    t.isa = "avx512bf16";
    t.row_tile = row_tile;
    t.block_tile = block_tile;
    t.panel_bytes = panel_bytes;
    t.prepare = prepare;
    t.linear = linear;
    t.linear_name = linear_name;
    t.backward = backward;
    return t;
  }();
  return &table;
}

}  // namespace qkernels
