"""W8A16, W4A16 and NF4: inside a bound that follows from the number of roundings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference as ref
from helpers.check import bf16_instruction_bound, float_path_bound, same_tensor, within
from helpers.data import (
    FEATURES_IN,
    FEATURES_OUT,
    FLOATS,
    GROUPS,
    KINDS,
    ROWS,
    Kind,
    Weight,
    awkward,
    floats,
    rng,
    strided,
    weight,
)
from qkernels import _C


def check(
    w: Weight, x: torch.Tensor, bias: torch.Tensor | None = None,
    premul: torch.Tensor | None = None, perm: torch.Tensor | None = None,
) -> None:  # fmt: skip
    y = w.linear(x, bias, premul=premul, perm=perm)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], w.n)
    a = ref.values(x).reshape(int(np.prod(x.shape[:-1])), w.k)
    a = a if premul is None else a * ref.values(premul)
    a = (a if perm is None else a[:, perm.numpy()]).astype(np.float64)
    exact = w.exact()
    want = a @ exact.T
    by_instruction = _C.isa() == "avx512bf16" and x.dtype == torch.bfloat16 and premul is None
    added = w.from_middle() if by_instruction and w.kind.form is ref.INT4 else exact
    bound = float_path_bound(a, added, w.scale.shape[1])
    if by_instruction:
        bound = bound + bf16_instruction_bound(a, added, w.scale, w.kind.form is ref.NF4)
    if bias is not None:
        want = want + ref.values(bias)
        bound = bound + 2.0**-23 * np.abs(ref.values(bias))
    within(y, want.reshape(y.shape), bound.reshape(y.shape))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes(kind: Kind) -> None:
    for i, n in enumerate(FEATURES_OUT):
        for j, k in enumerate(FEATURES_IN):
            w = weight(kind, n, k, GROUPS[(i + j) % len(GROUPS)])
            m = ROWS[(i * len(FEATURES_IN) + j) % len(ROWS)]
            bias = floats((n,), FLOATS[i % 3], seed="bias") if j % 2 else None
            check(w, awkward((m, k), FLOATS[(i + j) % 3], seed=(i, j)), bias)


@pytest.mark.parametrize("m", [*ROWS, 96, 129, 300])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows(kind: Kind, m: int) -> None:
    for n, k, group_size in ((50, 72, -1), (33, 70, 32), (96, 64, 16)):
        check(weight(kind, n, k, group_size), awkward((m, k), seed=m))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_shapes(kind: Kind) -> None:
    for m in ROWS:
        for n in FEATURES_OUT:
            for i, k in enumerate(FEATURES_IN):
                for group_size in (-1, GROUPS[1 + (m + n + i) % 6]):
                    check(weight(kind, n, k, group_size), awkward((m, k), FLOATS[i % 3]))


@pytest.mark.parametrize(
    "group_size", [-1, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 64, 99, 100, 128, 10**9]
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_groups(kind: Kind, group_size: int) -> None:
    for k in (100, 129):
        check(weight(kind, 35, k, group_size), awkward((9, k), seed=group_size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_types(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    for kind in KINDS:
        bias = None if bias_dtype is None else floats((37,), bias_dtype)
        for m in (1, 19):
            check(weight(kind, 37, 70, 32), awkward((m, 70), dtype), bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_premul_and_perm(kind: Kind, dtype: torch.dtype) -> None:
    for m, k in ((1, 33), (18, 100)):
        w = weight(kind, 35, k, 32)
        x = awkward((m, k), dtype)
        premul = torch.exp(floats((k,), seed="premul"))
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        for by, at in ((premul, None), (None, perm), (premul, perm)):
            check(w, x, None, by, at)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.form is ref.INT4 and not k.symmetric], ids=str
)
def test_far_from_zero(kind: Kind, dtype: torch.dtype) -> None:
    """Activations that are all near 3: what a zero point adds is most of the result."""
    for n, k, group_size in ((50, 320, 32), (33, 1030, -1), (100, 70, 24)):
        w = weight(kind, n, k, group_size)
        x = floats((97, k), dtype) * 0.1 + 3
        whole = w.linear(x)
        for rows in (1, 2, 5, 16, 97):
            check(w, x[:rows])
            same_tensor(w.linear(x[:rows]), whole[:rows])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_hot_rows_read_the_weight_itself(kind: Kind) -> None:
    """Every weight at its place: a wrong nibble, group or lane cannot hide in a sum."""
    w = weight(kind, 50, 77, 24)
    want = w.exact().T
    for copies in (1, 2):  # for few rows and for many
        x = torch.eye(77).repeat(copies, 1)
        expected = np.tile(want, (copies, 1))
        np.testing.assert_allclose(w.linear(x).numpy(), expected, rtol=2.0**-22, atol=0)
        got = w.linear(x.bfloat16()).float()
        np.testing.assert_allclose(got.numpy(), expected, rtol=1.01 * 2.0**-7, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.form is ref.INT8], ids=str)
def test_every_code_of_int8_is_exact(kind: Kind, dtype: torch.dtype) -> None:
    """In every place of a line, for each number of rows of a tile and for many rows."""
    codes = (np.arange(256) + 37 * np.arange(20)[:, None]) % 256 - 128
    w = weight(kind, 20, 256, 32, codes=codes)
    want = torch.from_numpy(w.exact().T.astype(np.float32)).to(dtype)
    x = torch.eye(256).to(dtype)
    for rows in (1, 2, 3, 6, 7, 8, 47, 48, 128):
        got = torch.cat([w.linear(part.contiguous()) for part in x.split(rows)])
        assert torch.equal(got, want), rows


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_long_rows(kind: Kind) -> None:
    """Sums where an accumulation in another type would show, of more than is read at once."""
    check(weight(kind, 17, 8192, 128), floats((2, 8192)))
    for i, k in enumerate((511, 512, 513, 1025)):
        for group_size in (-1, 7, 512, 513):
            check(weight(kind, 18, k, group_size), floats((9, k), FLOATS[i % 3]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 5, 70), (2, 3, 4, 70), (0, 70), (2, 0, 70)])
def test_any_batch_rank(kind: Kind, shape: tuple[int, ...]) -> None:
    check(weight(kind, 35, 70, 32), floats(shape))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_strides(kind: Kind) -> None:
    w = weight(kind, 35, 70, 32)
    x, bias = awkward((13, 70)), floats((35,))
    want = w.linear(x, bias)
    for name, view in strided(x):
        assert torch.equal(view, x), name
        same_tensor(w.linear(view, bias), want)
    same_tensor(w.linear(x, torch.stack([bias, bias], 1)[:, 0]), want)
    batch = x[:12].reshape(3, 4, 70).transpose(0, 1)
    same_tensor(w.linear(batch, bias), want[:12].reshape(3, 4, 35).transpose(0, 1))


@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    m, n, k = (data.draw(st.integers(0, top)) for top in (40, 60, 150))
    group_size = data.draw(st.just(-1) | st.integers(1, 160))
    w = weight(kind, n, k, group_size, seed=data.draw(st.integers(0, 9)))
    x = awkward((m, k), data.draw(st.sampled_from(FLOATS)), seed=data.draw(st.integers(0, 9)))
    bias = data.draw(st.none() | st.sampled_from(FLOATS).map(lambda t: floats((n,), t)))
    check(w, x, bias)
