// The CUDA kernels as csrc/ops calls them. Each checks nothing, allocates nothing, waits for
// nothing, and enqueues its work on `stream`, which belongs to the current device.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace qkernels::cuda {

using Stream = void*;  // a cudaStream_t

// Whether the current device runs code of sm_90a, and the library has it.
bool has_sm90a();

// `workspace` of quantize_workspace bytes.
void quantize(const QuantizeArgs& args, int64_t rows, void* workspace, Stream stream);
int64_t quantize_workspace(const QuantizeArgs& args, int64_t rows);
void quantize_with(const QuantizeArgs& args, int64_t rows, Stream stream);
void dequantize(const DequantizeArgs& args, int64_t rows, Stream stream);

// linear with int8 activations, and int_mm (x and y int8 and int32). The workspace is on the device
// and starts on 256 bytes.
int64_t linear_int8_workspace(const LinearArgs& args);
void linear_int8(const LinearArgs& args, void* workspace, Stream stream);

// Codes of b [k, n], elements `k_stride` and `n_stride` apart, packed as an int8 weight [n, k]
// without scales.
void pack_int8_columns(const int8_t* b, int64_t k_stride, int64_t n_stride, int64_t n,
                       const BlockShape& shape, uint8_t* packed, Stream stream);

void fake_quantize(const FakeQuantizeArgs& args, int64_t rows, void* workspace, Stream stream);
int64_t fake_quantize_workspace(const FakeQuantizeArgs& args, int64_t rows);
void fake_quantize_backward(const FakeBackwardArgs& args, int64_t rows, Stream stream);
// *sum = the sum of the values, in double and in order.
void ordered_sum(const float* values, int64_t count, float* sum, Stream stream);

void linear_backward_input(const BackwardArgs& args, Stream stream);

// conv with int8 activations; everything in the arguments is set but image and codes.
int64_t conv_int8_workspace(const ConvArgs& args);
void conv_int8(const ConvArgs& args, void* workspace, Stream stream);

// What happens to int8 codes between convolutions.
void max_pool(const PoolArgs& args, Stream stream);
void avg_pool(const PoolArgs& args, Stream stream);
void add(const AddArgs& args, int64_t count, Stream stream);
void lookup(const LookupArgs& args, int64_t count, Stream stream);
void concat(const ConcatArgs& args, Stream stream);

void dequantize_packed(const DequantizePackedArgs& args, Stream stream);
void finish(const FinishArgs& args, Stream stream);

void pack(const PackArgs& args, Stream stream);
void unpack(const UnpackArgs& args, Stream stream);
// An index that is out of range stops the kernel with an assertion, and the process cannot use the
// GPU any more.
void embedding(const EmbeddingArgs& args, int64_t count, Stream stream);

}  // namespace qkernels::cuda
