// The AVX2 table: the scalar one with rows overridden. Headers come before the target region, so
// that nothing of theirs is compiled for this ISA and then shared with code that runs elsewhere.
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
namespace avx2 {
namespace {

#include "cpu/simd_avx2.h"
#include "cpu/unroll.inl"
#include "cpu/codes.inl"
#include "cpu/encode.inl"
#include "cpu/quantize.inl"
#include "cpu/fake_quantize.inl"
#include "cpu/embedding.inl"
#include "cpu/backward.inl"
#include "cpu/epilogue.inl"
#include "cpu/prepare.inl"
#include "cpu/matmul_avx2.inl"
#include "cpu/tiles.inl"
#include "cpu/matmul.inl"
#include "cpu/matmul_wide.inl"
#include "cpu/matmul_table.inl"
#include "cpu/conv_image.inl"
#include "cpu/conv_finish.inl"
#include "cpu/conv.inl"
#include "cpu/depthwise_avx2.inl"
#include "cpu/conv_table.inl"
#include "cpu/pool.inl"
#include "cpu/int8.inl"
#include "cpu/attention.inl"
#include "cpu/norm.inl"

}  // namespace
}  // namespace avx2
}  // namespace qkernels

#pragma GCC pop_options

namespace qkernels {

const Kernels* avx2_kernels() {
  static const Kernels table = [] {
    Kernels t = *scalar_kernels();
    t.isa = "avx2";
    t.quantize = avx2::quantize;
    t.quantize_with = avx2::quantize_with;
    t.range = avx2::range;
    t.dequantize = avx2::dequantize;
    t.fake_quantize = avx2::fake_quantize;
    t.fake_quantize_backward = avx2::fake_quantize_backward;
    t.row_tile = avx2::row_tile;
    t.block_tile = avx2::block_tile;
    t.panel_bytes = avx2::panel_bytes;
    t.prepare = avx2::prepare;
    t.linear = avx2::linear;
    t.linear_name = avx2::linear_name;
    t.backward = avx2::backward;
    t.embedding = avx2::embedding;
    t.conv_code_bytes = avx2::conv_code_bytes;
    t.conv_reads_codes = avx2::conv_reads_codes;
    t.conv_prepare = avx2::conv_prepare;
    t.conv = avx2::conv;
    t.conv_name = avx2::conv_name;
    t.max_pool = avx2::max_pool;
    t.avg_pool = avx2::avg_pool;
    t.add = avx2::add;
    t.lookup = avx2::lookup;
    t.attention_tile = avx2::attention_tile;
    t.attention_scratch = avx2::attention_scratch;
    t.attention = avx2::attention;
    t.add_norm = avx2::add_norm;
    return t;
  }();
  return &table;
}

}  // namespace qkernels
