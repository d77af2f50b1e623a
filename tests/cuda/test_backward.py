"""linear_backward_input on CUDA: float32 as on the CPU, 16 bits inside of the stated bound."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference as ref
from helpers.check import same_tensor, within
from helpers.data import FLOATS, KINDS, Kind, Weight, floats, strided, weight

cpu = torch.ops.qkernels


@pytest.fixture(autouse=True)
def no_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are about the kernels; tests/cuda/test_matmul.py is about what usually runs."""
    monkeypatch.setenv("QKERNELS_MATMUL_ROWS", str(1 << 60))


SHAPES = [
    (0, 5, 7, -1),
    (3, 0, 9, -1),
    (2, 5, 0, -1),
    (1, 1, 1, -1),
    (5, 16, 32, 8),
    (7, 33, 40, 7),
]
SHAPES += [(65, 40, 70, 32), (17, 48, 130, 1), (130, 70, 136, 64), (33, 100, 257, 128)]


def packed(ops: Any, w: Weight) -> torch.Tensor:
    arguments = (w.data, w.scale_tensor, w.zero_tensor, w.kind.cuda_layout, w.k, w.group_size)
    return ops.pack(*arguments)


def gradient(ops: Any, w: Weight, grad: torch.Tensor) -> torch.Tensor:
    sizes = (w.kind.cuda_layout, w.k, w.n, w.group_size)
    return ops.linear_backward_input(grad, packed(ops, w), *sizes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float32_is_the_same_to_the_bit(ops: Any, kind: Kind) -> None:
    """One chain of fma in ascending n, as the scalar kernels have it."""
    for i, (m, n, k, group_size) in enumerate(SHAPES):
        w = weight(kind, n, k, group_size)
        grad = floats((m, n), seed=i)
        same_tensor(gradient(ops, w, grad), cpu.linear_backward_input(grad, w.packed, *w.sizes))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_16_bits(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    """docs/NUMERICS.md: the weight is rounded to the type, and sums are float32."""
    rounding, smallest = (2.0**-8, 0.0) if dtype == torch.bfloat16 else (2.0**-11, 2.0**-25)
    for i, (m, n, k, group_size) in enumerate(SHAPES):
        w = weight(kind, n, k, group_size)
        grad = floats((m, n), dtype, seed=i)
        dy, exact = ref.values(grad).astype(np.float64), w.exact()
        unit = rounding + (n + 9) * 2.0**-23
        bound = unit * (np.abs(dy) @ np.abs(exact)) + smallest * np.abs(dy).sum(1, keepdims=True)
        got = gradient(ops, w, grad)
        assert got.dtype == dtype
        within(got, dy @ exact, bound)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_weight_is_at_its_place(ops: Any, kind: Kind) -> None:
    w = weight(kind, 50, 150, 24)
    rest = (kind.form.code, 24, 150, torch.float32)
    rows = cpu.dequantize(w.data, w.scale_tensor, w.zero_tensor, *rest)
    for dtype in FLOATS:
        same_tensor(gradient(ops, w, torch.eye(50, dtype=dtype)), rows.to(dtype) + 0.0)


def test_strides_ranks_and_rows_alone(ops: Any) -> None:
    w = weight(KINDS[3], 40, 70, 32)
    for dtype in FLOATS[:2]:
        grad = floats((13, 40), dtype)
        want = gradient(ops, w, grad)
        for _, view in strided(grad):
            same_tensor(gradient(ops, w, view), want)
        shifted = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
        same_tensor(gradient(ops, w, shifted), want)
        assert gradient(ops, w, grad[None, :, None]).shape == (1, 13, 1, 70)
        for row in (0, 12):
            same_tensor(gradient(ops, w, grad[row]), want[row])


def test_bad_rows_stay_alone(ops: Any) -> None:
    w = weight(KINDS[0], 40, 70)
    for dtype in FLOATS:
        grad = floats((20, 40), dtype)
        want = gradient(ops, w, grad)
        grad[3, 5], grad[17, 39] = torch.nan, torch.inf
        got = gradient(ops, w, grad)
        keep = torch.ones(20, dtype=torch.bool)
        keep[[3, 17]] = False
        same_tensor(got[keep], want[keep])
        assert got[3].isnan().all()
        assert not got[17].isfinite().any()


def test_wrong_calls_say_what_is_wrong(ops: Any) -> None:
    w = weight(KINDS[0], 40, 70)
    with pytest.raises(RuntimeError, match=r"grad must have shape \(..., 40\)"):
        gradient(ops, w, torch.ones(3, 41))
