"""The ops on int8 codes on CUDA: the same bits as on the CPU."""

from typing import Any

import pytest
import torch

from helpers.check import same_tensor
from helpers.data import FLOATS
from helpers.int8 import RANGES, codes, orders, scale_of, zero_of

cpu = torch.ops.qkernels


def pair(i: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale, zero = RANGES[i % len(RANGES)]
    return scale_of(scale), zero_of(zero)


def results(i: int) -> list[tuple[Any, ...]]:
    """y_scale, y_zero_point and dtype: codes and floats."""
    return [(*pair(i), None), (None, None, FLOATS[i % 3])]


def test_max_pool(ops: Any) -> None:
    for channels in (1, 3, 16, 32):
        for x in orders(codes((2, channels, 7, 9))):
            for rest in (
                ([3, 3], [2, 2], [1, 1], [1, 1], False),
                ([2, 3], [2, 1], [0, 1], [2, 3], True),
                ([1, 1], [1, 1], [0, 0], [1, 1], False),
            ):
                same_tensor(ops.max_pool(x, *rest), cpu.max_pool(x, *rest))
    x = codes((2, 5, 30))
    same_tensor(
        ops.max_pool(x, [3], [2], [1], [1], True), cpu.max_pool(x, [3], [2], [1], [1], True)
    )


def test_avg_pool(ops: Any) -> None:
    for i, channels in enumerate((1, 3, 16, 32)):
        for x in orders(codes((2, channels, 7, 9))):
            for y in results(i):
                for windows in (
                    ([3, 3], [2, 2], [1, 1], False, True, None),
                    ([2, 3], [2, 1], [1, 1], True, False, None),
                    ([4, 4], [3, 3], [0, 0], True, True, 7),
                ):
                    rest = (*pair(i + 1), *y[:2], *windows, y[2])
                    same_tensor(ops.avg_pool(x, *rest), cpu.avg_pool(x, *rest))


def test_adaptive_avg_pool(ops: Any) -> None:
    for i, size in enumerate(((1, 1), (3, 4), (7, 9), (10, 2))):
        for x in orders(codes((2, 16, 7, 9))):
            for y in results(i):
                rest = (*pair(i + 1), *y[:2], list(size), y[2])
                same_tensor(ops.adaptive_avg_pool(x, *rest), cpu.adaptive_avg_pool(x, *rest))


def test_add(ops: Any) -> None:
    for i, shape in enumerate(((0,), (7,), (64,), (2, 16, 3, 5), (2, 3, 4, 5))):
        for a in orders(codes(shape)):
            b = codes(shape, seed="b")
            for epilogue in range(7):
                for y in results(i + epilogue):
                    rest = (*pair(i), *pair(i + epilogue), *y[:2], epilogue, y[2])
                    same_tensor(ops.add(a, b, *rest), cpu.add(a, b, *rest))


def test_lookup(ops: Any) -> None:
    table = codes((256,), seed="table")
    every = torch.arange(-128, 128, dtype=torch.int8)
    for x in (every, every[:77], codes((3, 16, 2, 2)), codes((0, 4)), every[1:17]):
        same_tensor(ops.lookup(x, table), cpu.lookup(x, table))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concat(ops: Any, dim: int) -> None:
    for width in (5, 16):
        shapes = [[2, 16, 3, width] for _ in range(3)]
        for i, shape in enumerate(shapes):
            shape[dim] += 16 * i
        scales = torch.tensor([0.02, 0.5, 3e38])
        zeros = torch.tensor([0, -128, 3], dtype=torch.int8)
        for i in range(3):
            for first in orders(codes(tuple(shapes[0]))):
                xs = [first, *(codes(tuple(shape)) for shape in shapes[1:])]
                rest = (scales, zeros, scales[i], zeros[i : i + 1], dim)
                same_tensor(ops.concat(xs, *rest), cpu.concat(xs, *rest))
                plain = (scales, None, scales[i], None, dim)
                same_tensor(ops.concat(xs, *plain), cpu.concat(xs, *plain))


def test_wrong_calls_say_what_is_wrong(ops: Any) -> None:
    x, one = codes((2, 8)), torch.ones(())
    with pytest.raises(RuntimeError, match="add: a and b must have the same shape"):
        ops.add(x, x[:1], one, None, one, None, None, None, 0)
    with pytest.raises(RuntimeError, match="concat: xs must hold at least one tensor"):
        ops.concat([], one, None, one, None, 0)
    with pytest.raises(RuntimeError, match="lookup: table must have shape"):
        ops.lookup(x, x)
