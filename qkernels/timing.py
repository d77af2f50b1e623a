"""One way to time things: warm up, interleave the contenders in one process, take medians."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """The sorted times of one callable.

    Args:
        samples: seconds of every timed call, in ascending order.

    Example:
        >>> Timing((1.0, 2.0, 3.0)).median
        2.0
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def min(self) -> float:
        return self.samples[0]

    @property
    def iqr(self) -> float:
        """The width of the middle half of the samples: how far the median can be trusted."""
        return self.quantile(0.75) - self.quantile(0.25)

    def quantile(self, q: float) -> float:
        """The q-quantile (0 to 1), linear between the two samples around it."""
        position = q * (len(self.samples) - 1)
        low = int(position)
        high = min(low + 1, len(self.samples) - 1)
        return self.samples[low] + (position - low) * (self.samples[high] - self.samples[low])

    def to_dict(self) -> dict[str, float | int]:
        """Median, minimum, spread (seconds) and the number of samples."""
        return {
            "median_s": self.median,
            "min_s": self.min,
            "iqr_s": self.iqr,
            "samples": len(self.samples),
        }


@dataclass(frozen=True)
class Ratio:
    """The time of one model over that of another.

    Args:
        median: of the rounds.
        low, high: the median of all rounds there could be lies between them in 95 % of cases.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Ratio:
        """From the ratio in every round.

        Args:
            rounds: at least one.

        Example:
            >>> Ratio.of([1.0, 1.2, 1.1])
            Ratio(median=1.1, low=1.0, high=1.2)
        """
        ordered = sorted(rounds)
        count = len(ordered)
        # How many rounds lie below the median is binomial: n/2, give or take sqrt(n)/2.
        below = max(math.floor((count - 1.96 * math.sqrt(count)) / 2), 0)
        return cls(statistics.median(ordered), ordered[below], ordered[count - 1 - below])


def take_turns(
    calls: Mapping[str, Callable[[], T]], seconds: float, min_rounds: int, max_rounds: int
) -> Iterator[dict[str, T]]:
    """Call each of several callables once in every round, and hand on what they return.

    What runs leaves its data in the caches, which the next one feels. So the order is drawn anew
    for two rounds, and reversed for the second: each follows every other one, and as often as it
    goes ahead of it.

    Args:
        calls: by name.
        seconds: after which no further round starts.
        min_rounds: at least, even if they take longer.
        max_rounds: at most.

    Returns:
        For each round, what was returned, by name.

    Example:
        >>> rounds = list(take_turns({"a": lambda: 1, "b": lambda: 2}, 0.0, 3, 9))
        >>> len(rounds), rounds[0]["b"]
        (3, 2)
    """
    names, draw = list(calls), random.Random(0)
    end = clock() + seconds
    for turn in range(max_rounds):
        if turn >= min_rounds and clock() >= end:
            return
        if turn % 2:
            names.reverse()
        else:
            draw.shuffle(names)
        yield {name: calls[name]() for name in names}


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 50,
    budget: float = 2.0,
) -> dict[str, Timing]:
    """Time several callables against each other in one process.

    Every round calls each contender once and the order turns by one place from round to round, so
    that clock changes, other processes and warm caches meet all of them alike. CUDA work is
    synchronized inside the timed region.

    Args:
        contenders: name to callable without arguments.
        warmup: untimed rounds first.
        min_rounds: timed rounds at least, even if they exceed the budget.
        max_rounds: timed rounds at most.
        budget: seconds after which no further round starts.

    Returns:
        One `Timing` for each contender, in the given order.

    Raises:
        ValueError: no contender, a negative warmup, or less than one round.

    Example:
        >>> times = interleave({"list": lambda: [0] * 9, "tuple": lambda: (0,) * 9}, budget=0.01)
        >>> list(times)
        ['list', 'tuple']
    """
    if not contenders:
        raise ValueError("interleave: contenders is empty; pass at least one callable")
    if warmup < 0 or not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            f"interleave: expected warmup >= 0 and 1 <= min_rounds <= max_rounds, got "
            f"warmup={warmup}, min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    names = list(contenders)
    for _ in range(warmup):
        for name in names:
            _time_once(contenders[name])
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + budget
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() >= deadline:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_time_once(contenders[name]))
    return {name: Timing(tuple(sorted(times))) for name, times in samples.items()}


def clock() -> float:
    """Seconds of a clock that only goes forward, read when all work given to a device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_once(call: Callable[[], object]) -> float:
    start = clock()
    result = call()
    elapsed = clock() - start
    del result  # freed outside the timed region: deallocation is not part of an answer's latency
    return elapsed
