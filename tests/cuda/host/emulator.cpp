// The emulator: threads as fibers, barriers, shared memory and copies in flight.
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_host.h"
#include "races.h"

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
constexpr int64_t kSharedLimit90 = 227 * 1024;
constexpr unsigned kThreadLimit = 1024, kClusterLimit = 8;  // threads, blocks
constexpr int kPoison = 0xff;  // NaN as a float of any size, -1 as an integer

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// What the threads that have come to a barrier have seen, and after it all of them.
struct Handover {
  Clock given, taken;
};

// Threads that do something together.
template <int kCount>
struct Meeting {
  void* lanes[kCount];
  int arrived = 0;
  const char* op = nullptr;
  uint64_t meetings = 0;
  Handover clocks;
};

// A barrier in shared memory, which is known by its address.
struct Phases {
  int count, missing;
  int64_t bytes = 0;  // announced and not landed
  uint64_t ended = 0;
  size_t actor = 0;  // of the copies that land
  Handover clocks;

  void end_if_complete() {
    if (missing != 0 || bytes != 0) return;
    missing = count;
    ++ended;
    clocks.taken = clocks.given;
  }
};

struct BulkCopy {
  uint8_t* to;
  const void* from;  // null: `value`
  int bytes;
  Phases* phases;
  uint4 value;
  Clock clock;  // of the thread that asked for it
};

struct Some {
  int arrived = 0;
  uint64_t meetings = 0;
  Handover clocks;
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
  std::vector<Copy> open;                       // copies of the group that is not closed yet
  std::deque<std::vector<Copy>> groups;         // closed, not landed
  std::vector<WarpgroupProduct> open_products;  // the same of products
  std::deque<std::vector<WarpgroupProduct>> products;
  Clock clock;
};

struct Block {
  const std::function<void()>* thread;
  std::vector<Fiber> fibers;
  std::vector<Meeting<kWarp>> warps;
  std::vector<Meeting<4 * kWarp>> warpgroups;
  std::map<int64_t, Phases> phases;  // by their place in shared memory
  std::map<int, Some> some;          // by the barrier's number
  int rank;                          // in the cluster
  size_t left;                       // threads that have not returned
  std::vector<uint8_t> memory;
  uint8_t* shared;
  int64_t shared_bytes;
  unsigned arrived = 0;  // at the barrier of the block
  uint64_t barriers = 0;
  Handover clocks;
  Races races;

  bool holds(const void* at) const {
    const uint8_t* const byte = static_cast<const uint8_t*>(at);
    return byte >= shared && byte < shared + shared_bytes;
  }
};

struct Cluster {
  std::vector<Block> blocks;
  size_t threads, actors;  // of all blocks; the other actors are barriers in shared memory
  unsigned arrived = 0;    // at the barrier of the cluster
  uint64_t barriers = 0;
  Handover clocks;
  std::deque<BulkCopy> copies;  // in flight
};

std::mutex mutex;
bool waited = false;  // by the kernel that has run last
std::exception_ptr failure;
void* scheduler = nullptr;  // its stack pointer
Cluster* cluster = nullptr;
Block* block = nullptr;
Fiber* self = nullptr;

// One stack for every thread of a cluster, each above a page that may not be touched.
uint8_t* stack_of(int id) {
  static uint8_t* stacks = [] {
    const size_t bytes = kClusterLimit * kThreadLimit * kStack;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < kClusterLimit * kThreadLimit; ++i) {
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

size_t threads_before(const Block& b) { return static_cast<size_t>(b.rank) * b.fibers.size(); }

size_t actor() { return threads_before(*block) + static_cast<size_t>(self->id); }

// What this thread has done and seen, to those who take it. Not `all`: others know no more than
// that it is over.
void give(Handover* h, bool all = true) {
  all ? h->given.join(self->clock) : h->given.join_over(self->clock);
  self->clock.see(actor(), self->clock.seen(actor()) + 1);
}

// By the last of those who meet.
void pass_on(Handover* h) { h->taken = std::exchange(h->given, Clock()); }

void take(const Handover& h) { self->clock.join(h.taken); }

std::string name_of(size_t actor) {
  if (actor >= cluster->threads) return "a copy of many bytes";
  const Block& b = cluster->blocks[actor / block->fibers.size()];
  const Place& there = b.fibers[actor % block->fibers.size()].place;
  return "thread " + text(there.thread) + (&b == block ? "" : " of block " + text(there.block));
}

// What is wrong with an access to the shared memory of `b`, or nothing.
std::string race_in(Block* b, Access access, const void* at, int64_t bytes, const Actor& by) {
  const auto race = b->races.note(access, static_cast<const uint8_t*>(at) - b->shared, bytes, by);
  if (!race) return {};
  const char* const verbs[] = {"reads", "writes", "adds to"};
  const char* const past[] = {"read", "wrote", "added to"};
  return std::string("a race: ") + verbs[static_cast<int>(access)] + " byte " +
         std::to_string(race->at) + " of shared memory, which " + name_of(race->other) + " " +
         past[static_cast<int>(race->earlier)] + " with no " +
         (race->unfenced ? "shared_fence" : "barrier") + " in between";
}

void note(const char* op, Block* b, Access access, const void* at, int64_t bytes, const Actor& by) {
  const std::string race = race_in(b, access, at, bytes, by);
  if (!race.empty()) fault(std::string(op) + ": " + race);
}

void back_to_scheduler() { qkernels_switch(&self->stack_pointer, scheduler); }

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
    left = self->open_products.size();
    for (const auto& group : self->products) left += group.size();
    if (left != 0) fault("the thread ends with " + std::to_string(left) + " products under way");
  } catch (...) {
    failure = std::current_exception();
  }
  self->done = true;
  back_to_scheduler();
}

void start(Fiber* f, int stack) {
  // What qkernels_switch pops: six registers and the address to go to. A function starts 8 bytes
  // past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack_of(stack) + kStack) - 2;
  top[0] = reinterpret_cast<void*>(&fiber_main);
  top[1] = nullptr;
  f->stack_pointer = top - 6;
}

std::string deadlock() {
  std::ostringstream out;
  out << "deadlock in block " << text(block->fibers[0].place.block) << ":";
  size_t returned = 0;
  std::vector<std::pair<const char*, int>> waiting;
  for (const Block& b : cluster->blocks) {
    for (const Fiber& f : b.fibers) {
      if (f.done) {
        ++returned;
        continue;
      }
      auto at = std::find_if(waiting.begin(), waiting.end(),
                             [&](const auto& w) { return w.first == f.waits_in; });
      if (at == waiting.end()) at = waiting.insert(at, {f.waits_in, 0});
      ++at->second;
    }
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

void start_block(Block* b, dim3 grid, dim3 size, dim3 index) {
  std::fill(b->memory.begin(), b->memory.end(), kPoison);
  b->warps.assign(b->warps.size(), {});
  b->warpgroups.assign(b->warpgroups.size(), {});
  b->phases.clear();
  b->some.clear();
  b->arrived = 0;
  b->clocks = {};
  b->races = Races(b->shared_bytes);
  b->left = b->fibers.size();
  const int count = static_cast<int>(b->fibers.size());
  for (int i = 0; i < count; ++i) {
    Fiber& f = b->fibers[i];
    f = Fiber{};
    f.id = i;
    f.place = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)}, index, size, grid};
    f.clock.see(threads_before(*b) + static_cast<size_t>(i), 1);
    start(&f, b->rank * count + i);
  }
}

// The oldest copy in flight lands, once nobody can go on without it.
bool land_copy() {
  if (cluster->copies.empty()) return false;
  BulkCopy c = std::move(cluster->copies.front());
  cluster->copies.pop_front();
  // The copy is the barrier's doing: who waits for its phase has seen it.
  const Actor by{c.phases->actor, &c.clock, true};
  c.clock.see(by.id, static_cast<uint32_t>(c.phases->ended + 1));
  for (Block& b : cluster->blocks) {
    std::string race;
    if (b.holds(c.to)) race = race_in(&b, Access::write, c.to, c.bytes, by);
    if (race.empty() && b.holds(c.from)) race = race_in(&b, Access::read, c.from, c.bytes, by);
    if (!race.empty()) {
      throw std::runtime_error("emulator: a copy of many bytes: " + race + ", in block " +
                               text(b.fibers[0].place.block));
    }
  }
  c.phases->clocks.given.see(by.id, c.clock.seen(by.id));
  std::memcpy(c.to, c.from == nullptr ? &c.value : c.from, static_cast<size_t>(c.bytes));
  c.phases->bytes -= c.bytes;
  c.phases->end_if_complete();
  return true;
}

void run_cluster(bool backwards) {
  size_t left = 0;
  for (const Block& b : cluster->blocks) left += b.left;
  while (left > 0) {
    bool any = false;
    for (Block& b : cluster->blocks) {
      const size_t count = b.fibers.size();
      for (size_t i = 0; i < count; ++i) {
        Fiber& f = b.fibers[backwards ? count - 1 - i : i];
        if (f.done || (f.counter != nullptr && *f.counter == f.seen)) continue;
        f.counter = nullptr;
        any = true;
        block = &b;
        self = &f;
        qkernels_switch(&scheduler, f.stack_pointer);
        if (failure) std::rethrow_exception(failure);
        b.left -= f.done;
        left -= f.done;
      }
    }
    if (!any && !land_copy()) throw std::runtime_error("emulator: " + deadlock());
  }
  if (!cluster->copies.empty()) {
    throw std::runtime_error("emulator: " + std::to_string(cluster->copies.size()) +
                             " copies of many bytes are in flight when all threads have returned");
  }
  for (Block& b : cluster->blocks) {
    block = &b;
    check_red_zone();
  }
}

}  // namespace

void wait_for_previous() { waited = true; }

void check_waited() {
  if (!waited) throw std::runtime_error("emulator: a kernel that overlaps has waited for nothing");
}

void run(dim3 grid, dim3 size, int64_t shared_bytes, const std::function<void()>& thread) {
  run_clusters(grid, size, shared_bytes, 1, thread);
}

void run_clusters(dim3 grid, dim3 size, int64_t shared_bytes, unsigned together,
                  const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  waited = false;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kThreadLimit || threads % kWarp != 0) {
    throw std::runtime_error("emulator: a block has whole warps and 32 to 1024 threads, got " +
                             text(size));
  }
  if (grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulator: grid.y and grid.z go to 65535, got " + text(grid));
  }
  if (shared_bytes < 0 || shared_bytes > (sm90() ? kSharedLimit90 : kSharedLimit)) {
    throw std::runtime_error("emulator: some GPUs have 99 KiB of shared memory, got " +
                             std::to_string(shared_bytes) + " bytes");
  }
  if (together < 1 || grid.x % together != 0 || together > kClusterLimit) {
    throw std::runtime_error("emulator: a grid of " + text(grid) + " has no clusters of " +
                             std::to_string(together) + " blocks of " + text(size));
  }
  Cluster c;
  c.blocks.resize(together);
  c.threads = together * threads;
  for (unsigned rank = 0; rank < together; ++rank) {
    Block& b = c.blocks[rank];
    b.thread = &thread;
    b.rank = static_cast<int>(rank);
    b.fibers.resize(threads);
    b.warps.resize(threads / kWarp);
    b.warpgroups.resize((threads + 4 * kWarp - 1) / (4 * kWarp));
    b.memory.resize(static_cast<size_t>(shared_bytes + 2 * kRedZone + 1024));
    const uintptr_t base = reinterpret_cast<uintptr_t>(b.memory.data()) + kRedZone;
    b.shared = reinterpret_cast<uint8_t*>((base + 1023) / 1024 * 1024);
    b.shared_bytes = shared_bytes;
  }
  struct Reset {
    ~Reset() {
      cluster = nullptr;
      block = nullptr;
      self = nullptr;
      failure = nullptr;
    }
  } reset;
  cluster = &c;
  // Every other cluster runs its threads from the last to the first, so that an order which no
  // barrier enforces shows.
  bool backwards = false;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += together, backwards = !backwards) {
        c.actors = c.threads;
        c.clocks = {};
        for (Block& b : c.blocks) start_block(&b, grid, size, {x + b.rank, y, z});
        run_cluster(backwards);
      }
    }
  }
}

int multiprocessors() {
  const char* count = std::getenv("QKERNELS_HOST_MULTIPROCESSORS");
  return count == nullptr ? 4 : std::atoi(count);
}

bool sm90() {
  const char* given = std::getenv("QKERNELS_HOST_SM90");
  return given != nullptr && std::atoi(given) != 0;
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

void reads(const char* op, const void* at, int64_t bytes) {
  note(op, block, Access::read, at, bytes, {actor(), &self->clock});
}

void writes(const char* op, const void* at, int64_t bytes) {
  note(op, block, Access::write, at, bytes, {actor(), &self->clock});
}

void adds(const char* op, const void* at, int64_t bytes) {
  note(op, block, Access::add, at, bytes, {actor(), &self->clock});
}

void sync_threads() {
  give(&block->clocks);
  if (++block->arrived == block->fibers.size()) {
    block->arrived = 0;
    ++block->barriers;
    pass_on(&block->clocks);
  } else {
    wait_for(&block->barriers, "__syncthreads");
  }
  take(block->clocks);
}

// Other instructions of a warp do not order memory.
void sync_warp() {
  Handover* const clocks = &block->warps[self->id / kWarp].clocks;
  give(clocks);
  meet("__syncwarp", nullptr, [clocks](void* const*) { pass_on(clocks); });
  take(*clocks);
}

namespace {

template <int kCount>
void meet_in(Meeting<kCount>* m, const char* op, void* mine,
             const std::function<void(void* const*)>& whole) {
  if (m->arrived != 0 && std::strcmp(m->op, op) != 0) {
    fault(std::string("this thread is in ") + op + " but others of its " +
          (kCount == kWarp ? "warp" : "warpgroup") + " are in " + m->op);
  }
  m->op = op;
  m->lanes[self->id % kCount] = mine;
  if (++m->arrived == kCount) {
    whole(m->lanes);
    m->arrived = 0;
    ++m->meetings;
  } else {
    wait_for(&m->meetings, op);
  }
}

}  // namespace

void meet(const char* op, void* mine, const std::function<void(void* const*)>& whole) {
  meet_in(&block->warps[self->id / kWarp], op, mine, whole);
}

void meet_warpgroup(const char* op, void* mine, const std::function<void(void* const*)>& whole) {
  meet_in(&block->warpgroups[self->id / (4 * kWarp)], op, mine, whole);
}

// ---- sm_90 --------------------------------------------------------------------------------------

namespace {

Phases& phases_at(const char* op, const uint64_t* at, int rank) {
  check_shared(op, at, 8);
  const int64_t offset = reinterpret_cast<const uint8_t*>(at) - block->shared;
  Block& there = cluster->blocks.at(static_cast<size_t>(rank));
  const auto found = there.phases.find(offset);
  if (found == there.phases.end()) fault(std::string(op) + " of a barrier that is not set up");
  if (there.left == 0) fault(std::string(op) + " in a block that has ended");
  return found->second;
}

void arrive(Phases* p, bool all) {
  if (p->missing == 0) fault("more threads arrive at a barrier than it was set up for");
  give(&p->clocks, all);
  --p->missing;
  p->end_if_complete();
}

}  // namespace

void barrier_init(uint64_t* at, int count) {
  check_alignment("barrier_init", at, 8);
  Phases& p = block->phases[reinterpret_cast<const uint8_t*>(at) - block->shared];
  p.count = p.missing = count;
  p.actor = cluster->actors++;
}

void barrier_arrive(uint64_t* at, int rank) {
  arrive(&phases_at("barrier_arrive", at, rank), false);
}

void barrier_arrive(uint64_t* at) { arrive(&phases_at("barrier_arrive", at, block->rank), true); }

void barrier_expect(uint64_t* at, int bytes) {
  Phases& p = phases_at("barrier_expect", at, block->rank);
  p.bytes += bytes;
  arrive(&p, true);
}

void barrier_wait(uint64_t* at, uint32_t parity) {
  const Phases& p = phases_at("barrier_wait", at, block->rank);
  while ((p.ended & 1) == parity) wait_for(&p.ended, "barrier_wait");
  take(p.clocks);
}

int cluster_rank() { return block->rank; }

void sync_cluster() {
  size_t all = 0;
  for (const Block& b : cluster->blocks) all += b.fibers.size();
  give(&cluster->clocks, false);
  if (++cluster->arrived == all) {
    cluster->arrived = 0;
    ++cluster->barriers;
    pass_on(&cluster->clocks);
  } else {
    wait_for(&cluster->barriers, "cluster_sync");
  }
  take(cluster->clocks);
}

void sync_some(int number, int count) {
  Some& s = block->some[number];
  give(&s.clocks);
  if (++s.arrived == count) {
    s.arrived = 0;
    ++s.meetings;
    pass_on(&s.clocks);
  } else {
    wait_for(&s.meetings, "sync_some");
  }
  take(s.clocks);
}

void shared_fence() { self->clock.fence(); }

// As with cp_async, the destination is poison until the bytes are read, which is as late as can be.
void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier, uint32_t blocks) {
  check_shared("copy_bulk", to, bytes);
  check_alignment("copy_bulk", to, 16);
  check_alignment("copy_bulk", from, 16);
  if (bytes <= 0 || bytes % 16 != 0) fault("copy_bulk of " + std::to_string(bytes) + " bytes");
  const int64_t offset = static_cast<uint8_t*>(to) - block->shared;
  for (size_t rank = 0; rank < cluster->blocks.size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    uint8_t* const there = cluster->blocks[rank].shared + offset;
    std::memset(there, kPoison, static_cast<size_t>(bytes));
    cluster->copies.push_back({there,
                               from,
                               bytes,
                               &phases_at("copy_bulk", barrier, static_cast<int>(rank)),
                               {},
                               self->clock});
  }
}

// The destination is poison until the bytes land, too.
void store_async(void* to, uint4 v, uint64_t* barrier, int rank) {
  check_shared("store_async_128", to, 16);
  check_alignment("store_async_128", to, 16);
  Phases* const phases = &phases_at("store_async_128", barrier, rank);
  uint8_t* const there = cluster->blocks[static_cast<size_t>(rank)].shared +
                         (static_cast<uint8_t*>(to) - block->shared);
  std::memset(there, kPoison, 16);
  cluster->copies.push_back({there, nullptr, 16, phases, v, self->clock});
}

void copy_to_block(void* to, const void* from, int bytes, uint64_t* barrier, int rank) {
  check_shared("copy_to_block", to, bytes);
  check_shared("copy_to_block", from, bytes);
  check_alignment("copy_to_block", to, 16);
  check_alignment("copy_to_block", from, 16);
  if (bytes <= 0 || bytes % 16 != 0) fault("copy_to_block of " + std::to_string(bytes) + " bytes");
  const int64_t offset = static_cast<uint8_t*>(to) - block->shared;
  uint8_t* const there = cluster->blocks.at(static_cast<size_t>(rank)).shared + offset;
  std::memset(there, kPoison, static_cast<size_t>(bytes));
  cluster->copies.push_back(
      {there, from, bytes, &phases_at("copy_to_block", barrier, rank), {}, self->clock});
}

uint64_t shared_offset(const char* op, const void* at) {
  check_shared(op, at, 1);
  return static_cast<uint64_t>(static_cast<const uint8_t*>(at) - block->shared);
}

namespace {

// Each warp reads all of the matrix. The lanes of a warp go together here: its first one stands for
// all.
void note_matrix(int n, uint64_t descriptor, size_t by, const Clock* clock) {
  for (int column = 0; column < n; ++column) {
    // Two pieces of 16 bytes.
    for (int k = 0; k < 32; k += 16) {
      note("warpgroup_mma", block, Access::read, warpgroup_matrix(descriptor, column, k), 16,
           {by, clock, true});
    }
  }
}

void begin_product(const WarpgroupProduct& p) {
  if (lane() == 0) note_matrix(p.n, p.b, actor(), &self->clock);
  self->open_products.push_back(p);
}

}  // namespace

void warpgroup_mma(int32_t* sums, int n, const uint32_t (&a)[4], uint64_t b, bool add) {
  begin_product({sums, n, {a[0], a[1], a[2], a[3]}, b, add, nullptr});
}

void warpgroup_mma_16(float* sums, int n, const uint32_t (&a)[4], uint64_t b, bool add,
                      Widen widen) {
  begin_product({sums, n, {a[0], a[1], a[2], a[3]}, b, add, widen});
}

void warpgroup_commit() {
  self->products.push_back(std::move(self->open_products));
  self->open_products.clear();
}

void warpgroup_wait(int pending) {
  while (static_cast<int>(self->products.size()) > pending) {
    const std::vector<WarpgroupProduct> group = std::move(self->products.front());
    self->products.pop_front();
    for (const WarpgroupProduct& p : group) {
      meet_warpgroup("warpgroup_mma", const_cast<WarpgroupProduct*>(&p), [](void* const* lanes) {
        multiply_warpgroup(reinterpret_cast<const WarpgroupProduct* const*>(lanes));
      });
      // Reading ends here: who overwrites the matrix has to come later.
      if (lane() == 0) note_matrix(p.n, p.b, actor(), &self->clock);
    }
  }
}

// ---- Copies in flight ---------------------------------------------------------------------------
// The source is read when the copy lands, which is as late as can be, and the destination is
// poisoned until then: who reads too early or overwrites the source too early gets it wrong.

void copy_async(void* to, const void* from, int bytes, int valid) {
  check_alignment("cp_async", to, bytes);
  if (valid < 0 || valid > bytes) fault("cp_async of " + std::to_string(valid) + " valid bytes");
  if (valid > 0) check_alignment("cp_async", from, bytes);
  writes("cp_async", to, bytes);
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
      writes("cp_async", c.to, c.bytes);
      std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      if (c.valid > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    }
    self->groups.pop_front();
  }
}

}  // namespace qkernels::host

// ---- Plain loads and stores ---------------------------------------------------------------------
// g++ calls these for each of them, as it would call the runtime of ThreadSanitizer, which is not
// there.

namespace {

void plain(qkernels::host::Access access, const void* at, int64_t bytes) {
  using namespace qkernels::host;
  if (block == nullptr || !block->holds(at)) return;
  // The caller is compiled as if this could not throw: the thread ends here.
  try {
    check_shared("a load or store", at, bytes);
    const std::string race = race_in(block, access, at, bytes, {actor(), &self->clock});
    if (race.empty()) return;
    fault(race);
  } catch (...) {
    failure = std::current_exception();
  }
  back_to_scheduler();
}

}  // namespace

#define QK_PLAIN(bytes)                                                                      \
  extern "C" void __tsan_read##bytes(void* at) { plain(Access::read, at, bytes); }           \
  extern "C" void __tsan_write##bytes(void* at) { plain(Access::write, at, bytes); }         \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { plain(Access::read, at, bytes); } \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { plain(Access::write, at, bytes); }

using qkernels::host::Access;
QK_PLAIN(1)
QK_PLAIN(2)
QK_PLAIN(4)
QK_PLAIN(8)
QK_PLAIN(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  plain(Access::read, at, static_cast<int64_t>(bytes));
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  plain(Access::write, at, static_cast<int64_t>(bytes));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
// Of a tensor's reference count, in code that launches kernels.
extern "C" int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
