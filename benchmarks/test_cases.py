"""The suite's cases under pytest-benchmark, for its statistics, storage and comparisons.

    pytest benchmarks --benchmark-group-by=group -k "4096x4096 and M16"
    pytest benchmarks --benchmark-autosave            # and later --benchmark-compare

`qkernels bench` runs the same engines in turns and against the machine's limits: quote that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.bench import own, plan
from qkernels.bench.engines import Call, CodecEngine, LinearEngine, ModelEngine, verified
from qkernels.bench.groups import codecs, models, products
from qkernels.bench.measure import keep_freed_memory, rotate, settle
from qkernels.bench.peers import load_peers
from qkernels.bench.plan import Shape

pytest.importorskip("pytest_benchmark", reason="needs `pip install 'qkernels[bench]'`")

PEERS = load_peers()
LINEAR = [*own.linear_engines(), *PEERS.linear()]
CODECS = [*own.codec_engines(), *PEERS.codecs()]
MODELS = [*own.model_engines(), *PEERS.models()]
keep_freed_memory()


def named(engine: LinearEngine | CodecEngine | ModelEngine) -> str:
    return engine.name.replace(" ", "-")


@lru_cache(maxsize=1)
def built(shape: Shape, engine: LinearEngine) -> tuple[Sequence[Call], Tensor, Tensor]:
    weight, x = products.data(shape, shape.k)
    with torch.no_grad():
        calls = engine.build(weight, products.copies(shape, engine.bits))
    return calls, x, x @ weight.T


@pytest.mark.parametrize("shape", plan.LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("engine", LINEAR, ids=named)
@pytest.mark.parametrize("m", plan.ROWS, ids=lambda m: f"M{m}")
def test_linear(benchmark: Any, shape: Shape, engine: LinearEngine, m: int) -> None:
    if m not in shape.rows:
        pytest.skip(f"{shape} is measured with M={shape.rows}")
    benchmark.group = f"linear {shape} M={m}"
    calls, x, reference = built(shape, engine)
    given = x[:m].to(engine.dtype)
    with torch.inference_mode():
        for call in calls:
            verified(engine.name, engine.kind, reference[:m], call(given))
        settle()
        benchmark.pedantic(rotate(calls), args=(given,), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("size", codecs.SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("engine", CODECS, ids=lambda e: f"{e.task}-{e.name}".replace(" ", "-"))
def test_codec(benchmark: Any, size: tuple[int, int], engine: CodecEngine) -> None:
    benchmark.group = f"{engine.task} {size[0]}x{size[1]}"
    x = codecs.data(*size)
    with torch.inference_mode():
        call, decode = engine.build(x)
        verified(engine.name, codecs.kind(engine.task), x, decode(call()))
        settle()
        benchmark.pedantic(call, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("engine", MODELS, ids=named)
@pytest.mark.parametrize("task", range(2), ids=("1x32", "32x128"))
def test_minilm(benchmark: Any, engine: ModelEngine, task: int) -> None:
    subject = models.minilm()
    benchmark.group = f"minilm {subject.tasks[task].case}"
    converted, _ = models.converted(engine, subject.make(), subject)
    with torch.inference_mode():
        settle()
        benchmark.pedantic(lambda: subject.tasks[task].run(converted), rounds=10, warmup_rounds=2)
