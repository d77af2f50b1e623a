"""What times calls: a GPU, or a CPU in a rehearsal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from qkernels import _C


class Gpu:
    """Times calls on the current GPU."""

    device = "cuda"

    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)

    def is_hopper(self) -> bool:
        """Whether it runs code of sm_90a, and the library has that."""
        return torch.cuda.get_device_capability()[0] == 9 and bool(_C.build_info()["hopper"])

    def seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 15) -> float:
        """Median time of one of the calls.

        Args:
            calls: do the same with different copies of their data.
            rounds: how often all of them are timed.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        turns = max(1, 16 // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for call in calls:
                    call()
        graph.replay()
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / (turns * len(calls)))
        return float(statistics.median(times))


class Rehearsal:
    """Runs every call once, on the CPU; its times mean nothing."""

    device = "cpu"

    def cache_bytes(self) -> int:
        """Two copies of everything small."""
        return 1 << 12

    def is_hopper(self) -> bool:
        """Yes: what is for Hopper alone is rehearsed too."""
        return True

    def seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 1) -> float:
        """Time of one of the calls, for what it is worth.

        Args:
            calls: to run.
            rounds: how often.
        """
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return (time.perf_counter() - start) / (rounds * len(calls))
