"""Threads: large calls use torch's own, small calls start none, and callers may have several."""

import functools
import json
import threading

import pytest
import torch

from helpers.check import same_tensor
from helpers.data import INTEGER_KINDS, KINDS, floats, weight
from helpers.process import run_python

ops = torch.ops.qkernels

# Counts threads of the process and CPU time that each has used, from /proc.
TASKS = """
import json, os, sys, time, torch, qkernels
from pathlib import Path
from helpers.data import KINDS, floats, weight

ops = torch.ops.qkernels

def tasks():
    used = {}
    for task in Path("/proc/self/task").iterdir():
        used[task.name] = int((task / "schedstat").read_text().split()[0])
    return used

torch.set_num_threads(int(sys.argv[1]))
small, large = weight(KINDS[4], 64, 64, 32), weight(KINDS[4], 512, 2048, 128)
x, big, grad = floats((1, 64)), floats((32, 2048)), floats((32, 512))
one, table = torch.tensor(1.0), torch.zeros(256, dtype=torch.int8)
images = [torch.zeros(1, 64, n, n, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
          for n in (8, 160)]
image = lambda w: images[w is large]
calls = {
    "linear float": lambda w, x: w.linear(x),
    "linear int8": lambda w, x: w.linear(x, activation=1),
    "gradient": lambda w, x: ops.linear_backward_input(grad[:, :w.n], w.packed, *w.sizes),
    "quantize": lambda w, x: ops.quantize(x, 0),
    "fake_quantize": lambda w, x: ops.fake_quantize(x, 0),
    "fake_quantize_backward": lambda w, x: ops.fake_quantize_backward(
        x, x, torch.ones(len(x), 1), None, 0),
    "embedding": lambda w, x: ops.embedding(
        torch.arange(64), w.packed, w.layout, w.n, w.k, w.group_size, torch.float32),
    "unpack": lambda w, x: ops.unpack(w.packed, *w.sizes),
    "max_pool": lambda w, x: ops.max_pool(image(w), [3, 3], [1, 1], [1, 1], [1, 1], False),
    "avg_pool": lambda w, x: ops.avg_pool(
        image(w), one, None, one, None, [3, 3], [1, 1], [1, 1], False, True, None),
    "add": lambda w, x: ops.add(image(w), image(w), one, None, one, None, one, None, 0),
    "lookup": lambda w, x: ops.lookup(image(w), table),
    "concat": lambda w, x: ops.concat([image(w)] * 2, torch.ones(2), None, one, None, 1),
}
before = len(tasks())
for _ in range(20):
    for call in calls.values():
        call(small, x)
after_small = len(tasks())
shares = {}
for name, call in calls.items():
    call(large, big)  # starts the threads
    start, end = tasks(), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        call(large, big)
    shares[name] = sorted(used - start.get(task, 0) for task, used in tasks().items())[::-1]
print(json.dumps({"before": before, "after_small": after_small, "shares": shares}))
"""


@functools.cache
def measured(threads: int) -> dict:
    # A thread that waits shall sleep, or its time would look like work.
    return json.loads(run_python("-c", TASKS, threads, OMP_WAIT_POLICY="passive").stdout)


def test_small_calls_start_no_thread() -> None:
    """Layers of a few thousand weights would pay more for waking a thread than for the work."""
    found = measured(2)
    assert found["after_small"] == found["before"]


def test_large_calls_use_as_many_threads_as_torch() -> None:
    for name, used in measured(2)["shares"].items():
        # Nanoseconds of CPU time, by thread.
        assert used[1] > 0.1 * used[0], f"{name}: {used}"
        assert sum(t > 0.02 * used[0] for t in used) == 2, f"{name}: {used}"


def test_one_thread_means_one() -> None:
    for name, used in measured(1)["shares"].items():
        assert all(t == 0 for t in used[1:]), f"{name}: {used}"


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_python_threads(threads: int) -> None:
    """Workspaces belong to the calling thread; no call may see another's numbers."""
    weights = [weight(kind, 200, 256, 64) for kind in KINDS]
    inputs = [(floats((m, 256), seed=m), floats((m, 200), seed=m)) for m in (1, 7, 33)]

    def results() -> list[torch.Tensor]:
        found = []
        for w in weights:
            for x, grad in inputs:
                found.append(w.linear(x, activation=int(w.kind in INTEGER_KINDS)))
                found.append(ops.linear_backward_input(grad, w.packed, *w.sizes))
        return found

    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = results()
        found: list[list[torch.Tensor]] = []
        workers = [
            threading.Thread(target=lambda: found.extend(results() for _ in range(10)))
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(count)
    assert len(found) == 40
    for got in found:
        for a, b in zip(got, want, strict=True):
            same_tensor(a, b)
