"""quantize and dequantize, against the machine's copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qkernels.bench import own
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import CodecEngine, verified
from qkernels.bench.results import Record

SIZES = ((4096, 4096), (1, 4096))


def units(bench: Bench) -> Iterator[Unit]:
    for rows, features in SIZES:
        yield (
            f"quantize {rows}x{features}",
            lambda rows=rows, features=features: _codecs(bench, rows, features),  # type: ignore[misc]
        )


def data(rows: int, features: int) -> torch.Tensor:
    """What is quantized: normal values, the same in every run."""
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0))


def kind(task: str) -> str:
    """With how many bits per weight a task's result has to be right."""
    return "8 bits" if task.endswith("8") else "4 bits"


def _codecs(bench: Bench, rows: int, features: int) -> list[Record]:
    x = data(rows, features)
    engines = [*own.codec_engines(), *bench.peers.codecs()]
    if bench.quick and rows > 1:
        engines = [e for e in engines if e.task.endswith(("int8", "int4"))]
    tasks = dict.fromkeys(e.task for e in engines)
    unit = f"quantize {rows}x{features}"
    with torch.inference_mode():
        return [
            _task(bench, unit, task, [e for e in engines if e.task == task], x) for task in tasks
        ]


def _task(
    bench: Bench, unit: str, task: str, engines: list[CodecEngine], x: torch.Tensor
) -> Record:
    contenders: dict[str, Callable[[], Any]] = {}
    describe: dict[str, dict[str, Any]] = {}
    for engine in bench.chosen(engines):
        try:
            call, decode = engine.build(x)
            quality = verified(engine.name, kind(task), x, decode(call()))
        except Exception as error:
            bench.skip(engine.name, f"{task}, {unit}", error)
            continue
        contenders[engine.name] = call
        describe[engine.name] = {"kind": task, "own": engine.own, "sqnr": quality}
    record = bench.record(unit, "quantize", {"task": task, "rows": x.shape[0], "k": x.shape[1]})
    record.case["bytes"] = traffic(task, x.shape[0], x.shape[1])
    return bench.compare(record, contenders, describe, ("copy",))


def traffic(task: str, rows: int, features: int) -> int:
    """Bytes that must be read and written: the float tensor, and its codes with their scales.

    Args:
        task: "quantize" or "dequantize", and a format.
        rows: of the tensor.
        features: of the tensor.
    """
    per_weight = {"int8": 1 + 4 / features, "int4": 0.5 + 5 / 128, "nf4": 0.5 + 4 / 64}
    return round(rows * features * (4 + per_weight[task.split()[1]]))
