"""How the suite times: in turns, on a machine that leaves it alone, with warm memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkernels.timing import Timing, interleave

# A contender this much slower than the fastest of its kind has lost; it keeps its first samples.
HOPELESS = 8.0
# Seconds of a call from which on one is enough to see that.
LONG = 0.3
# A turn in which threads waited longer than this share of it for a core is timed again, so often.
DISTURBED = 0.05
ATTEMPTS = 4


@dataclass(frozen=True)
class Effort:
    """How long to measure a case.

    Args:
        min_rounds: rounds at least; in a round every contender has one turn.
        max_rounds: rounds at most.
        budget: seconds after which no further round starts.
        turn: seconds of a turn, which holds at least one and at most `max_calls` timed calls.
        max_calls: see `turn`.
        warm: seconds for calling a contender's further copies before it is timed.
    """

    min_rounds: int = 5
    max_rounds: int = 15
    budget: float = 2.0
    turn: float = 0.01
    max_calls: int = 20
    warm: float = 2.0


FULL = Effort()
QUICK = Effort(min_rounds=3, max_rounds=6, budget=0.6, turn=0.005, max_calls=10, warm=0.05)


@dataclass(frozen=True)
class Measured:
    """What a contender's calls took.

    Args:
        timing: seconds of every timed call.
        faults: minor page faults of a call, the median over the turns.
        waited: how long this process's threads waited for a core, as a share of the time, the
            median over the turns: other work on the machine, or a pool with too many threads.
    """

    timing: Timing
    faults: float
    waited: float


def rotate(calls: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """One callable that passes its arguments to each of several in turn.

    Where each holds a copy of the weights, no copy is still in a cache when its turn comes again.

    Example:
        >>> turn = rotate([lambda: "a", lambda: "b"])
        >>> turn(), turn(), turn()
        ('a', 'b', 'a')
    """
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls).__next__
    return lambda *args: following()(*args)


def settle(limit: float = 1.0) -> None:
    """Wait until the threads that another library left spinning sleep, at most `limit` seconds.

    Thread pools spin for a while after their work to be ready for more. On a machine with few cores
    that would be charged to whoever is timed next.
    """
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(0.005)  # the time of other threads counts in ticks of 4 ms
        if time.process_time() - used < 0.2 * (time.perf_counter() - start):
            return


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory instead of returning it to the system.

    Otherwise every large result is paged in anew, by whichever library allocates it, and the time
    of a product is half page faults. Both sides of a comparison live in this process and get the
    same.

    Returns:
        False where the C library has no such setting.
    """
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if not hasattr(library, "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, 2**31 - 1))


def measure(
    contenders: Mapping[str, Callable[[], object]],
    effort: Effort = FULL,
    *,
    kinds: Mapping[str, str] | None = None,
    each_round: Callable[[], None] | None = None,
) -> dict[str, Measured]:
    """Time contenders in turns, in one process.

    A round gives every contender a turn, the order moving on by one from round to round. A turn
    waits for other thread pools to sleep, makes untimed calls that wake the contender's own threads
    and caches, and then times a few calls in a row. Where the system says how long threads waited
    for a core (Linux's schedstat), a turn that other work disturbed is timed again.

    Args:
        contenders: name to callable without arguments; at least one.
        effort: how long.
        kinds: contender to kind. One that takes more than 8 times as long as the fastest of its
            kind is left out of further rounds.
        each_round: called once in every round, to sample what the contenders are compared with.

    Returns:
        What each contender's calls took, in the given order.

    Example:
        >>> times = measure({"a": lambda: sum(range(10)), "b": lambda: sum(range(99))}, QUICK)
        >>> list(times)
        ['a', 'b']
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[float]] = {name: [] for name in names}
    waited: dict[str, list[float]] = {name: [] for name in names}
    usual = {name: _once(contenders[name]) for name in names}
    # One short call may have met a sleeping thread pool; a long one tells enough.
    hopeful = _without_hopeless({name: [usual[name]] for name in names}, kinds or {})
    running = [name for name in names if name in hopeful or usual[name] < LONG]
    deadline = time.perf_counter() + effort.budget
    for turn in range(effort.max_rounds):
        if turn >= effort.min_rounds and time.perf_counter() >= deadline:
            break
        if each_round is not None:
            settle()
            each_round()
        first = turn % len(running)
        for name in running[first:] + running[:first]:
            best = _undisturbed(contenders[name], usual[name], effort)
            samples[name] += best.samples
            faults[name].append(best.faults)
            waited[name].append(best.waited)
            usual[name] = statistics.median(samples[name])
        if turn == 1:
            running = _without_hopeless(samples, kinds or {})
    return {
        name: Measured(
            Timing(tuple(sorted(samples[name] or [usual[name]]))),
            statistics.median(faults[name] or [0.0]),
            statistics.median(waited[name] or [0.0]),
        )
        for name in names
    }


def _once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    settle()
    return interleave({"": call}, warmup=0, min_rounds=1, max_rounds=1)[""].median


@dataclass(frozen=True)
class _Turn:
    samples: list[float]
    faults: float  # of a call
    waited: float  # for a core, as a share of the time


def _undisturbed(call: Callable[[], object], usual: float, effort: Effort) -> _Turn:
    """The first turn that nothing disturbed, or of several the one that was disturbed least.

    A call that takes longer than the system's time slices is always interrupted a little, and a
    share of its time is what it loses: it has one turn.
    """
    attempts = [_turn(call, usual, effort)]
    while usual < LONG and attempts[-1].waited > DISTURBED and len(attempts) < ATTEMPTS:
        time.sleep(0.02)
        attempts.append(_turn(call, usual, effort))
    return min(attempts, key=lambda turn: turn.waited)


def _turn(call: Callable[[], object], usual: float, effort: Effort) -> _Turn:
    settle()
    # Waking threads and caches costs a call that takes long next to nothing.
    warmup = 0 if usual > effort.turn else max(1, min(3, int(0.001 / usual)))
    calls = max(1, min(effort.max_calls, int(effort.turn / usual)))
    # No garbage collection inside a timed call.
    gc.disable()
    try:
        waits, start = _waits(), time.perf_counter()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        timing = interleave(
            {"": call}, warmup=warmup, min_rounds=calls, max_rounds=calls, budget=0.0
        )[""]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        # A thread that ended in between takes its count with it.
        waited = max(0.0, _waits() - waits) / (time.perf_counter() - start)
    finally:
        gc.enable()
    return _Turn(list(timing.samples), faults / (warmup + calls), waited)


def _waits() -> float:
    """Seconds that the threads of this process were ready to run and had no core; 0 if unknown."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except (OSError, IndexError):  # the thread has just ended, or the system does not count
            continue
    return total * 1e-9


def _without_hopeless(
    samples: Mapping[str, Sequence[float]], kinds: Mapping[str, str]
) -> list[str]:
    fastest: dict[str, float] = {}
    taken = {name: min(times) for name, times in samples.items() if times}
    for name, time_of in taken.items():
        kind = kinds.get(name, name)
        fastest[kind] = min(fastest.get(kind, float("inf")), time_of)
    return [n for n, t in taken.items() if t <= HOPELESS * fastest[kinds.get(n, n)]]
