"""linear with int8 activations and int_mm as CUDA kernels, run by the emulator: the CPU's bits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.data import FLOATS, INTEGER_KINDS, Kind, Weight, awkward, floats, rng, strided, weight
from helpers.layout import pack_cuda

cpu = torch.ops.qkernels
SYMMETRIC, ASYMMETRIC = 1, 2

# (multiprocessors, rows): what decides on a kernel. Few rows go to the skinny one.
SKINNY = ((4, 1), (4, 8), (4, 9), (4, 16), (99, 31))
SMALL = ((4, 33), (1, 17), (64, 70))
LARGE = ((1, 65), (1, 130))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many multiprocessors the device has."""
    return lambda count: monkeypatch.setenv("QKERNELS_HOST_MULTIPROCESSORS", str(count))


def linear(
    ops: Any, w: Weight, x: Tensor, activation: int, bias: Tensor | None = None,
    extra: tuple[Tensor | None, ...] = (None,) * 4, epilogue: int = 0,
) -> Tensor:  # fmt: skip
    packed, layout = pack_cuda(w)
    sizes = (layout, w.k, w.n, w.group_size)
    y = ops.linear(x, packed, bias, *extra, *sizes, activation, epilogue)
    want = cpu.linear(x, w.packed, bias, *extra, *w.sizes, activation, epilogue)
    same_tensor(y, want)
    return y


@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_shapes(ops: Any, device: Any, kind: Kind, activation: int) -> None:
    shapes = ((50, 72, -1), (33, 70, 32), (17, 100, 7), (40, 192, 96), (130, 1, -1), (16, 130, 64))
    for i, (multiprocessors, rows) in enumerate((*SKINNY, *SMALL, *LARGE)):
        device(multiprocessors)
        n, k, group_size = shapes[i % len(shapes)]
        w = weight(kind, n, k, group_size)
        x = awkward((rows, k), FLOATS[i % 3], seed=i)
        bias = floats((n,), FLOATS[i // 2 % 3], seed="bias") if i % 2 else None
        y = linear(ops, w, x, activation, bias)
        same_bits(y, w.integer(x, bias, activation))


@pytest.mark.parametrize("group_size", [-1, 1, 16, 32, 96, 100, 128])
@pytest.mark.parametrize("kind", [INTEGER_KINDS[1], INTEGER_KINDS[4]], ids=str)
def test_groups(ops: Any, device: Any, kind: Kind, group_size: int) -> None:
    for multiprocessors, rows in ((4, 3), (4, 20), (1, 66)):
        device(multiprocessors)
        for k in (100, 321):
            linear(ops, weight(kind, 35, k, group_size), awkward((rows, k)), ASYMMETRIC)
