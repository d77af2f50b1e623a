// The AVX-512 table: the scalar one with rows overridden. Headers come before the target region, so
// that nothing of theirs is compiled for this ISA and then shared with code that runs elsewhere.

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

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

namespace qkernels {
namespace avx512 {
namespace {

#include "cpu/simd_avx512.h"
#include "cpu/unroll.inl"
#include "cpu/codes.inl"
#include "cpu/encode.inl"
#include "cpu/quantize.inl"
#include "cpu/fake_quantize.inl"
#include "cpu/embedding.inl"
#include "cpu/backward.inl"
#include "cpu/epilogue.inl"
#include "cpu/prepare.inl"
#include "cpu/lines_avx512.inl"
#include "cpu/matmul_avx512.inl"
#include "cpu/tiles.inl"
#include "cpu/matmul.inl"
#include "cpu/matmul_wide.inl"
#include "cpu/matmul_table.inl"
#include "cpu/conv_image.inl"
#include "cpu/conv_finish.inl"
#include "cpu/conv.inl"
#include "cpu/depthwise_vnni.inl"
#include "cpu/conv_table.inl"
#include "cpu/pool.inl"
#include "cpu/int8.inl"
#include "cpu/attention.inl"
#include "cpu/norm.inl"

}  // namespace
}  // namespace avx512
}  // namespace qkernels

#pragma GCC pop_options

namespace qkernels {

const Kernels* avx512_kernels() {
  static const Kernels table = [] {
    Kernels t = *scalar_kernels();
    t.isa = "avx512";
    t.quantize = avx512::quantize;
    t.quantize_with = avx512::quantize_with;
    t.range = avx512::range;
    t.dequantize = avx512::dequantize;
    t.fake_quantize = avx512::fake_quantize;
    t.fake_quantize_backward = avx512::fake_quantize_backward;
    t.row_tile = avx512::row_tile;
    t.block_tile = avx512::block_tile;
    t.panel_bytes = avx512::panel_bytes;
    t.prepare = avx512::prepare;
    t.linear = avx512::linear;
    t.linear_name = avx512::linear_name;
    t.backward = avx512::backward;
    t.embedding = avx512::embedding;
    t.conv_code_bytes = avx512::conv_code_bytes;
    t.conv_reads_codes = avx512::conv_reads_codes;
    t.conv_prepare = avx512::conv_prepare;
    t.conv = avx512::conv;
    t.conv_name = avx512::conv_name;
    t.max_pool = avx512::max_pool;
    t.avg_pool = avx512::avg_pool;
    t.add = avx512::add;
    t.lookup = avx512::lookup;
    t.attention_tile = avx512::attention_tile;
    t.attention_scratch = avx512::attention_scratch;
    t.attention = avx512::attention;
    t.add_norm = avx512::add_norm;
    return t;
  }();
  return &table;
}

}  // namespace qkernels
