"""Memory of a quantized model: what stays resident, and the peak while it is made."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from qkernels.bench import own
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import ModelEngine
from qkernels.bench.peers import load_peers
from qkernels.bench.results import Record, Result
from qkernels.report.size import model_bytes

_LAYERS, _FEATURES = 8, 4096
# Peers that convert any model; onnxruntime and OpenVINO would need it exported.
_PEERS = ("torch_ao", "bitsandbytes")


def units(bench: Bench) -> Iterator[Unit]:
    if not bench.quick:
        yield "memory", lambda: _memory(bench)


def _engines() -> list[ModelEngine]:
    ours = [e for e in own.model_engines() if e.name.endswith("fp32")]
    return [*ours, *load_peers(_PEERS).models()]


def _memory(bench: Bench) -> list[Record]:
    record = bench.record("memory", "memory", {"layers": _LAYERS, "features": _FEATURES})
    for engine in bench.chosen(_engines()):
        command = [sys.executable, "-m", __name__, engine.name]
        # A process of its own, or what another engine freed would be counted as this one's.
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            bench.skip(engine.name, "memory", RuntimeError(done.stderr.strip()[-300:]))
            continue
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        seconds = found.pop("seconds")
        record.results.append(
            Result(engine.name, engine.kind, engine.own, seconds, seconds, 0.0, 1, 0.0, extra=found)
        )
        bench.say(
            f"  memory {engine.name}: resident {found['resident'] / 2**20:.0f} MiB of "
            f"{found['stored'] / 2**20:.0f} MiB stored, peak {found['peak'] / 2**20:+.0f} MiB over "
            f"the float model"
        )
    return [record]


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {field}")


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def convert_and_measure(name: str) -> dict[str, float]:
    """Convert a stack of layers with an engine and watch this process's memory.

    Args:
        name: of a model engine.

    Returns:
        Bytes: "float" and "stored" of the models, "layer" of one float layer, "resident" that the
        converted model added to the process, "peak" above the float model while converting; and
        "seconds" of the conversion.
    """
    engine = next(e for e in _engines() if e.name == name)
    with torch.no_grad():
        # Whatever is loaded and allocated once is there before anything is measured.
        engine.convert(nn.Sequential(nn.Linear(256, 256)))(torch.randn(1, 256))
        before = _resident()
        model = nn.Sequential(*(nn.Linear(_FEATURES, _FEATURES) for _ in range(_LAYERS)))
        float_bytes, layer = model_bytes(model), model_bytes(model[0])
        with_float = _resident()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        start = time.perf_counter()
        made = engine.convert(model)
        seconds = time.perf_counter() - start
        peak = _status("VmHWM") - with_float
        del model
        return {
            "float": float_bytes,
            "layer": layer,
            "stored": model_bytes(made),
            "resident": _resident() - before,
            "peak": peak,
            "seconds": seconds,
        }


if __name__ == "__main__":
    print(json.dumps(convert_and_measure(sys.argv[1])))
