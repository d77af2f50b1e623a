// Scratch memory of a call, kept by the calling thread, so that a small layer needs no
// allocation; beyond a cap it is given back at once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/format.h"

namespace qkernels {

class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    Kept& kept = kept_by_thread();
    if (bytes <= kKeep && !kept.busy) {
      kept.reserve(bytes);
      kept.busy = true;
      borrowed_ = true;
      at_ = kept.memory;
    } else {
      at_ = own_ = allocate(bytes);
    }
  }
  ~Workspace() {
    if (borrowed_) kept_by_thread().busy = false;
    std::free(own_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` elements, on a cache line of their own.
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return result;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
  }

 private:
  static constexpr int64_t kKeep = 4 << 20;

  static uint8_t* allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(kLine, static_cast<size_t>(round_up(bytes + 1, kLine)));
    if (memory == nullptr) {
      throw std::runtime_error(
          "qkernels: could not allocate " + std::to_string(bytes) +
          " bytes to compute with; free memory, or compute fewer rows at a time");
    }
    return static_cast<uint8_t*>(memory);
  }

  struct Kept {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    bool busy = false;

    void reserve(int64_t wanted) {
      if (wanted <= bytes) return;
      std::free(memory);
      memory = nullptr;
      bytes = 0;
      memory = allocate(wanted);
      bytes = wanted;
    }
    ~Kept() { std::free(memory); }
  };
  static Kept& kept_by_thread() {
    thread_local Kept kept;
    return kept;
  }

  uint8_t* at_ = nullptr;
  uint8_t* own_ = nullptr;
  bool borrowed_ = false;
};

}  // namespace qkernels
