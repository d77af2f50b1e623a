// The emulator: threads as fibers, barriers, shared memory and copies in flight.
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_host.h"

// Saves the registers that a call preserves and the stack pointer, and takes those of another
// fiber.
extern "C" void qkernels_switch(void** from, void* to);
asm(R"(
.text
.globl qkernels_switch
.hidden qkernels_switch
.type qkernels_switch, @function
qkernels_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace qkernels::host {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kStack = 128 * 1024, kPage = 4096;
constexpr int64_t kRedZone = 256;            // bytes around shared memory
constexpr int64_t kSharedLimit = 99 * 1024;  // of sm_86, sm_89 and sm_120; others have more
constexpr unsigned kThreadLimit = 1024;
constexpr int kPoison = 0xff;  // NaN as a float of any size, -1 as an integer

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Warp {
  void* lanes[kWarp];
  int arrived = 0;
  const char* op = nullptr;
  uint64_t meetings = 0;
};

struct Fiber {
  Place place;
  int id;
  void* stack_pointer;
  bool done = false;
  // Waits while *counter is still `seen`.
  const uint64_t* counter = nullptr;
  uint64_t seen = 0;
  const char* waits_in = nullptr;
  std::vector<Copy> open;                // copies of the group that is not closed yet
  std::deque<std::vector<Copy>> groups;  // closed, not landed
};

struct Block {
  const std::function<void()>* thread;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;
  uint8_t* shared;
  int64_t shared_bytes;
  unsigned arrived = 0;  // at the barrier of the block
  uint64_t barriers = 0;
  std::exception_ptr failure;
  void* scheduler;  // its stack pointer
};

std::mutex mutex;
Block* block = nullptr;
Fiber* self = nullptr;

// One stack for every thread of a block, each above a page that may not be touched.
uint8_t* stack_of(int id) {
  static uint8_t* stacks = [] {
    const size_t bytes = kThreadLimit * kStack;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < kThreadLimit; ++i) {
      mprotect(static_cast<uint8_t*>(memory) + i * kStack, kPage, PROT_NONE);
    }
    return static_cast<uint8_t*>(memory);
  }();
  return stacks + id * kStack;
}

std::string text(const dim3& d) {
  std::ostringstream out;
  out << "(" << d.x << ", " << d.y << ", " << d.z << ")";
  return out.str();
}

void back_to_scheduler() { qkernels_switch(&self->stack_pointer, block->scheduler); }

void wait_for(const uint64_t* counter, const char* where) {
  self->counter = counter;
  self->seen = *counter;
  self->waits_in = where;
  back_to_scheduler();
}

void fiber_main() {
  try {
    (*block->thread)();
    size_t left = self->open.size();
    for (const auto& group : self->groups) left += group.size();
    if (left != 0) fault("the thread ends with " + std::to_string(left) + " copies in flight");
  } catch (...) {
    block->failure = std::current_exception();
  }
  self->done = true;
  back_to_scheduler();
}

void start(Fiber* f) {
  // What qkernels_switch pops: six registers and the address to go to. A function starts 8 bytes
  // past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack_of(f->id) + kStack) - 2;
  top[0] = reinterpret_cast<void*>(&fiber_main);
  top[1] = nullptr;
  f->stack_pointer = top - 6;
}

std::string deadlock() {
  std::ostringstream out;
  out << "deadlock in block " << text(block->fibers[0].place.block) << ":";
  size_t returned = 0;
  std::vector<std::pair<const char*, int>> waiting;
  for (const Fiber& f : block->fibers) {
    if (f.done) {
      ++returned;
      continue;
    }
    auto at = std::find_if(waiting.begin(), waiting.end(),
                           [&](const auto& w) { return w.first == f.waits_in; });
    if (at == waiting.end()) at = waiting.insert(at, {f.waits_in, 0});
    ++at->second;
  }
  for (const auto& [where, count] : waiting)
    out << " " << count << " threads wait in " << where << ",";
  out << " " << returned << " have returned";
  return out.str();
}

void check_red_zone() {
  for (int64_t i = 0; i < kRedZone; ++i) {
    for (const int64_t at : {-1 - i, block->shared_bytes + i}) {
      if (block->shared[at] != kPoison) {
        throw std::runtime_error("emulator: block " + text(block->fibers[0].place.block) +
                                 " wrote to byte " + std::to_string(at) + " of its " +
                                 std::to_string(block->shared_bytes) + " bytes of shared memory");
      }
    }
  }
}

void run_block(Block* b, dim3 grid, dim3 size, dim3 index, bool backwards) {
  std::fill(b->memory.begin(), b->memory.end(), kPoison);
  b->warps.assign(b->warps.size(), Warp{});
  b->arrived = 0;
  const int count = static_cast<int>(b->fibers.size());
  for (int i = 0; i < count; ++i) {
    Fiber& f = b->fibers[i];
    f = Fiber{};
    f.id = i;
    f.place = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)}, index, size, grid};
    start(&f);
  }
  int left = count;
  while (left > 0) {
    bool any = false;
    for (int i = 0; i < count; ++i) {
      Fiber& f = b->fibers[backwards ? count - 1 - i : i];
      if (f.done || (f.counter != nullptr && *f.counter == f.seen)) continue;
      f.counter = nullptr;
      any = true;
      self = &f;
      qkernels_switch(&b->scheduler, f.stack_pointer);
      if (b->failure) std::rethrow_exception(b->failure);
      left -= f.done;
    }
    if (!any) throw std::runtime_error("emulator: " + deadlock());
  }
  check_red_zone();
}

}  // namespace

void run(dim3 grid, dim3 size, int64_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kThreadLimit || threads % kWarp != 0) {
    throw std::runtime_error("emulator: a block has whole warps and 32 to 1024 threads, got " +
                             text(size));
  }
  if (grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulator: grid.y and grid.z go to 65535, got " + text(grid));
  }
  if (shared_bytes < 0 || shared_bytes > kSharedLimit) {
    throw std::runtime_error("emulator: some GPUs have 99 KiB of shared memory, got " +
                             std::to_string(shared_bytes) + " bytes");
  }
  Block b{};
  b.thread = &thread;
  b.fibers.resize(threads);
  b.warps.resize(threads / kWarp);
  b.memory.resize(static_cast<size_t>(shared_bytes + 2 * kRedZone + 1024));
  const uintptr_t base = reinterpret_cast<uintptr_t>(b.memory.data()) + kRedZone;
  b.shared = reinterpret_cast<uint8_t*>((base + 1023) / 1024 * 1024);
  b.shared_bytes = shared_bytes;
  struct Reset {
    ~Reset() {
      block = nullptr;
      self = nullptr;
    }
  } reset;
  block = &b;
  // Every other block runs its threads from the last to the first, so that an order which no
  // barrier enforces shows.
  bool backwards = false;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x, backwards = !backwards) {
        run_block(&b, grid, size, {x, y, z}, backwards);
      }
    }
  }
}

int multiprocessors() {
  const char* count = std::getenv("QKERNELS_HOST_MULTIPROCESSORS");
  return count == nullptr ? 4 : std::atoi(count);
}

const Place& place() { return self->place; }
int lane() { return self->id % kWarp; }
void* shared_memory() { return block->shared; }

void fault(const std::string& what) {
  throw std::runtime_error("emulator: " + what + ", in thread " + text(self->place.thread) +
                           " of block " + text(self->place.block));
}

void check_alignment(const char* op, const void* at, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(bytes) != 0) {
    fault(std::string(op) + " of " + std::to_string(bytes) + " bytes at an address that is not a " +
          "multiple of that");
  }
}

void check_shared(const char* op, const void* at, int64_t bytes) {
  const int64_t offset = static_cast<const uint8_t*>(at) - block->shared;
  if (offset < 0 || offset + bytes > block->shared_bytes) {
    fault(std::string(op) + " at byte " + std::to_string(offset) + " of " +
          std::to_string(block->shared_bytes) + " bytes of shared memory");
  }
}

void sync_threads() {
  if (++block->arrived == block->fibers.size()) {
    block->arrived = 0;
    ++block->barriers;
  } else {
    wait_for(&block->barriers, "__syncthreads");
  }
}

void sync_warp() {
  meet("__syncwarp", nullptr, [](void* const*) {});
}

void meet(const char* op, void* mine, const std::function<void(void* const*)>& whole) {
  Warp& warp = block->warps[self->id / kWarp];
  if (warp.arrived != 0 && std::strcmp(warp.op, op) != 0) {
    fault(std::string("this thread is in ") + op + " but others of its warp are in " + warp.op);
  }
  warp.op = op;
  warp.lanes[lane()] = mine;
  if (++warp.arrived == kWarp) {
    whole(warp.lanes);
    warp.arrived = 0;
    ++warp.meetings;
  } else {
    wait_for(&warp.meetings, op);
  }
}

// ---- Copies in flight ---------------------------------------------------------------------------
// The source is read when the copy lands, which is as late as can be, and the destination is
// poisoned until then: who reads too early or overwrites the source too early gets it wrong.

void copy_async(void* to, const void* from, int bytes, int valid) {
  check_alignment("cp_async", to, bytes);
  if (valid < 0 || valid > bytes) fault("cp_async of " + std::to_string(valid) + " valid bytes");
  if (valid > 0) check_alignment("cp_async", from, bytes);
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  self->open.push_back({to, from, bytes, valid});
}

void commit_async() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void wait_async(int pending) {
  while (static_cast<int>(self->groups.size()) > pending) {
    for (const Copy& c : self->groups.front()) {
      std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      if (c.valid > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    }
    self->groups.pop_front();
  }
}

}  // namespace qkernels::host
