// Races in shared memory: two accesses to a byte by different actors, one of them a write, and
// nothing that orders them. The emulator runs threads one after the other, so it would not come to
// grief over one; a GPU would.
//
// An actor is a thread, or a barrier for which copies land. Each has a clock: how far it knows
// every actor to have come (vector clocks, Mattern 1989). A barrier hands clocks on, and an access
// that the clock of the one who comes later does not cover is a race. Bytes remember their last
// write and the reads since then, as in FastTrack (Flanagan and Freund, 2009).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace qkernels::host {

class Clock {
 public:
  // What is over: what was read may be overwritten.
  uint32_t over(size_t actor) const { return at(over_, actor); }
  // What is over and can be seen: what was written may be read.
  uint32_t seen(size_t actor) const { return at(seen_, actor); }
  // What of it the asynchronous proxy sees too: products of a warpgroup and copies of many bytes
  // read and write shared memory another way than loads and stores do.
  uint32_t fenced(size_t actor) const { return at(fenced_, actor); }

  void see(size_t actor, uint32_t time);
  void fence() { fenced_ = seen_; }
  void join(const Clock& other);
  // By way of a barrier that promises nothing about what was written.
  void join_over(const Clock& other);

 private:
  static uint32_t at(const std::vector<uint32_t>& times, size_t actor) {
    return actor < times.size() ? times[actor] : 0;
  }
  std::vector<uint32_t> over_, seen_, fenced_;  // of the first actors; 0 for the others
};

enum class Access { read, write, add };

// `other` was at byte `at` before.
struct Race {
  int64_t at;
  size_t other;
  Access earlier;
  bool unfenced;  // a barrier is in between, but the asynchronous proxy sees no further
};

struct Actor {
  size_t id;
  const Clock* clock;
  bool asynchronous = false;  // goes by the asynchronous proxy
};

// Of a block's shared memory.
class Races {
 public:
  explicit Races(int64_t bytes = 0) : words_(static_cast<size_t>((bytes + 3) / 4)) {}

  // Notes an access, unless it is a race.
  std::optional<Race> note(Access access, int64_t at, int64_t bytes, const Actor& actor);

 private:
  struct Past {
    uint32_t time = 0;  // 0: none
    uint32_t next = 0;  // in more_
    uint16_t actor = 0;
    bool generic = true, add = false;
  };
  struct Cell {
    Past write, read;
  };
  // Four bytes have one story until somebody takes fewer of them.
  struct Word {
    Cell cell;
    uint32_t split = 0;  // the first of four in bytes_, or 0
  };
  std::optional<Race> note_in(Cell* cell, Access access, int64_t at, const Actor& actor);
  Cell* split(Word* word);
  uint32_t copy(uint32_t reads);

  std::vector<Word> words_;
  std::vector<Cell> bytes_{1};
  std::vector<Past> more_{1};  // reads beyond a cell's first
};

}  // namespace qkernels::host
