"""int_mm: exact int32 sums, whatever the shapes, strides and extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.data import rng, strided

ops = torch.ops.qkernels
LIMIT = 131_071


def codes(*shape: int, seed: object = 0) -> torch.Tensor:
    return torch.from_numpy(rng("int_mm", shape, seed).integers(-128, 128, shape, np.int8))


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # float64 holds every partial sum: all are integers below 2^53.
    return (a.double() @ b.double()).to(torch.int64)


def check(a: torch.Tensor, b: torch.Tensor) -> None:
    y = ops.int_mm(a, b)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), exact(a, b))


@pytest.mark.parametrize("m", [0, 1, 2, 7, 15, 16, 17, 48, 49, 70, 300])
def test_shapes(m: int) -> None:
    for n in (0, 1, 15, 16, 17, 47, 48, 49, 100):
        for k in (0, 1, 3, 4, 7, 8, 31, 64, 127, 333):
            check(codes(m, k), codes(k, n))


@pytest.mark.parametrize("k", [4096, 4249, 9001, 17_000])
def test_long_columns(k: int) -> None:
    """Kernels cut them into parts and keep the sums meanwhile."""
    for m in (8, 9, 16, 33, 270):
        check(codes(m, k), codes(k, 50))


@pytest.mark.parametrize("x", [-128, -127, 127])
@pytest.mark.parametrize("w", [-128, -127, 127])
def test_extremes(x: int, w: int) -> None:
    """Sums that saturate where 16-bit intermediate sums are not designed out."""
    for m, k, n in ((1, 64, 16), (5, 127, 49), (17, 1000, 33)):
        a = torch.full((m, k), x, dtype=torch.int8)
        b = torch.full((k, n), w, dtype=torch.int8)
        check(a, b)
        a[:, 1::2] = -1 - a[:, 1::2]
        check(a, b)
        b[2::3] = -1 - b[2::3]
        check(a, b)


@pytest.mark.parametrize(("x", "w"), [(-128, -128), (127, -128), (-128, 127), (-127, -127)])
def test_the_longest_sum(x: int, w: int) -> None:
    a = torch.full((2, LIMIT), x, dtype=torch.int8)
    b = torch.full((LIMIT, 17), w, dtype=torch.int8)
    y = ops.int_mm(a, b)
    assert (y == x * w * LIMIT).all()
    assert abs(x * w * LIMIT) < 2**31


def test_one_more_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="131072 products can overflow .* limit is 131071"):
        ops.int_mm(
            torch.zeros(1, LIMIT + 1, dtype=torch.int8), torch.zeros(LIMIT + 1, 1, dtype=torch.int8)
        )


def test_any_strides() -> None:
    a, b = codes(19, 37), codes(37, 21)
    want = ops.int_mm(a, b)
    for _, left in strided(a):
        for _, right in strided(b):
            assert torch.equal(ops.int_mm(left, right), want)
    check(codes(1, 37).expand(19, 37), codes(37, 1).expand(37, 21))
    check(codes(19, 1).expand(19, 37), codes(1, 21).expand(37, 21))


@given(
    m=st.integers(0, 40), k=st.integers(0, 200), n=st.integers(0, 80), seed=st.integers(0, 2**20)
)
def test_drawn(m: int, k: int, n: int, seed: int) -> None:
    check(codes(m, k, seed=seed), codes(k, n, seed=seed + 1))
