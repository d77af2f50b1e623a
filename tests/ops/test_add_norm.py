"""LayerNorm and RMSNorm of a sum: near exact arithmetic, and the same bits for a row anywhere."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.check import same_tensor, within
from helpers.data import FLOATS, awkward, floats, strided
from qkernels import functional
from qkernels.ops_transformer import add_norm_by_torch

ops = torch.ops.qkernels
UNIT = 2.0**-24
FEATURES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 384, 1000)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def check(y: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool):
    """y is the norm of s, within what docs/NUMERICS.md says."""
    x = s.double().numpy()
    n = x.shape[-1]
    w = 1.0 if weight is None else weight.double().numpy()
    b = 0.0 if bias is None else bias.double().numpy()
    centered = x if rms else x - x.mean(-1, keepdims=True)
    root = np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    terms = n / 64 + 12
    off = 0.0 if rms else terms * UNIT * np.abs(x).mean(-1, keepdims=True)
    off = off + UNIT * np.abs(centered) + 2.0**-149
    relative = off / root + terms * UNIT
    bound = np.abs(w) * (off + np.abs(centered) * relative) / root
    bound = 1.01 * bound + UNIT * (np.abs(centered / root * w) + np.abs(b))
    within(y, centered / root * w + b, bound)


@each_dtype
@pytest.mark.parametrize("features", FEATURES)
def test_shapes(features: int, dtype: torch.dtype) -> None:
    x, residual = floats((5, features), dtype), floats((5, features), dtype, "residual")
    for factor_dtype in {dtype, torch.float32}:
        weight, bias = (floats((features,), factor_dtype, seed) for seed in ("weight", "bias"))
        for rms in (False, True):
            for r in (None, residual):
                for w, b in ((None, None), (weight, None), (None, bias), (weight, bias)):
                    y, total = ops.add_norm(x, r, w, b, 1e-5, rms, True)
                    assert y.dtype == dtype
                    same_tensor(total, x if r is None else x + r)
                    check(y, total, w, b, 1e-5, rms)
                    again, nothing = ops.add_norm(x, r, w, b, 1e-5, rms, False)
                    same_tensor(again, y)
                    assert nothing.shape == (0,)


@each_dtype
def test_magnitudes(dtype: torch.dtype) -> None:
    x = awkward((60, 77), dtype)
    for rms in (False, True):
        for eps in (1e-12, 1e-5, 1.0):
            check(ops.add_norm(x, None, None, None, eps, rms, False)[0], x, None, None, eps, rms)


def test_far_from_zero() -> None:
    """The variance is that of what is left without the mean, not a difference of squares."""
    x = floats((4, 500)) + 1e4
    y, _ = ops.add_norm(x, None, None, None, 0.0, False, False)
    torch.testing.assert_close(y, F.layer_norm(x.double(), [500]).float(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0,)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    y, total = ops.add_norm(torch.ones(shape), None, None, None, 1e-5, False, True)
    assert y.shape == total.shape == shape


@each_dtype
def test_parts_are_parts_of_the_whole(dtype: torch.dtype) -> None:
    """Also for as many rows as make threads worth it."""
    x, residual = floats((300, 200), dtype), floats((300, 200), dtype, "residual")
    weight, bias = floats((200,), dtype, "weight"), floats((200,), dtype, "bias")
    for rms in (False, True):
        whole = ops.add_norm(x, residual, weight, bias, 1e-5, rms, True)
        for begin, end in ((0, 1), (1, 3), (149, 151), (200, 300), (299, 300)):
            rows = slice(begin, end)
            part = ops.add_norm(x[rows], residual[rows], weight, bias, 1e-5, rms, True)
            for got, want in zip(part, whole, strict=True):
                same_tensor(got, want[rows])
        vector = ops.add_norm(x[7], residual[7], weight, bias, 1e-5, rms, True)
        cube = ops.add_norm(
            *(t.view(3, 4, 25, 200) for t in (x, residual)), weight, bias, 1e-5, rms, True
        )
        for i in range(2):
            same_tensor(vector[i], whole[i][7])
            same_tensor(cube[i].view(300, 200), whole[i])


@each_dtype
def test_any_strides(dtype: torch.dtype) -> None:
    x, residual, weight = floats((5, 30), dtype), floats((5, 30), dtype, 1), floats((1, 30), dtype)
    want = ops.add_norm(x, residual, weight[0], weight[0], 1e-5, False, True)
    for (_, a), (_, b), (_, w) in zip(strided(x), strided(residual), strided(weight), strict=True):
        got = ops.add_norm(a, b, w[0], w[0], 1e-5, False, True)
        for i in range(2):
            assert got[i].is_contiguous()
            same_tensor(got[i], want[i])


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_touches_no_other(bad: float, rms: bool) -> None:
    x = floats((6, 70))
    want, _ = ops.add_norm(x, None, None, None, 1e-5, rms, False)
    x[2, 68] = bad
    y, _ = ops.add_norm(x, None, None, None, 1e-5, rms, False)
    assert y[2, 68].isnan()
    assert y[2].isnan().all() or rms
    y[2] = want[2]
    same_tensor(y, want)


@each_dtype
def test_constant_rows(dtype: torch.dtype) -> None:
    y, _ = ops.add_norm(torch.full((2, 64), 3.0, dtype=dtype), None, None, None, 1e-5, False, False)
    assert (y == 0).all()
    y, _ = ops.add_norm(torch.zeros(2, 65, dtype=dtype), None, None, None, 1e-5, True, False)
    assert (y == 0).all()


@each_dtype
@pytest.mark.parametrize("rms", [False, True])
def test_torchs_kernels_in_its_place(rms: bool, dtype: torch.dtype) -> None:
    """What runs on CUDA."""
    x, residual = floats((5, 40), dtype), floats((5, 40), dtype, "residual")
    weight, bias = floats((40,), seed="weight"), floats((40,), seed="bias")
    for r in (None, residual):
        for w, b in ((None, None), (weight, None), (weight, bias)):
            for keep in (False, True):
                given = (x, r, w, b, 1e-5, rms, keep)
                for got, want in zip(add_norm_by_torch(*given), ops.add_norm(*given), strict=True):
                    torch.testing.assert_close(got, want)
                    assert got is not x


def test_function() -> None:
    x, residual, weight = floats((5, 40)), floats((5, 40), seed=1), floats((40,))
    got = functional.add_norm(x, residual, weight, eps=0.5, rms=True, keep_sum=True)
    want = ops.add_norm(x, residual, weight, None, 0.5, True, True)
    for a, b in zip(got, want, strict=True):
        same_tensor(a, b)
    torch.testing.assert_close(functional.add_norm(x)[0], F.layer_norm(x, [40]))


def test_gradients_are_refused() -> None:
    x, weight = floats((5, 40)), floats((40,))
    for given in ((x.clone().requires_grad_(), None, weight), (x, None, weight.requires_grad_())):
        with pytest.raises(RuntimeError, match=r"add_norm has no gradient .* torch.no_grad\(\)"):
            functional.add_norm(*given)
        with torch.no_grad():
            same_tensor(functional.add_norm(*given)[0], functional.add_norm(x, None, weight)[0])


def test_compiles_with_any_number_of_rows() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, r: functional.add_norm(x, r, keep_sum=True),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    counts = []
    for rows in (5, 9, 17):
        given = floats((2, rows, 40)), floats((2, rows, 40), seed=1)
        want = functional.add_norm(*given, keep_sum=True)
        for a, b in zip(compiled(*given), want, strict=True):
            same_tensor(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    torch.compiler.reset()
