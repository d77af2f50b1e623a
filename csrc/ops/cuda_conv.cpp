// How a GPU runs conv.
#include "ops/conv.h"

namespace qkernels {

void run_conv_int8(const ConvArgs& a, const Layout&) {
  // Places in an image and the tiles of a call are counted in 32 bits.
  const int64_t pixels = a.batch * a.pixels();
  if (std::max({a.image_codes(), pixels, a.batch * 32}) > INT32_MAX ||
      a.groups > 65535) {
    fail("conv", "x is too large for one call on a GPU, with ", a.image_codes(),
         " codes in an image and ", pixels, " pixels of results; split the batch");
  }
  const Tensor workspace = workspace_on_device(cuda::conv_int8_workspace(a));
  cuda::conv_int8(a, workspace.mutable_data_ptr(), current_stream());
}

void run_conv_float(const ConvArgs&, const ConvWeight&) {
  fail("conv", "float activations have no CUDA kernel yet; pass activation=1 or 2, or compute on ",
       "the CPU");
}

}  // namespace qkernels
