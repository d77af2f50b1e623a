// vpdpbusd as CPUs with AVX-VNNI encode it.
#define QK_NAMESPACE avxvnni
#define QK_VPDPBUSD "%{vex%} vpdpbusd"
#include "cpu/avxvnni.inl"

namespace qkernels {

const Kernels* avxvnni_kernels() {
  static const Kernels table = avxvnni_table();
  return &table;
}

}  // namespace qkernels
