"""Calls of linear with int8 activations as CUDA kernels, compared with the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.check import same_tensor
from helpers.data import Kind, Weight, rng, weight

SYMMETRIC, ASYMMETRIC = 1, 2
cpu = torch.ops.qkernels


def pack(ops: Any, w: Weight) -> tuple[Tensor, tuple[int, ...]]:
    """The weight in the CUDA layout, and what an op must know of it."""
    layout = w.kind.cuda_layout
    stored = (w.data, w.scale_tensor, w.zero_tensor)
    return ops.pack(*stored, layout, w.k, w.group_size), (layout, w.k, w.n, w.group_size)


def linear(
    ops: Any, w: Weight, x: Tensor, activation: int, bias: Tensor | None = None,
    extra: tuple[Tensor | None, ...] = (None,) * 4, epilogue: int = 0,
) -> Tensor:  # fmt: skip
    packed, sizes = pack(ops, w)
    y = ops.linear(x, packed, bias, *extra, *sizes, activation, epilogue)
    want = cpu.linear(x, w.packed, bias, *extra, *w.sizes, activation, epilogue)
    same_tensor(y, want)
    return y


def rounded_sums(kind: Kind) -> Iterator[tuple[Weight, Tensor]]:
    """A row as one group, and groups, whose sums are beyond 2^24."""
    random = rng("long")
    for k, group_size in ((19000, -1), (36001, 18000)):
        codes = np.where(random.random((18, k)) < 0.01, random.integers(0, 16, (18, k)), 0)
        x = 1 - (random.random((66, k), np.float32) < 0.1) / 127
        yield weight(kind, 18, k, group_size, codes=codes), torch.from_numpy(x).float()
