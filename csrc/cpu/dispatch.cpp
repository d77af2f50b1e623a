// Which table runs. The list is in ascending order: the last one that the machine can run is used,
// unless QKERNELS_ISA names another.
#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace qkernels {
namespace {

// The register state that the operating system saves (XCR0): a CPU may have AVX-512 while the
// kernel does not.
bool os_saves(uint32_t mask) {
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return false;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

constexpr uint32_t kYmmState = 0x6;
constexpr uint32_t kZmmState = 0xe6;

bool always() { return true; }

bool has_avx2() {
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  const uint32_t want = bit_FMA | bit_F16C | bit_AVX;
  if ((c & want) != want) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  return (b & bit_AVX2) != 0 && os_saves(kYmmState);
}

bool has_avx512() {
  uint32_t a, b, c, d;
  if (!has_avx2() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const uint32_t want = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return (b & want) == want && (c & bit_AVX512VNNI) != 0 && os_saves(kZmmState);
}

bool has_vex_vnni() {
  uint32_t a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & bit_AVXVNNI) != 0;
}

// AVX-512 has the instruction too, in an encoding of its own.
bool has_avxvnni() { return has_vex_vnni() || has_avx512(); }

const Kernels* any_avxvnni_kernels() {
  return has_vex_vnni() ? avxvnni_kernels() : avxvnni_evex_kernels();
}

bool has_avx512bf16() {
  uint32_t a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & bit_AVX512BF16) != 0;
}

const Isa* choose() {
  const char* wanted = std::getenv("QKERNELS_ISA");
  const Isa* best = nullptr;
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa& isa = kIsas[i];
    if (isa.available()) {
      best = &isa;
      names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, isa.name) != 0) continue;
    if (!isa.available()) {
      throw std::runtime_error(
          "qkernels: QKERNELS_ISA=" + std::string(wanted) +
          " but this machine cannot run it; unset it or choose one of: " + names);
    }
    return &isa;
  }
  if (wanted != nullptr && *wanted != '\0') {
    throw std::runtime_error(
        "qkernels: QKERNELS_ISA=" + std::string(wanted) +
        " is not an instruction set that qkernels knows; unset it or choose one of: " + names);
  }
  return best;
}

}  // namespace

const Isa kIsas[] = {
    {"scalar", scalar_kernels, always},
    {"avx2", avx2_kernels, has_avx2},
    {"avxvnni", any_avxvnni_kernels, has_avxvnni},
    {"avx512", avx512_kernels, has_avx512},
    {"avx512bf16", avx512bf16_kernels, has_avx512bf16},
};
const int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

const Kernels& kernels() {
  // A throwing initializer runs again at the next call, so the sentence is not lost.
  static const Kernels* const table = choose()->table();
  return *table;
}

}  // namespace qkernels
