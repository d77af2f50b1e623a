#include "races.h"

#include <algorithm>

namespace qkernels::host {

namespace {

void join_times(std::vector<uint32_t>* times, const std::vector<uint32_t>& others) {
  if (times->size() < others.size()) times->resize(others.size());
  for (size_t i = 0; i < others.size(); ++i) (*times)[i] = std::max((*times)[i], others[i]);
}

}  // namespace

void Clock::see(size_t actor, uint32_t time) {
  for (std::vector<uint32_t>* times : {&over_, &seen_}) {
    if (times->size() <= actor) times->resize(actor + 1);
    (*times)[actor] = time;
  }
}

void Clock::join_over(const Clock& other) { join_times(&over_, other.over_); }

void Clock::join(const Clock& other) {
  join_over(other);
  join_times(&seen_, other.seen_);
  join_times(&fenced_, other.fenced_);
}

std::optional<Race> Races::note(Access access, int64_t at, int64_t bytes, const Actor& actor) {
  for (const int64_t end = at + bytes; at < end;) {
    Word& word = words_.at(static_cast<size_t>(at / 4));
    const bool whole = at % 4 == 0 && at + 4 <= end;
    if (whole && access == Access::write) {
      // All that is there has to be over, byte for byte; then it is one again.
      for (int i = 1; i < 4 && word.split != 0; ++i) {
        Cell byte = bytes_[word.split + i];
        if (const auto race = note_in(&byte, access, at + i, actor)) return race;
      }
      if (word.split != 0) word = {bytes_[word.split], 0};
    }
    if (whole && word.split == 0) {
      if (const auto race = note_in(&word.cell, access, at, actor)) return race;
      at += 4;
      continue;
    }
    Cell* const byte = split(&word) + at % 4;
    if (const auto race = note_in(byte, access, at, actor)) return race;
    ++at;
  }
  return {};
}

Races::Cell* Races::split(Word* word) {
  if (word->split == 0) {
    word->split = static_cast<uint32_t>(bytes_.size());
    bytes_.resize(bytes_.size() + 4);
    for (int i = 0; i < 4; ++i) {
      Cell& byte = bytes_[word->split + i] = word->cell;
      byte.read.next = copy(byte.read.next);
    }
  }
  return &bytes_[word->split];
}

uint32_t Races::copy(uint32_t reads) {
  if (reads == 0) return 0;
  Past past = more_[reads];
  past.next = copy(past.next);
  more_.push_back(past);
  return static_cast<uint32_t>(more_.size() - 1);
}

std::optional<Race> Races::note_in(Cell* cell, Access access, int64_t at, const Actor& actor) {
  const Clock& clock = *actor.clock;
  const uint16_t id = static_cast<uint16_t>(actor.id);
  const uint32_t now = clock.seen(id);
  const bool writes = access == Access::write, add = access == Access::add;
  // What is over may be overwritten by who cannot see it.
  const auto knows = [&](const Past& past, bool is_over) {
    const uint32_t time = is_over ? clock.over(past.actor) : clock.seen(past.actor);
    return past.actor == id || past.time <= time;
  };
  const Past& write = cell->write;
  if (!knows(write, writes)) return Race{at, write.actor, Access::write, false};
  if (!writes && actor.asynchronous && write.generic && write.time > clock.fenced(write.actor)) {
    return Race{at, write.actor, Access::write, true};
  }
  if (!writes && cell->read.actor == id && cell->read.time == now && cell->read.add == add) {
    return {};
  }
  // Reads may stand side by side, and so may additions.
  bool last = true;
  for (const Past* past = &cell->read; past->time != 0; past = &more_[past->next]) {
    const bool ordered = knows(*past, writes || !past->add);
    if (!ordered && (writes || past->add != add)) {
      return Race{at, past->actor, past->add ? Access::add : Access::read, false};
    }
    last = last && ordered && past->add == add;
  }
  const Past mine{now, 0, id, !actor.asynchronous, add};
  if (writes) {
    *cell = {mine, {}};
    return {};
  }
  if (last) {
    cell->read = mine;
    return {};
  }
  for (Past* past = &cell->read; past->time != 0; past = &more_[past->next]) {
    if (past->actor == id && past->add == add) {
      past->time = now;
      return {};
    }
  }
  more_.push_back(cell->read);
  cell->read = mine;
  cell->read.next = static_cast<uint32_t>(more_.size() - 1);
  return {};
}

}  // namespace qkernels::host
