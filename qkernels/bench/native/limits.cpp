// What this machine can do at most: memory bandwidth, and operations per second of each instruction
// that a low-bit kernel may be made of. Compiled on demand by limits.py and called through ctypes.
// Times are taken between a barrier and the last thread's end, so starting threads costs nothing.

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs work(thread) on all threads at once; returns the seconds from the start to the last end.
template <class Work>
double run_together(int threads, const Work& work) {
  std::atomic<int> waiting{threads};
  std::atomic<int64_t> first{INT64_MAX}, last{0};
  auto body = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) _mm_pause();
    const int64_t begin = Clock::now().time_since_epoch().count();
    work(thread);
    const int64_t end = Clock::now().time_since_epoch().count();
    for (int64_t seen = first; begin < seen && !first.compare_exchange_weak(seen, begin);) {
    }
    for (int64_t seen = last; end > seen && !last.compare_exchange_weak(seen, end);) {
    }
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(body, t);
  body(0);
  for (std::thread& thread : pool) thread.join();
  return std::chrono::duration<double>(Clock::duration(last - first)).count();
}

// ---- Arithmetic ---------------------------------------------------------------------------------
// Independent accumulators that hide the instruction's latency, and nothing but registers. The
// instruction is written in assembly, or the compiler would see that the result is not used. The
// registers are cleared first: garbage read as floats may be denormal, which is slow.

constexpr int kChains = 12;
constexpr int kRepeat = 4096;

#define EACH_CHAIN(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

// Without loops over the chains, which would keep them in memory.
#define CLEAR(n) acc[n] = zero;
#define KEEP(n) asm volatile("" ::"v"(acc[n]));

#define PEAK(NAME, TARGET, REGISTER, ZERO, STEP)      \
  __attribute__((target(TARGET))) void NAME() {       \
    const REGISTER zero = ZERO(), a = zero, b = zero; \
    REGISTER acc[kChains];                            \
    EACH_CHAIN(CLEAR)                                 \
    for (int i = 0; i < kRepeat; ++i) {               \
      EACH_CHAIN(STEP)                                \
    }                                                 \
    EACH_CHAIN(KEEP)                                  \
  }

#define FMA(n) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(acc[n]) : "v"(a), "v"(b));
#define DPBUSD(n) asm volatile("vpdpbusd %1, %2, %0" : "+v"(acc[n]) : "v"(a), "v"(b));
#define DPBUSD_VEX(n) asm volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(acc[n]) : "x"(a), "x"(b));
#define DPBF16(n) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(acc[n]) : "v"(a), "v"(b));
// int8 products on AVX2: widened to int16 (exact), or by vpmaddubsw, whose int16 sums may saturate.
#define MADD16(n)                                                   \
  {                                                                 \
    __m256i t;                                                      \
    asm volatile("vpmaddwd %1, %2, %0" : "=x"(t) : "x"(a), "x"(b)); \
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc[n]) : "x"(t));      \
  }
#define MADDUBS(n)                                                    \
  {                                                                   \
    __m256i t;                                                        \
    asm volatile("vpmaddubsw %1, %2, %0" : "=x"(t) : "x"(a), "x"(b)); \
    asm volatile("vpmaddwd %1, %0, %0" : "+x"(t) : "x"(b));           \
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc[n]) : "x"(t));        \
  }
// 15 * 127 * 2 * 8 fits int16, so 4-bit weights need the step to int32 once in eight products.
#define MADDUBS_ADD                                                 \
  asm volatile("vpmaddubsw %1, %2, %0" : "=x"(t) : "x"(a), "x"(b)); \
  asm volatile("vpaddw %1, %0, %0" : "+x"(u) : "x"(t));
#define MADDUBS8(n)                                                         \
  {                                                                         \
    __m256i t, u;                                                           \
    asm volatile("vpmaddubsw %1, %2, %0" : "=x"(u) : "x"(a), "x"(b));       \
    MADDUBS_ADD MADDUBS_ADD MADDUBS_ADD MADDUBS_ADD MADDUBS_ADD MADDUBS_ADD \
        MADDUBS_ADD asm volatile("vpmaddwd %1, %0, %0" : "+x"(u) : "x"(b)); \
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc[n]) : "x"(u));              \
  }

PEAK(fma_256, "avx2,fma", __m256, _mm256_setzero_ps, FMA)
PEAK(fma_512, "avx512f", __m512, _mm512_setzero_ps, FMA)
PEAK(madd16_256, "avx2", __m256i, _mm256_setzero_si256, MADD16)
PEAK(maddubs_256, "avx2", __m256i, _mm256_setzero_si256, MADDUBS)
PEAK(maddubs8_256, "avx2", __m256i, _mm256_setzero_si256, MADDUBS8)
PEAK(vnni_256_vex, "avx2,avxvnni", __m256i, _mm256_setzero_si256, DPBUSD_VEX)
PEAK(vnni_256_evex, "avx512vl,avx512vnni", __m256i, _mm256_setzero_si256, DPBUSD)
PEAK(vnni_512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, DPBUSD)
PEAK(bf16_512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps, DPBF16)

struct Peak {
  const char* name;
  void (*run)();
  double operations;  // of one step of one chain: a multiplication and an addition count as two
  bool there;
};

const std::vector<Peak>& peaks() {
  static const std::vector<Peak> table = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool avxvnni = avx2 && __builtin_cpu_supports("avxvnni");
    return std::vector<Peak>{
        {"fma_256", fma_256, 16, avx2},
        {"fma_512", fma_512, 32, avx512},
        {"madd16_256", madd16_256, 32, avx2},
        {"maddubs_256", maddubs_256, 64, avx2},
        {"maddubs8_256", maddubs8_256, 512, avx2},
        {"vnni_256", avxvnni ? vnni_256_vex : vnni_256_evex, 64, avxvnni || vnni},
        {"vnni_512", vnni_512, 128, vnni},
        {"bf16_512", bf16_512, 64, avx512 && __builtin_cpu_supports("avx512bf16")},
    };
  }();
  return table;
}

// ---- Memory -------------------------------------------------------------------------------------

// Reads from several places at once, which the memory answers faster than one after the other.
constexpr size_t kStreams = 6;

__attribute__((target("avx2"))) void read_256(const char* from, size_t bytes) {
  __m256i x = _mm256_setzero_si256(), y = x;
  const size_t length = bytes / kStreams;
  for (size_t i = 0; i + 64 <= length; i += 64) {
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const __m256i* p = reinterpret_cast<const __m256i*>(from + stream * length + i);
      x = _mm256_or_si256(x, _mm256_load_si256(p));
      y = _mm256_or_si256(y, _mm256_load_si256(p + 1));
    }
  }
  asm volatile("" : "+v"(x), "+v"(y));
}

// Stores past the caches: they need not read the line that they overwrite.
__attribute__((target("avx2"))) void copy_256(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i y = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), x);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), y);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void write_256(char* to, size_t bytes) {
  const __m256i x = _mm256_set1_epi8(1);
  for (size_t i = 0; i + 32 <= bytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), x);
  }
  _mm_sfence();
}

}  // namespace

extern "C" {

// The name of peak `index`, "" for one that this CPU cannot run, null past the end.
const char* qk_peak_name(int index) {
  if (index >= static_cast<int>(peaks().size())) return nullptr;
  return peaks()[index].there ? peaks()[index].name : "";
}

// Operations per second of peak `index`, measured for about `seconds`.
double qk_peak(int index, int threads, double seconds) {
  const Peak& peak = peaks()[index];
  const auto start = Clock::now();
  int calls = 0;
  do {
    peak.run();
    ++calls;
  } while (seconds_since(start) < seconds / 4);
  calls *= 3;
  const double taken = run_together(threads, [&](int) {
    for (int i = 0; i < calls; ++i) peak.run();
  });
  return peak.operations * kChains * kRepeat * calls * threads / taken;
}

// Seconds to read `bytes` (a multiple of 384 * threads) from `from`, split among the threads.
double qk_read(const char* from, size_t bytes, int threads) {
  const size_t part = bytes / threads;
  return run_together(threads, [&](int t) { read_256(from + t * part, part); });
}

// Seconds to write `bytes` (a multiple of 64 * threads) past the caches.
double qk_write(char* to, size_t bytes, int threads) {
  const size_t part = bytes / threads;
  return run_together(threads, [&](int t) { write_256(to + t * part, part); });
}

// Seconds to copy, past the caches (streaming) or as the C library does.
double qk_copy(char* to, const char* from, size_t bytes, int threads, int streaming) {
  const size_t part = bytes / threads;
  return run_together(threads, [&](int t) {
    if (streaming) {
      copy_256(to + t * part, from + t * part, part);
    } else {
      std::memcpy(to + t * part, from + t * part, part);
    }
  });
}
}
