// The table for AVX-VNNI: that of AVX2, but for products of int8 activations. avxvnni.cpp and
// avxvnni_evex.cpp compile it, each with the namespace QK_NAMESPACE and the instruction
// QK_VPDPBUSD. Headers come before the target region, so that nothing of theirs is compiled for
// this ISA and then shared with code that runs elsewhere.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/rows.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace qkernels {
namespace QK_NAMESPACE {
namespace {

#include "cpu/simd_avx2.h"
#include "cpu/unroll.inl"
#include "cpu/codes.inl"
#include "cpu/encode.inl"
#include "cpu/epilogue.inl"
#include "cpu/prepare.inl"
#include "cpu/matmul_avxvnni.inl"
#include "cpu/matmul.inl"
#include "cpu/matmul_wide.inl"
#include "cpu/matmul_table.inl"
#include "cpu/conv_image.inl"
#include "cpu/conv_finish.inl"
#include "cpu/conv.inl"
#include "cpu/depthwise_vnni.inl"
#include "cpu/conv_table.inl"

}  // namespace
}  // namespace QK_NAMESPACE
}  // namespace qkernels

#pragma GCC pop_options

namespace qkernels {
namespace {

namespace vnni = QK_NAMESPACE;

bool has_product(const LinearArgs& a) {
  return a.activation != Activation::float_ && a.layout.format != Format::nf4;
}

int row_tile(const LinearArgs& a) {
  return has_product(a) ? vnni::row_tile(a) : avx2_kernels()->row_tile(a);
}

int block_tile(const LinearArgs& a) {
  return has_product(a) ? vnni::block_tile(a) : avx2_kernels()->block_tile(a);
}

int64_t panel_bytes(const LinearArgs& a) {
  return has_product(a) ? vnni::panel_bytes(a) : avx2_kernels()->panel_bytes(a);
}

void prepare(const LinearArgs& a, int64_t begin, int64_t end) {
  (has_product(a) ? vnni::prepare : avx2_kernels()->prepare)(a, begin, end);
}

void linear(const LinearArgs& a, int64_t block_begin, int64_t block_end, int64_t row_begin,
            int64_t row_end) {
  (has_product(a) ? vnni::linear : avx2_kernels()->linear)(a, block_begin, block_end, row_begin,
                                                           row_end);
}

const char* linear_name(const LinearArgs& a) {
  return (has_product(a) ? vnni::linear_name : avx2_kernels()->linear_name)(a);
}

Kernels avxvnni_table() {
  Kernels t = *avx2_kernels();
  t.isa = "avxvnni";
  t.row_tile = row_tile;
  t.block_tile = block_tile;
  t.panel_bytes = panel_bytes;
  t.prepare = prepare;
  t.linear = linear;
  t.linear_name = linear_name;
  t.conv_code_bytes = vnni::conv_code_bytes;
  t.conv_reads_codes = vnni::conv_reads_codes;
  t.conv_prepare = vnni::conv_prepare;
  t.conv = vnni::conv;
  t.conv_name = vnni::conv_name;
  return t;
}

}  // namespace
}  // namespace qkernels
