"""Static int8 convolutions with bias and ReLU, as they follow each other in a CNN."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.bench import own, plan
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import ConvTask, verified
from qkernels.bench.plan import Conv
from qkernels.bench.results import Record


def units(bench: Bench) -> Iterator[Unit]:
    for shape in bench.only.convs(plan.QUICK_CONVS if bench.quick else plan.CONVS):
        yield f"conv {shape}", lambda shape=shape: [_conv(bench, shape)]  # type: ignore[misc]


def data(shape: Conv) -> tuple[ConvTask, Tensor]:
    """A convolution, the same in every run, and its float result.

    Args:
        shape: of the convolution. An image, with 3 channels, has both signs; what follows a ReLU
            has none.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator)
    if shape.channels > 3:
        x = x.relu_()
    scale, zero = _range(x)
    # On the grid, so that fp32 and int8 engines are given the same numbers.
    x = ((x / scale).round_() * scale).to(memory_format=torch.channels_last)
    fan_in = shape.channels // shape.groups * shape.kernel**2
    weight = torch.randn(
        shape.out, shape.channels // shape.groups, shape.kernel, shape.kernel, generator=generator
    ).mul_((2 / fan_in) ** 0.5)
    bias = torch.randn(shape.out, generator=generator).mul_(0.1)
    y = F.conv2d(x, weight, bias, shape.stride, shape.padding, groups=shape.groups).relu_()
    return ConvTask(shape, x, weight, bias, scale, zero, _range(y)[0]), y


def _range(x: Tensor) -> tuple[float, int]:
    """Scale and zero point of 256 codes from the smallest value, or 0, to the largest."""
    low, high = min(x.min().item(), 0.0), x.max().item()
    scale = (high - low) / 255
    return scale, round(-low / scale)


def _conv(bench: Bench, shape: Conv) -> Record:
    unit = f"conv {shape}"
    task, reference = data(shape)
    engines = bench.chosen([*own.conv_engines(), *bench.peers.convs()])
    contenders: dict[str, Callable[[], Any]] = {}
    describe: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for engine in engines:
            try:
                call, decode = engine.build(task)
                quality = verified(engine.name, engine.kind, reference, decode(call()))
            except Exception as error:
                bench.skip(engine.name, unit, error)
                continue
            contenders[engine.name] = call
            describe[engine.name] = {
                "kind": engine.kind,
                "own": engine.own,
                "sqnr": quality,
                "arithmetic": engine.arithmetic,
                "bits": engine.bits,
            }
        record = bench.record(unit, "conv", dataclasses.asdict(shape))
        bench.compare(record, contenders, describe, ("int8",))
    gc.collect()
    return record
