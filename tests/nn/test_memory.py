"""Memory: one copy of a weight, and no more than one layer above the float model at any time."""

import gc
import subprocess
import sys
import weakref

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk


class PeakBytes(TorchDispatchMode):
    """Bytes of storages that ops allocate while it is on, at any one time."""

    def __init__(self, freed):
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen = set()
        for storage in freed:
            self._watch(storage, count=False)

    def _watch(self, storage, count=True):
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        size = storage.nbytes()
        if count:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._watch(tensor.untyped_storage())
        return out


# One of each kind of weight is enough here; collecting garbage takes most of the time.
KINDS = pytest.mark.parametrize("scheme", [qk.W8A8(), qk.W4A16(group_size=16), qk.NF4()], ids=str)


def model_of(layers, width):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def peak_while(action, model):
    gc.collect()
    storages = [p.untyped_storage() for p in model.parameters()]
    tracker = PeakBytes(storages)
    del storages
    with tracker:
        action()
    gc.collect()
    return tracker


@KINDS
def test_quantizing_needs_no_more_than_the_float_model_and_one_layer(scheme):
    width, layers = 256, 8
    model = model_of(layers, width)
    layer = width * width * 4
    tracker = peak_while(lambda: qk.quantize_(model, scheme), model)
    assert tracker.peak <= layer
    packed = sum(p.nbytes for p in model.parameters())
    assert tracker.live == packed - layers * layer


@KINDS
def test_dequantizing_needs_no_more_than_the_float_model_and_one_layer(scheme):
    width, layers = 256, 8
    model = model_of(layers, width)
    qk.quantize_(model, scheme)
    tracker = peak_while(lambda: qk.dequantize_(model), model)
    assert tracker.peak <= (layers + 1) * width * width * 4


def test_resident_bytes_are_the_packed_weights(scheme):
    model = nn.Sequential(nn.Embedding(1000, 256), *model_of(4, 256))
    qk.quantize_(model, scheme)
    gc.collect()
    bits = 8 if scheme.format == "int8" else 4
    ideal = (1000 * 256 + 4 * 256 * 256) * bits / 8
    held = sum(p.nbytes for p in model.parameters())
    assert held < ideal * (1.5 if scheme.group_size > 0 else 1.1)
    assert not list(model.buffers())


def test_resident_memory_of_the_process():
    """In a fresh process, since the allocator of this one holds on to what other tests freed."""
    script = """
import threading, time, psutil, torch
from torch import nn
import qkernels as qk
process = psutil.Process()
def rss(): return process.memory_info().rss
width, layers = 2048, 8
qk.quantize_(nn.Sequential(nn.Linear(64, 64)), qk.W4A16(32))
model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
for p in model.parameters(): p.data.normal_()
before = rss()
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, rss())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
qk.quantize_(model, qk.W8A8())
stop = True
thread.join()
layer = width * width * 4
print((peak - before) / layer, (rss() - before) / layer)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    peak, after = map(float, result.stdout.split())
    assert peak < 1.25
    # Eight layers of 16 MB have become eight of 4 MB. glibc keeps up to two layers for itself.
    assert after < -8 * 0.75 + 3
