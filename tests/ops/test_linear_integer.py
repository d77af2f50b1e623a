"""W8A8 and W4A8: equal to the reference to the bit, in the written order of the epilogue."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.data import (
    FEATURES_IN,
    FEATURES_OUT,
    FLOATS,
    GROUPS,
    INTEGER_KINDS,
    ROWS,
    Kind,
    awkward,
    floats,
    rng,
    strided,
    weight,
)

SYMMETRIC, ASYMMETRIC = 1, 2


@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_shapes(kind: Kind, activation: int) -> None:
    for i, n in enumerate(FEATURES_OUT):
        for j, k in enumerate(FEATURES_IN):
            w = weight(kind, n, k, GROUPS[(i + j) % len(GROUPS)])
            m = ROWS[(i * len(FEATURES_IN) + j) % len(ROWS)]
            x = awkward((m, k), FLOATS[(i + j) % 3], seed=(i, j))
            bias = floats((n,), FLOATS[i % 3], seed="bias") if j % 2 else None
            y = w.linear(x, bias, activation=activation)
            assert y.dtype == x.dtype
            assert y.shape == (m, n)
            same_bits(y, w.integer(x, bias, activation))


@pytest.mark.parametrize("m", [*ROWS, 96, 129, 300])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_rows(kind: Kind, m: int) -> None:
    """Every number of rows against a few weights: tiles and what is left of them."""
    for n, k, group_size in ((50, 72, -1), (33, 70, 32), (96, 64, 16)):
        w = weight(kind, n, k, group_size)
        x = awkward((m, k), seed=m)
        same_bits(w.linear(x, activation=SYMMETRIC), w.integer(x, None, SYMMETRIC))


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_long_columns(kind: Kind) -> None:
    """Columns that kernels cut into parts: inside of a group, between groups, just one too long."""
    for m, k, group_size in ((13, 9003, -1), (33, 17_001, 1000), (9, 17_400, 24), (300, 8740, 9)):
        w = weight(kind, 49, k, group_size)
        x = awkward((m, k), seed="long")
        for activation in (SYMMETRIC, ASYMMETRIC):
            same_bits(w.linear(x, activation=activation), w.integer(x, None, activation))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_all_shapes(kind: Kind, activation: int) -> None:
    for m in ROWS:
        for n in FEATURES_OUT:
            for i, k in enumerate(FEATURES_IN):
                for group_size in (-1, GROUPS[1 + (m + n + i) % 6]):
                    w = weight(kind, n, k, group_size)
                    x = awkward((m, k), FLOATS[i % 3])
                    same_bits(w.linear(x, activation=activation), w.integer(x, None, activation))


@pytest.mark.parametrize(
    "group_size", [-1, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 64, 99, 100, 128, 10**9]
)
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_groups(kind: Kind, group_size: int) -> None:
    """Short last groups and padded ones: every group starts on a line of the packed weight."""
    for k in (100, 129):
        w = weight(kind, 35, k, group_size)
        x = awkward((9, k), seed=group_size)
        for activation in (SYMMETRIC, ASYMMETRIC):
            same_bits(w.linear(x, activation=activation), w.integer(x, None, activation))


@pytest.mark.parametrize("k", [511, 512, 513, 520, 1024, 1025, 2500])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_long_rows(kind: Kind, k: int) -> None:
    """More than is quantized at a time, with groups that end before, at and after its end."""
    for i, group_size in enumerate((-1, 7, 100, 512, 513, 1000)):
        w = weight(kind, 18, k, group_size)
        x = awkward((9, k), FLOATS[i % 3], seed=group_size)
        same_bits(w.linear(x, activation=SYMMETRIC), w.integer(x, None, SYMMETRIC))
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        premul = torch.exp(floats((k,), seed="premul"))
        y = w.linear(x, activation=ASYMMETRIC, premul=premul, perm=perm)
        same_bits(y, w.integer(x, None, ASYMMETRIC, premul=premul, perm=perm))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_types(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    """The result has the type of x; bias may have another."""
    for kind in INTEGER_KINDS:
        w = weight(kind, 37, 70, 32)
        x = awkward((19, 70), dtype)
        bias = None if bias_dtype is None else floats((37,), bias_dtype)
        for activation in (SYMMETRIC, ASYMMETRIC):
            y = w.linear(x, bias, activation=activation)
            assert y.dtype == dtype
            same_bits(y, w.integer(x, bias, activation))


@pytest.mark.parametrize("x_scale", [0.05, 1e-3, 2.0**-126, 3.0e38])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_static_scales(kind: Kind, x_scale: float) -> None:
    w = weight(kind, 37, 70, 32)
    x = awkward((19, 70))
    x[7, 5], x[8, 0], x[9, 69] = torch.nan, torch.inf, -torch.inf
    scale = torch.tensor(x_scale)
    same_bits(
        w.linear(x, activation=SYMMETRIC, x_scale=scale), w.integer(x, None, SYMMETRIC, x_scale)
    )
    for zero in (-128, -1, 0, 77, 127):
        zero_point = torch.tensor([zero], dtype=torch.int8)
        y = w.linear(x, activation=ASYMMETRIC, x_scale=scale.reshape(1), x_zero=zero_point)
        same_bits(y, w.integer(x, None, ASYMMETRIC, x_scale, zero))
    y = w.linear(x, activation=ASYMMETRIC, x_scale=scale)
    same_bits(y, w.integer(x, None, ASYMMETRIC, x_scale, 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_premul_and_perm(kind: Kind, dtype: torch.dtype) -> None:
    """Column i of the weight belongs to feature perm[i]; premul is indexed by feature."""
    for m, k in ((1, 33), (18, 100)):
        w = weight(kind, 35, k, 32)
        x = awkward((m, k), dtype)
        premul = torch.exp(floats((k,), seed="premul"))
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        repeated = torch.from_numpy(rng("index", k).integers(0, k, k))
        for activation in (SYMMETRIC, ASYMMETRIC):
            for by, at in ((premul, None), (None, perm), (premul, perm), (premul, repeated)):
                y = w.linear(x, activation=activation, premul=by, perm=at)
                same_bits(y, w.integer(x, None, activation, premul=by, perm=at))


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_extreme_codes(kind: Kind) -> None:
    """Codes at both ends, all equal and alternating: 255 * 128 and more in one 16-bit lane."""
    low, high = (-128, 127) if kind.form is ref.INT8 else (0, 15)
    for k, group_size in ((64, -1), (1000, -1), (1000, 128), (130, 8)):
        base = np.full((19, k), low)
        base[1::4] = high
        base[2::4, ::2] = high
        base[3::4, 1::3] = high
        w = weight(kind, 19, k, group_size, codes=base)
        x = torch.ones(6, k)
        x[1] = -1
        x[2, ::2] = -1
        x[3, 1::4] = -1
        x[4] = torch.linspace(-1, 1, k)
        x[5, ::3] = 0
        for activation in (SYMMETRIC, ASYMMETRIC):
            same_bits(w.linear(x, activation=activation), w.integer(x, None, activation))
        # A static zero point lets codes reach -128 and 127 both.
        zero = torch.tensor([-128], dtype=torch.int8)
        scale = torch.tensor(1 / 255)
        y = w.linear(x, activation=ASYMMETRIC, x_scale=scale, x_zero=zero)
        same_bits(y, w.integer(x, None, ASYMMETRIC, float(scale), -128))


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_the_longest_sum(kind: Kind) -> None:
    """At the limit of what int32 holds, at the extremes of codes and zero points."""
    k = 65_793 if kind.form is ref.INT8 and not kind.symmetric else 131_071
    low, high = (-128, 127) if kind.form is ref.INT8 else (0, 15)
    zero_point = torch.tensor([0], dtype=torch.int8)
    for code in (low, high):
        w = weight(kind, 2, k, codes=np.full((2, k), code), seed=code)
        for value in (-1.0, 1.0):
            x = torch.full((1, k), value)
            scale = torch.tensor(1 / 128)
            y = w.linear(x, activation=ASYMMETRIC, x_scale=scale, x_zero=zero_point)
            same_bits(y, w.integer(x, None, ASYMMETRIC, 1 / 128, 0))
    if not kind.symmetric:
        for code, zero in ((low, high), (high, low)):
            scale = torch.ones(2, 1, dtype=kind.scale_dtype)
            zeros = torch.full((2, 1), zero * kind.form.steps, dtype=w.data.dtype)
            data = torch.from_numpy(ref.store(np.full((2, k), code), kind.form))
            packed = torch.ops.qkernels.pack(data, scale, zeros, kind.layout, k, -1)
            x = torch.full((1, k), -128.0)
            y = torch.ops.qkernels.linear(
                x, packed, None, torch.tensor(1.0), zero_point, None, None, kind.layout, k, 2, -1,
                ASYMMETRIC, 0,
            )  # fmt: skip
            assert (y == np.float32(-128 * (code - zero) * k)).all()


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 5, 70), (2, 3, 4, 70), (0, 70), (2, 0, 70)])
def test_any_batch_rank(kind: Kind, shape: tuple[int, ...]) -> None:
    w = weight(kind, 35, 70, 32)
    x = floats(shape)
    y = w.linear(x, activation=SYMMETRIC)
    assert y.shape == (*shape[:-1], 35)
    same_tensor(y.reshape(-1, 35), w.linear(x.reshape(-1, 70), activation=SYMMETRIC))


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_any_strides(kind: Kind) -> None:
    w = weight(kind, 35, 70, 32)
    x, bias = awkward((13, 70)), floats((35,))
    for activation in (SYMMETRIC, ASYMMETRIC):
        want = w.linear(x, bias, activation=activation)
        for name, view in strided(x):
            assert torch.equal(view, x), name
            same_tensor(w.linear(view, bias, activation=activation), want)
        same_tensor(w.linear(x, torch.stack([bias, bias], 1)[:, 0], activation=activation), want)
        same_tensor(
            w.linear(x[:1].expand(13, 70), bias, activation=activation),
            want[:1].expand(13, 35),
        )
        batch = x[:12].reshape(3, 4, 70).transpose(0, 1)
        got = w.linear(batch, bias, activation=activation)
        same_tensor(got, want[:12].reshape(3, 4, 35).transpose(0, 1))


@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(INTEGER_KINDS))
    m, n, k = (data.draw(st.integers(0, top)) for top in (40, 60, 150))
    w = weight(
        kind, n, k, data.draw(st.just(-1) | st.integers(1, 160)), seed=data.draw(st.integers(0, 9))
    )
    dtype = data.draw(st.sampled_from(FLOATS))
    x = awkward((m, k), dtype, seed=data.draw(st.integers(0, 9)))
    bias = data.draw(st.none() | st.sampled_from(FLOATS).map(lambda t: floats((n,), t)))
    activation = data.draw(st.sampled_from([SYMMETRIC, ASYMMETRIC]))
    premul = data.draw(st.none() | st.just(torch.exp(floats((k,), seed="premul"))))
    perm = data.draw(st.none() | st.permutations(range(k)).map(torch.tensor)) if k else None
    y = w.linear(x, bias, activation=activation, premul=premul, perm=perm)
    same_bits(y, w.integer(x, bias, activation, premul=premul, perm=perm))
