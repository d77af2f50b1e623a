// vpdpbusd as CPUs with AVX-512 VNNI encode it. All else is AVX2, so that those which lack AVX-VNNI
// can test the kernels of avxvnni.cpp, instruction for instruction.
#define QK_NAMESPACE avxvnni_evex
#define QK_VPDPBUSD "%{evex%} vpdpbusd"
#include "cpu/avxvnni.inl"

namespace qkernels {

const Kernels* avxvnni_evex_kernels() {
  static const Kernels table = avxvnni_table();
  return &table;
}

}  // namespace qkernels
