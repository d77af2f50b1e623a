"""linear with float activations as CUDA kernels, run by the emulator: inside the bound that holds on
the CPU, and the same bits for a row however it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import cuda_layout
from helpers import reference as ref
from helpers.check import HALF_ULP, float_path_bound, same_tensor, within
from helpers.data import FLOATS, KINDS, Kind, Weight, awkward, floats, rng, strided, weight
from qkernels import _C

HALVES = (torch.bfloat16, torch.float16)


def packed(w: Weight) -> Tensor:
    stored = w.scale_tensor
    scale_bytes = stored.reshape(-1).view(torch.uint8).numpy().reshape(*stored.shape, -1)
    return torch.from_numpy(
        cuda_layout.pack(
            w.codes, w.scale, scale_bytes, w.zero, w.kind.form, w.kind.symmetric, w.group_size
        )
    )


def linear(
    ops: Any, w: Weight, x: Tensor, bias: Tensor | None = None, *, epilogue: int = 0,
    premul: Tensor | None = None, perm: Tensor | None = None, bits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    layout = _C.layout(
        w.kind.form.code, FLOATS.index(w.kind.scale_dtype), w.kind.symmetric, "cuda"
    )
    sizes = (layout, w.k, w.n, w.group_size, 0, epilogue)
    bits = packed(w) if bits is None else bits
    y: Tensor = ops.linear(x, bits, bias, None, None, premul, perm, *sizes)
    return y


def check(
    ops: Any, w: Weight, x: Tensor, bias: Tensor | None = None,
    premul: Tensor | None = None, perm: Tensor | None = None,
) -> None:  # fmt: skip
    y = linear(ops, w, x, bias, premul=premul, perm=perm)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], w.n)
    a = ref.values(x).reshape(int(np.prod(x.shape[:-1])), w.k)
    a = a if premul is None else a * ref.values(premul)
    a = (a if perm is None else a[:, perm.numpy()]).astype(np.float64)
    exact = w.exact()
    want = a @ exact.T
    bound = float_path_bound(a, exact, w.scale.shape[1])
    # What is rounded to 16 bits on the way: levels of nf4, and x times x_premul.
    roundings = (w.kind.form is ref.NF4) + (premul is not None)
    if x.dtype != torch.float32 and roundings:
        bound = bound + roundings * HALF_ULP[x.dtype] * (np.abs(a) @ np.abs(exact).T) * 1.01
        lost = np.abs(exact).sum(axis=1) + w.k * np.abs(w.scale).max(axis=1, initial=0)
        bound = bound + (2.0**-24 if x.dtype == torch.float16 else 2.0**-126) * lost
    if x.dtype == torch.float32:
        bound = bound + 2.0**-126 * np.abs(exact).sum(axis=1)
    if bias is not None:
        want = want + ref.values(bias)
        bound = bound + 2.0**-23 * np.abs(ref.values(bias))
    within(y, want.reshape(y.shape), bound.reshape(y.shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    """Few and many rows; whole chunks and ragged ones; groups that end inside of a step."""
    for i, (m, n, k, group_size) in enumerate(
        (
            (1, 1, 1, -1),
            (1, 40, 256, 64),
            (2, 33, 130, 32),
            (5, 17, 100, 24),
            (8, 48, 192, -1),
            (9, 35, 96, 32),
            (17, 20, 77, 7),
            (40, 18, 160, 96),
        )
    ):
        bias = floats((n,), FLOATS[i % 3], seed="bias") if i % 2 else None
        check(ops, weight(kind, n, k, group_size), awkward((m, k), dtype, seed=i), bias)
