"""One way to time things: warm up, interleave the contenders in one process, take medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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
