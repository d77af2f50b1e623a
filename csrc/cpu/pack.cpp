// Storage layout to packed rows and back, in words of 4 bytes: what a lane holds of one line. Byte
// shuffles that no ISA does much better than plain loops.
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"

namespace qkernels {
namespace {

// Bytes of codes that a lane moves before the next lane takes its turn: 16 lanes then write lines
// that are still in the L1 cache.
constexpr int64_t kRun = 64;

uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
void store_word(uint8_t* p, uint32_t word) { std::memcpy(p, &word, 4); }

// A word of 4-bit codes: in storage 0 1 2 3 4 5 6 7 from the low nibble up, packed 0 4 1 5 2 6 3 7.
// Two swaps of neighbours, each its own inverse.
uint32_t swap_bytes(uint32_t x) {
  const uint32_t t = (x ^ x >> 8) & 0x0000ff00;
  return x ^ t ^ t << 8;
}
uint32_t swap_nibbles(uint32_t x) {
  const uint32_t t = (x ^ x >> 4) & 0x00f000f0;
  return x ^ t ^ t << 4;
}

struct Bytes {                          // int8
  static constexpr int64_t kCodes = 4;  // in a word

  static uint32_t pack(uint32_t word) { return word; }
  static uint32_t unpack(uint32_t word) { return word; }
  static int32_t sum(uint32_t word) {
    const uint32_t biased = word ^ 0x80808080;  // code + 128
    const uint32_t pairs = (biased & 0x00ff00ff) + (biased >> 8 & 0x00ff00ff);
    return static_cast<int32_t>((pairs & 0xffff) + (pairs >> 16)) - 4 * 128;
  }
};

struct Nibbles {  // int4 and nf4
  static constexpr int64_t kCodes = 8;

  static uint32_t pack(uint32_t word) { return swap_nibbles(swap_bytes(word)); }
  static uint32_t unpack(uint32_t word) { return swap_bytes(swap_nibbles(word)); }
  static int32_t sum(uint32_t word) {
    const uint32_t pairs = (word & 0x0f0f0f0f) + (word >> 4 & 0x0f0f0f0f);
    return static_cast<int32_t>(pairs * 0x01010101 >> 24);
  }
};

// Up to kCodes codes from code k of a storage row on. A whole word that starts on a byte is read at
// once; ends of groups, and groups that start inside a byte, go code by code.
template <class Word>
bool is_plain(int64_t k, int64_t count) {
  return count >= Word::kCodes && k * 4 % Word::kCodes == 0;
}
template <class Word>
uint32_t load_codes(const uint8_t* row, Format format, int64_t k, int64_t count) {
  if (is_plain<Word>(k, count)) return load_word(row + k * 4 / Word::kCodes);
  constexpr int kBits = 32 / Word::kCodes;
  uint32_t word = 0;
  for (int64_t i = 0; i < count && i < Word::kCodes; ++i) {
    const uint32_t code = static_cast<uint32_t>(load_code(row, format, k + i));
    word |= (code & ((1u << kBits) - 1)) << (i * kBits);
  }
  return word;
}
template <class Word>
void store_codes(uint8_t* row, Format format, int64_t k, int64_t count, uint32_t word) {
  if (is_plain<Word>(k, count)) return store_word(row + k * 4 / Word::kCodes, word);
  constexpr int kBits = 32 / Word::kCodes;
  for (int64_t i = 0; i < count && i < Word::kCodes; ++i) {
    store_code(row, format, k + i, static_cast<int>(word >> (i * kBits) & ((1u << kBits) - 1)));
  }
}

// Calls body(begin, count) for runs of a group's codes: `count` of them from code `begin` of the
// group on.
template <class Word, class Body>
void for_runs(const BlockShape& s, int64_t g, const Body& body) {
  constexpr int64_t kCount = kRun / 4 * Word::kCodes;
  const int64_t length = s.group_length(g);
  for (int64_t i = 0; i < length; i += kCount) {
    body(i, length - i < kCount ? length - i : kCount);
  }
}

template <class Word>
void pack_block(const PackArgs& a, int64_t block) {
  const BlockShape& s = a.shape;
  const Format format = a.layout.format;
  const int64_t scale_bytes = bytes_of(a.layout.scale);
  uint8_t* row = a.packed + block * s.bytes;
  std::memset(row, 0, static_cast<size_t>(s.bytes));
  const int64_t first = block * kLanes;
  const int lanes = static_cast<int>(a.n - first < kLanes ? a.n - first : kLanes);
  float weight_sums[kLanes] = {};
  for (int64_t g = 0; g < s.groups; ++g) {
    int32_t sums[kLanes] = {};
    for_runs<Word>(s, g, [&](int64_t begin, int64_t count) {
      for (int lane = 0; lane < lanes; ++lane) {
        const uint8_t* codes = static_cast<const uint8_t*>(a.data) + (first + lane) * a.row_bytes;
        uint8_t* line = row + code_offset(format, s.padded_begin(g) + begin, lane);
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i += Word::kCodes, line += kLine) {
          const uint32_t word =
              load_codes<Word>(codes, format, s.group_begin(g) + begin + i, count - i);
          store_word(line, Word::pack(word));
          sum += Word::sum(word);
        }
        sums[lane] += sum;
      }
    });
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t from = (first + lane) * s.groups + g, to = g * kLanes + lane;
      std::memcpy(row + s.scales + to * scale_bytes,
                  static_cast<const uint8_t*>(a.scale) + from * scale_bytes,
                  static_cast<size_t>(scale_bytes));
      int zero = symmetric_zero(format);
      if (!a.layout.symmetric) {
        zero = load_zero_point(a.zero_point, format, from);
        row[s.zeros + to] = static_cast<uint8_t>(zero);
      }
      weight_sums[lane] = std::fma(value_sum(sums[lane], s.group_length(g), format, zero),
                                   load_float(a.scale, a.layout.scale, from), weight_sums[lane]);
    }
    if (format == Format::int8) std::memcpy(row + s.sums + g * kLanes * 4, sums, sizeof(sums));
  }
  if (format != Format::nf4) std::memcpy(row + s.bias, weight_sums, sizeof(weight_sums));
}

template <class Word>
void unpack_block(const UnpackArgs& a, int64_t block) {
  const BlockShape& s = a.shape;
  const Format format = a.layout.format;
  const int64_t scale_bytes = bytes_of(a.layout.scale);
  const uint8_t* row = a.packed + block * s.bytes;
  const int64_t first = block * kLanes;
  const int lanes = static_cast<int>(a.n - first < kLanes ? a.n - first : kLanes);
  for (int64_t g = 0; g < s.groups; ++g) {
    for_runs<Word>(s, g, [&](int64_t begin, int64_t count) {
      for (int lane = 0; lane < lanes; ++lane) {
        uint8_t* codes = static_cast<uint8_t*>(a.data) + (first + lane) * a.row_bytes;
        const uint8_t* line = row + code_offset(format, s.padded_begin(g) + begin, lane);
        for (int64_t i = 0; i < count; i += Word::kCodes, line += kLine) {
          store_codes<Word>(codes, format, s.group_begin(g) + begin + i, count - i,
                            Word::unpack(load_word(line)));
        }
      }
    });
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t from = g * kLanes + lane, to = (first + lane) * s.groups + g;
      std::memcpy(static_cast<uint8_t*>(a.scale) + to * scale_bytes,
                  row + s.scales + from * scale_bytes, static_cast<size_t>(scale_bytes));
      if (!a.layout.symmetric) static_cast<uint8_t*>(a.zero_point)[to] = row[s.zeros + from];
    }
  }
}

}  // namespace

void pack_blocks(const PackArgs& a, int64_t begin, int64_t end) {
  const bool bytes = info(a.layout.format).bits == 8;
  for (int64_t block = begin; block < end; ++block) {
    bytes ? pack_block<Bytes>(a, block) : pack_block<Nibbles>(a, block);
  }
}

void unpack_blocks(const UnpackArgs& a, int64_t begin, int64_t end) {
  const bool bytes = info(a.layout.format).bits == 8;
  for (int64_t block = begin; block < end; ++block) {
    bytes ? unpack_block<Bytes>(a, block) : unpack_block<Nibbles>(a, block);
  }
}

void compact_blocks(const ConvArgs& a, const BlockShape& compact, uint8_t* out) {
  const int64_t taps = a.kernel[2], channels = a.channels;
  const int64_t rows = a.taps() / taps, words = a.row_codes() / 4;
  for (int64_t block = 0; block < a.blocks(); ++block, out += compact.bytes) {
    const uint8_t* from = a.packed + block * a.shape.bytes;
    std::memset(out, 0, static_cast<size_t>(compact.scales));
    std::memcpy(out + compact.scales, from + a.shape.scales,
                static_cast<size_t>(a.shape.bytes - a.shape.scales));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        // A tap's word, of which the upper bytes are 0, ends up in one word or in two.
        const uint8_t* tap_line = from + (row * taps + tap) * kLine;
        uint8_t* line = out + (row * words + tap * channels / 4) * kLine;
        const int64_t shift = tap * channels % 4 * 8;
        const bool spills = shift + channels * 8 > 32;
        for (int lane = 0; lane < kLanes; ++lane) {
          const uint32_t word = load_word(tap_line + lane * 4);
          store_word(line + lane * 4, load_word(line + lane * 4) | word << shift);
          if (spills) store_word(line + kLine + lane * 4, word >> (32 - shift));
        }
      }
    }
  }
}

void pack_int8_columns(const int8_t* b, int64_t stride_k, int64_t stride_n, int64_t n,
                       const BlockShape& shape, uint8_t* packed, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* row = packed + block * shape.bytes;
    std::memset(row, 0, static_cast<size_t>(shape.bytes));
    int32_t sums[kLanes] = {};
    const int lanes = static_cast<int>(n - block * kLanes < kLanes ? n - block * kLanes : kLanes);
    for (int64_t k = 0; k < shape.k; k += 4) {
      const int8_t* source = b + k * stride_k + block * kLanes * stride_n;
      uint8_t* line = row + code_offset(Format::int8, k, 0);
      const int64_t left = shape.k - k;
      if (left >= 4 && stride_n == 1 && lanes == kLanes) {
        // Constant counts, so that the compiler makes vectors of the lanes.
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int j = 0; j < 4; ++j) {
            line[lane * 4 + j] = static_cast<uint8_t>(source[j * stride_k + lane]);
            sums[lane] += source[j * stride_k + lane];
          }
        }
      } else if (left >= 4 && stride_k == 1) {
        for (int lane = 0; lane < lanes; ++lane) {
          const int8_t* codes = source + lane * stride_n;
          const uint32_t word = load_word(reinterpret_cast<const uint8_t*>(codes));
          store_word(line + lane * 4, word);
          sums[lane] += Bytes::sum(word);
        }
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          for (int64_t j = 0; j < 4 && j < left; ++j) {
            const int8_t code = source[j * stride_k + lane * stride_n];
            line[lane * 4 + j] = static_cast<uint8_t>(code);
            sums[lane] += code;
          }
        }
      }
    }
    std::memcpy(row + shape.sums, sums, sizeof(sums));
  }
}

}  // namespace qkernels
