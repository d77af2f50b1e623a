// What the instructions of a whole warp compute. Registers and lanes as in csrc/cuda/ptx.cuh.
#include <utility>

#include "cuda_host.h"

namespace qkernels::host {
namespace {

constexpr int kWarp = 32;

// Element i of the k consecutive ones that a register holds.
int32_t int8_at(uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); }
uint16_t half_at(uint32_t word, int i) { return static_cast<uint16_t>(word >> 16 * i); }

// D[16][8] += A . B with `per` elements in a register and k = 8 * per.
template <class D, class Sum, class Element>
struct Mma {
  D* d;
  const uint32_t* a;
  const uint32_t* b;

  static void whole(void* const* lanes, int per, Element element) {
    auto at = [&](int i) -> const Mma& { return *static_cast<const Mma*>(lanes[i]); };
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        Sum sum{};
        for (int k = 0; k < 8 * per; ++k) {
          const int half = k / (4 * per), t = k % (4 * per) / per;
          const uint32_t a = at(row % 8 * 4 + t).a[half * 2 + row / 8];
          const uint32_t b = at(column * 4 + t).b[half];
          sum += static_cast<Sum>(element(a, k % per)) * static_cast<Sum>(element(b, k % per));
        }
        D& d = at(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
        d = static_cast<D>(static_cast<Sum>(d) + sum);
      }
    }
  }
};

}  // namespace

void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
  auto element = [widen](uint32_t word, int i) { return widen(half_at(word, i)); };
  using M = Mma<float, double, decltype(element)>;
  M mine{d, a, b};
  meet("mma of 16 bits", &mine, [&](void* const* lanes) { M::whole(lanes, 2, element); });
}

void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using M = Mma<int32_t, int64_t, decltype(&int8_at)>;
  M mine{d, a, b};
  meet("mma of int8", &mine, [](void* const* lanes) { M::whole(lanes, 4, &int8_at); });
}

uint32_t ballot(bool predicate) {
  uint32_t mine = predicate;
  meet("ballot", &mine, [](void* const* lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (int i = 0; i < kWarp; ++i) *static_cast<uint32_t*>(lanes[i]) = bits;
  });
  return mine;
}

namespace {

// Register j of lane i takes two elements, 16 bits each, of matrix j: those of at(i, 0) and
// at(i, 1), a row and a column.
template <class At>
void load_matrices(const char* op, uint32_t (&r)[4], const void* row, const At& at) {
  check_alignment(op, row, 16);
  reads(op, row, 16);
  struct Lane {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  meet(op, &mine, [&](void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
          const auto [row, column] = at(i, half);
          const Lane* owner = static_cast<const Lane*>(lanes[matrix * 8 + row]);
          uint16_t element;
          std::memcpy(&element, static_cast<const uint8_t*>(owner->row) + column * 2, 2);
          word |= static_cast<uint32_t>(element) << 16 * half;
        }
        static_cast<Lane*>(lanes[i])->r[matrix] = word;
      }
    }
  });
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  load_matrices("ldmatrix_x4", r, row,
                [](int i, int half) { return std::pair(i / 4, i % 4 * 2 + half); });
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  load_matrices("ldmatrix_x4_trans", r, row,
                [](int i, int half) { return std::pair(i % 4 * 2 + half, i / 4); });
}

void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  check_alignment("stmatrix_x4_trans", row, 16);
  check_shared("stmatrix_x4_trans", row, 16);
  writes("stmatrix_x4_trans", row, 16);
  struct Lane {
    const uint32_t* r;
    void* row;
  } mine{r, row};
  meet("stmatrix_x4_trans", &mine, [](void* const* lanes) {
    const auto at = [&](int i) { return static_cast<const Lane*>(lanes[i]); };
    for (int i = 0; i < kWarp; ++i) {
      for (int column = 0; column < 8; ++column) {
        const uint16_t element = half_at(at(column * 4 + i % 8 / 2)->r[i / 8], i % 2);
        std::memcpy(static_cast<uint8_t*>(at(i)->row) + column * 2, &element, 2);
      }
    }
  });
}

void add_shared(int32_t* at, int32_t value) {
  check_shared("add_shared", at, 4);
  adds("add_shared", at, 4);
  *at += value;
}

uint32_t fma_16(uint32_t a, uint32_t b, uint32_t c, Widen widen, Narrow narrow) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    // Products and nearly all sums are exact in double.
    const double exact =
        static_cast<double>(widen(half_at(a, i))) * widen(half_at(b, i)) + widen(half_at(c, i));
    result |= static_cast<uint32_t>(narrow(static_cast<float>(exact))) << 16 * i;
  }
  return result;
}

namespace {

// Of elements that have so many bytes: 32 bytes of k are a product.
template <class D, class Sum, class Element>
void multiply_warpgroup(const WarpgroupProduct* const* lanes, int bytes, const Element& element) {
  const WarpgroupProduct& first = *lanes[0];
  const int count = 32 / bytes;
  Sum a[64][32], b[32];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < count; ++k) {
      const int at = k * bytes, lane = row / 16 * kWarp + row % 8 * 4 + at % 16 / 4;
      const uint32_t* word = &lanes[lane]->a[at / 16 * 2 + row / 8 % 2];
      a[row][k] = element(reinterpret_cast<const uint8_t*>(word) + at % 4);
    }
  }
  for (int column = 0; column < first.n; ++column) {
    for (int k = 0; k < count; ++k) {
      b[k] = element(warpgroup_matrix(first.b, column, k * bytes));
    }
    for (int row = 0; row < 64; ++row) {
      Sum sum{};
      for (int k = 0; k < count; ++k) sum += a[row][k] * b[k];
      const int lane = row / 16 * kWarp + row % 8 * 4 + column % 8 / 2;
      D& d = static_cast<D*>(lanes[lane]->sums)[column / 8 * 4 + row / 8 % 2 * 2 + column % 2];
      d = static_cast<D>(static_cast<Sum>(first.add ? d : D{}) + sum);
    }
  }
}

}  // namespace

// B lies in shared memory as its descriptor says: where it begins, how far groups of eight rows are
// apart, and that the 16 bytes of a row of 128 are swizzled by bits 7 to 9 of the address.
const uint8_t* warpgroup_matrix(uint64_t descriptor, int column, int k) {
  const uint64_t start = (descriptor & 0x3fff) << 4, pitch = (descriptor >> 32 & 0x3fff) << 4;
  const uint64_t at = start + static_cast<uint64_t>(column / 8) * pitch + column % 8 * 128 + k;
  const uint8_t* from = static_cast<const uint8_t*>(shared_memory()) + (at ^ (at >> 7 & 7) << 4);
  check_shared("warpgroup_mma", from, 1);
  return from;
}

void multiply_warpgroup(const WarpgroupProduct* const* lanes) {
  const WarpgroupProduct& first = *lanes[0];
  if (first.b >> 62 != 1) fault("warpgroup_mma of a matrix without the swizzle of 128 bytes");
  for (int i = 0; i < 4 * kWarp; ++i) {
    const WarpgroupProduct& p = *lanes[i];
    if (p.n != first.n || p.b != first.b || p.add != first.add || p.widen != first.widen) {
      fault("the threads of a warpgroup disagree about a product");
    }
  }
  if (first.widen == nullptr) {
    multiply_warpgroup<int32_t, int64_t>(
        lanes, 1, [](const uint8_t* at) { return static_cast<int64_t>(static_cast<int8_t>(*at)); });
  } else {
    multiply_warpgroup<float, double>(lanes, 2, [&](const uint8_t* at) {
      uint16_t bits;
      std::memcpy(&bits, at, 2);
      return static_cast<double>(first.widen(bits));
    });
  }
}

}  // namespace qkernels::host
