// How the CPU runs what happens to int8 codes between convolutions.
#include "ops/int8.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "ops/torch_api.h"

namespace qkernels {
namespace {

// Codes per thread below which starting another costs more than it gains: read by windows, and
// written.
constexpr int64_t kPoolGrain = 256 * 1024;
constexpr int64_t kAddGrain = 64 * 1024;
constexpr int64_t kLookupGrain = 128 * 1024;

using PoolKernel = void (*)(const PoolArgs&, int64_t, int64_t);

void run_pool(PoolKernel kernel, const PoolArgs& a, double taps) {
  const int64_t line = a.out[2] * (a.channels_last ? a.channels : 1);
  const int64_t work = static_cast<int64_t>(std::min<double>(taps, kPoolGrain));
  parallel(a.lines(), grain_for(kPoolGrain, line * work),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Codes of one scale and zero point as codes of another.
struct Table {
  bool copies;  // the codes mean the same
  int8_t codes[256];
};
Table table_of(const GivenCodes& x, const GivenCodes& y) {
  Table table{x.scale == y.scale && x.zero == y.zero, {}};
  const Affine affine{y.scale, 1.0f / y.scale, y.zero};
  for (int code = -128; code < 128; ++code) {
    const float value = decode(code, Format::int8, x.scale, x.zero);
    table.codes[code + 128] = static_cast<int8_t>(encode_integer(value, affine, -128, 127));
  }
  return table;
}

}  // namespace

void run_max_pool(const PoolArgs& a, double taps) { run_pool(kernels().max_pool, a, taps); }

void run_avg_pool(const PoolArgs& args, double taps) {
  PoolArgs a = args;
  a.scale = static_cast<double>(a.x_codes.scale) / a.y_codes.scale;
  a.x_zero = a.x_codes.zero;
  a.y_zero = a.y_codes.zero;
  run_pool(kernels().avg_pool, a, taps);
}

void run_add(const AddArgs& args, int64_t count) {
  AddArgs a = args;
  a.a_scale = a.a_codes.scale;
  a.a_zero = a.a_codes.zero;
  a.b_scale = a.b_codes.scale;
  a.b_zero = a.b_codes.zero;
  a.y_inverse = 1.0f / a.y_codes.scale;
  a.y_zero = a.y_codes.zero;
  const Kernels& table = kernels();
  parallel(count, kAddGrain, [&](int64_t begin, int64_t end) { table.add(a, begin, end); });
}

void run_lookup(const LookupArgs& a, int64_t count) {
  const Kernels& table = kernels();
  parallel(count, kLookupGrain, [&](int64_t begin, int64_t end) { table.lookup(a, begin, end); });
}

void run_concat(const std::vector<ConcatArgs>& pieces) {
  std::vector<Table> tables;
  for (const ConcatArgs& piece : pieces) {
    tables.push_back(table_of(piece.x_codes, piece.y_codes));
  }
  const Kernels& kernel = kernels();
  parallel(pieces[0].rows, grain_for(kLookupGrain, pieces[0].pitch),
           [&](int64_t begin, int64_t end) {
             for (size_t i = 0; i < pieces.size(); ++i) {
               const ConcatArgs& piece = pieces[i];
               for (int64_t row = begin; row < end; ++row) {
                 const LookupArgs a{piece.x + row * piece.cols, piece.y + row * piece.pitch,
                                    tables[i].codes};
                 if (tables[i].copies) {
                   std::copy_n(a.x, piece.cols, a.y);
                 } else {
                   kernel.lookup(a, 0, piece.cols);
                 }
               }
             }
           });
}

}  // namespace qkernels
