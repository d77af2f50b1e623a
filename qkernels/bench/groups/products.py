"""Matrix products: linear layers, their backward pass to the input, and plain int8 products."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import functional
from qkernels.bench import own, plan
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import Call, LinearEngine, verified
from qkernels.bench.measure import HOPELESS, LONG, rotate
from qkernels.bench.peers import torch_float
from qkernels.bench.plan import Shape
from qkernels.bench.results import Record, last_level_cache

# Between two calls on the same copy of a weight, this many times the last-level cache is read.
_PAST_CACHE = 2.5


def linear_units(bench: Bench) -> Iterator[Unit]:
    shapes = plan.QUICK_SHAPES if bench.quick else plan.LINEAR_SHAPES
    for shape in bench.only.shapes(shapes, others=True):
        yield f"linear {shape}", lambda shape=shape: _linear(bench, shape)  # type: ignore[misc]


def backward_units(bench: Bench) -> Iterator[Unit]:
    shapes = plan.BACKWARD_SHAPES[:1] if bench.quick else plan.BACKWARD_SHAPES
    for shape in bench.only.shapes(shapes):
        yield f"backward {shape}", lambda shape=shape: _backward(bench, shape)  # type: ignore[misc]


def int_mm_units(bench: Bench) -> Iterator[Unit]:
    for shape in bench.only.shapes(plan.INT_MM_SHAPES):
        yield f"int_mm {shape}", lambda shape=shape: _int_mm(bench, shape)  # type: ignore[misc]


def copies(shape: Shape, bits: float) -> int:
    """How many copies of a weight are rotated so that each comes from memory.

    Args:
        shape: of the layer.
        bits: stored bits of a weight.
    """
    if not shape.rotated:
        return 1
    bytes_of_one = shape.k * shape.n * bits / 8
    return max(1, math.ceil(_PAST_CACHE * last_level_cache() / bytes_of_one))


def _linear(bench: Bench, shape: Shape) -> list[Record]:
    weight, x = data(shape, shape.k)
    engines = bench.chosen([*own.linear_engines(), *bench.peers.linear()])
    return _products(bench, "linear", shape, engines, weight, x, x @ weight.T)


def _backward(bench: Bench, shape: Shape) -> list[Record]:
    weight, grad = data(shape, shape.n)
    engines = bench.chosen([*own.backward_engines(), *torch_float.backward_engines()])
    return _products(bench, "backward", shape, engines, weight, grad, grad @ weight)


def data(shape: Shape, features: int) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and rows [max m, features], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator).mul_(shape.k**-0.5)
    return weight, torch.randn(max(shape.rows), features, generator=generator)


def _products(
    bench: Bench,
    group: str,
    shape: Shape,
    engines: Sequence[LinearEngine],
    weight: Tensor,
    x: Tensor,
    reference: Tensor,
) -> list[Record]:
    unit = f"{group} {shape}"
    built: list[tuple[LinearEngine, Sequence[Call]]] = []
    for engine in engines:
        try:
            with torch.no_grad():
                built.append((engine, engine.build(weight, copies(shape, engine.bits))))
        except Exception as error:
            bench.skip(engine.name, unit, error)
    records = []
    for m in shape.rows:
        record = bench.record(unit, group, {"k": shape.k, "n": shape.n, "m": m})
        with torch.inference_mode():
            records.append(_one(bench, record, built, x[:m], reference[:m]))
        slow = too_slow(records[-1]) if m != shape.rows[-1] else {}
        for name in slow:
            bench.skip(name, f"{unit} with more than {m} rows", slow[name])
        built = [(engine, calls) for engine, calls in built if engine.name not in slow]
    built.clear()
    gc.collect()
    return records


def _one(
    bench: Bench,
    record: Record,
    built: Sequence[tuple[LinearEngine, Sequence[Call]]],
    x: Tensor,
    reference: Tensor,
) -> Record:
    inputs = {dtype: x.to(dtype) for dtype in {engine.dtype for engine, _ in built}}
    contenders: dict[str, Callable[[], object]] = {}
    describe: dict[str, dict[str, Any]] = {}
    for engine, calls in built:
        given = inputs[engine.dtype]
        try:
            quality = verified(engine.name, engine.kind, reference, calls[0](given))
            # The other copies run too, so that none is prepared (or compiled) in a timed call.
            deadline = time.perf_counter() + bench.effort.warm
            for call in calls[1:]:
                if time.perf_counter() < deadline:
                    verified(engine.name, engine.kind, reference, call(given))
        except Exception as error:
            bench.skip(engine.name, record.unit, error)
            continue
        turn = rotate(calls)
        contenders[engine.name] = lambda turn=turn, given=given: turn(given)  # type: ignore[misc]
        describe[engine.name] = {
            "kind": engine.kind,
            "own": engine.own,
            "sqnr": quality,
            "arithmetic": engine.arithmetic,
            "bits": engine.bits,
        }
    wanted = {engine.arithmetic for engine, _ in built if engine.own}
    return bench.compare(record, contenders, describe, ("read", *sorted(wanted)))


def too_slow(record: Record) -> dict[str, RuntimeError]:
    """Contenders that need not be measured with more rows, and why: some libraries fall back to
    plain loops on machines without the instructions that they were written for.

    Args:
        record: of fewer rows.
    """
    found = {}
    for result in record.results:
        fastest = min(r.median for r in record.results if r.kind == result.kind)
        if result.median > max(LONG, HOPELESS * fastest):
            found[result.name] = RuntimeError(
                f"a call takes {result.median:.1f} s, {result.median / fastest:.0f} times as long "
                f"as the fastest of its kind"
            )
    return found


def _int_mm(bench: Bench, shape: Shape) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-127, 128, size, dtype=torch.int8, generator=generator)
        for size in ((max(shape.rows), shape.k), (shape.k, shape.n))
    )
    exact = (a.double() @ b.double()).to(torch.int32)
    records: list[Record] = []
    slow: dict[str, RuntimeError] = {}
    for m in shape.rows:
        x = a[:m]
        contenders: dict[str, Callable[[], Tensor]] = {
            "qkernels": lambda x=x: functional.int_mm(x, b),  # type: ignore[misc]
            "torch _int_mm": lambda x=x: torch._int_mm(x, b),  # type: ignore[misc]
        }
        contenders = {name: call for name, call in contenders.items() if name not in slow}
        right = {name: call for name, call in contenders.items() if torch.equal(call(), exact[:m])}
        for name in contenders.keys() - right.keys():
            bench.skip(name, f"int_mm {shape}", ValueError("the product is not exact"))
        describe = {
            name: {
                "kind": "int_mm",
                "own": name == "qkernels",
                "arithmetic": "int8",
                "bits": 8,
            }
            for name in right
        }
        case = {"k": shape.k, "n": shape.n, "m": m}
        record = bench.record(f"int_mm {shape}", "int_mm", case)
        records.append(bench.compare(record, right, describe, ("read", "int8")))
        found = too_slow(records[-1]) if m != shape.rows[-1] else {}
        for name, why in found.items():
            bench.skip(name, f"int_mm {shape} with more than {m} rows", why)
        slow |= found
    return records
