"""linear with float activations as CUDA kernels, run by the emulator: inside the bound that holds
on the CPU, and the same bits for a row however it is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import HALF_ULP, float_path_bound, same_tensor, within
from helpers.cuda import hopper
from helpers.data import FLOATS, KINDS, Kind, Weight, awkward, floats, rng, strided, weight

HALVES = (torch.bfloat16, torch.float16)


def packed(ops: Any, w: Weight) -> Tensor:
    arguments = (w.data, w.scale_tensor, w.zero_tensor, w.kind.cuda_layout, w.k, w.group_size)
    bits: Tensor = ops.pack(*arguments)
    return bits


def linear(
    ops: Any, w: Weight, x: Tensor, bias: Tensor | None = None, *, epilogue: int = 0,
    premul: Tensor | None = None, perm: Tensor | None = None, bits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sizes = (w.kind.cuda_layout, w.k, w.n, w.group_size, 0, epilogue)
    bits = packed(ops, w) if bits is None else bits
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


@pytest.mark.parametrize("group_size", [-1, 1, 7, 16, 31, 32, 33, 64, 96, 100, 128, 10**9])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_groups(ops: Any, kind: Kind, group_size: int) -> None:
    for m, k, dtype in ((2, 129, HALVES[0]), (9, 200, HALVES[1])):
        check(ops, weight(kind, 19, k, group_size), awkward((m, k), dtype, seed=group_size))


# Rows, outputs, k and group size for a GEMV of one block, of two and of four, tiles of 16, 32 and
# 64 rows that split k over thread blocks, and the same that add up all slices by themselves.
WAYS = [(1, 40, 520, 128), (2, 770, 480, -1), (4, 1540, 456, 40)]
WAYS += [(11, 40, 512, 32), (30, 256, 1000, 128), (64, 250, 1000, 40)]
WAYS += [(25, 260, 480, -1), (30, 520, 456, 40), (50, 520, 512, 32)]
PAIRS = [(kind, HALVES[i % 2]) for i, kind in enumerate((KINDS[3], KINDS[1], KINDS[6], KINDS[5]))]


@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=str)
def test_every_way_to_share_out_the_work(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    for i, (m, n, k, group_size) in enumerate(WAYS):
        w = weight(kind, n, k, group_size)
        check(ops, w, awkward((m, k), dtype, seed=i), floats((n,), seed="bias"))


@pytest.mark.parametrize(
    ("kind", "dtype"), [*PAIRS, (KINDS[4], torch.float32), (KINDS[7], torch.float32)], ids=str
)
def test_rows_alone_and_in_company(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    """A row's bits do not depend on the others: not by kernel, tile, or how k is split. But on
    Hopper more than 8 rows of 16 bits have a kernel of their own."""
    for n, k, group_size, many in ((20, 520, 32, 70), (262, 450, -1, 36)):
        w = weight(kind, n, k, group_size)
        bits, bias = packed(ops, w), floats((n,))
        many = many // 3 if dtype == torch.float32 else many
        x = awkward((many, k), dtype)
        whole = linear(ops, w, x, bias, bits=bits, epilogue=2)
        apart = hopper(ops) and dtype != torch.float32
        for m in (9, 17) if apart else (1, 3, 9, 17):
            same_tensor(linear(ops, w, x[:m], bias, bits=bits, epilogue=2), whole[:m])
            last = linear(ops, w, x[many - m :], bias, bits=bits, epilogue=2)
            same_tensor(last, whole[many - m :])


@pytest.fixture
def sm90(sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has the instructions of sm_90a, and no number of rows goes to matmul."""
    monkeypatch.setenv("QKERNELS_MATMUL_ROWS", str(1 << 40))


# Rows, outputs, k and group size: the three widths of a tile and several tiles of rows; clusters of
# 1, 2, 4 and 8 blocks of 1, 2 and 4 teams, the last of them with fewer stages or none; more stages
# than a ring has; groups of one chunk, of three, of all k, ragged ones, and some that go on in the
# next slice.
CLUSTERS = [(9, 40, 128, 32), (16, 300, 640, 128), (17, 257, 96, 96), (33, 20, 1024, 64)]
CLUSTERS += [(65, 100, 200, 24), (130, 512, 320, -1), (20, 16, 4200, 32), (70, 530, 2304, 640)]
CLUSTERS += [(12, 1030, 1664, 96), (64, 1, 1, -1), (18, 300, 1100, 96), (10, 9, 7950, 96)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_warpgroups(ops: Any, sm90: None, kind: Kind) -> None:
    for i, (m, n, k, group_size) in enumerate(CLUSTERS):
        w = weight(kind, n, k, group_size)
        for dtype in HALVES if i % 3 == 0 else HALVES[i % 2 :][:1]:
            bias = floats((n,), FLOATS[i % 3], seed="bias") if i % 2 else None
            check(ops, w, awkward((m, k), dtype, seed=i), bias)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_warpgroups_alone_and_in_company(ops: Any, sm90: None, kind: Kind) -> None:
    """A row's bits are the same in every tile, and what one row holds stays in it."""
    dtype = HALVES[kind.symmetric]
    for n, k, group_size in ((20, 1024, 32), (262, 450, -1), (270, 1100, 96)):
        w = weight(kind, n, k, group_size)
        bits, bias, x = packed(ops, w), floats((n,)), floats((70, k), dtype)
        whole = linear(ops, w, x, bias, bits=bits, epilogue=2)
        same_tensor(linear(ops, w, x, bias, bits=bits, epilogue=2), whole)
        for m in (9, 16, 31, 64):
            same_tensor(linear(ops, w, x[70 - m :], bias, bits=bits, epilogue=2), whole[70 - m :])
        x[3, k // 2] = float("nan")
        broken = linear(ops, w, x, bias, bits=bits, epilogue=2)
        assert torch.isnan(broken[3]).all()
        same_tensor(broken[torch.arange(70) != 3], whole[torch.arange(70) != 3])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_warpgroups_read_the_weight_itself(ops: Any, sm90: None, kind: Kind) -> None:
    """Every weight at its place, and every code against its zero point."""
    w = weight(kind, 50, 160, 32)
    bits, want = packed(ops, w), w.exact().T
    for dtype, digits in ((torch.bfloat16, 7), (torch.float16, 10)):
        got = linear(ops, w, torch.eye(160).to(dtype), bits=bits).float().numpy()
        np.testing.assert_allclose(got, want, rtol=2.1 * 2.0**-digits, atol=2.0**-24)


def test_warpgroups_with_premul_perm_and_strides(ops: Any, sm90: None) -> None:
    w = weight(KINDS[4], 35, 128, 32)
    x = floats((18, 128), torch.bfloat16)
    premul = torch.exp(floats((128,), seed="premul"))
    check(ops, w, x, None, premul, torch.from_numpy(rng("perm").permutation(128)))
    want = linear(ops, w, x)
    for _, view in strided(x):
        same_tensor(linear(ops, w, view), want)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outputs_do_not_depend_on_the_other_outputs(ops: Any, kind: Kind) -> None:
    """Where the slices of k are the same, which they are for all short rows."""
    w = weight(kind, 112, 200, 32)
    bits = packed(ops, w)
    for m in (1, 5, 18):
        x = awkward((m, 200), HALVES[m % 2])
        whole = linear(ops, w, x, bits=bits)
        for begin, end in ((0, 16), (48, 112)):
            sizes = (w.kind.cuda_layout, 200, end - begin, 32, 0, 0)
            part = ops.linear(x, bits[begin // 16 : end // 16], *[None] * 5, *sizes)
            same_tensor(part, whole[:, begin:end])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS[::2], ids=str)
def test_premul_and_perm(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    for m, k in ((1, 33), (18, 128)):
        w = weight(kind, 35, k, 32)
        x = floats((m, k), dtype)
        premul = torch.exp(floats((k,), seed="premul"))
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        for by, at in ((premul, None), (None, perm), (premul, perm)):
            check(ops, w, x, None, by, at)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_hot_rows_read_the_weight_itself(ops: Any, kind: Kind) -> None:
    """Every weight at its place: a wrong nibble, group or lane cannot hide in a sum."""
    w = weight(kind, 50, 77, 24)
    want = w.exact().T
    bits = packed(ops, w)
    x = torch.eye(77)
    got = linear(ops, w, x, bits=bits).numpy()
    np.testing.assert_allclose(got, want, rtol=2.0**-22, atol=0)
    for row in range(0, 77, 5):
        got = linear(ops, w, x[row], bits=bits).numpy()
        np.testing.assert_allclose(got, want[row], rtol=2.0**-22, atol=0)
        for dtype, digits in ((torch.bfloat16, 7), (torch.float16, 10)):
            got = linear(ops, w, x[row].to(dtype), bits=bits).float().numpy()
            np.testing.assert_allclose(got, want[row], rtol=2.1 * 2.0**-digits, atol=2.0**-24)


@pytest.mark.parametrize("kind", KINDS[3:8:2], ids=str)
def test_every_code_in_every_type(ops: Any, kind: Kind) -> None:
    """Against every zero point, so that no difference of the two is missing."""
    k = 256
    w = weight(kind, 16, k, 32, codes=np.tile(np.arange(16), (16, 16)))
    if w.zero_tensor is not None:
        zero = np.arange(128).reshape(16, 8) % 121
        w = replace(w, zero=zero, zero_tensor=torch.from_numpy(zero.astype(np.uint8)))
    x = torch.eye(k)[torch.arange(k) % 32 < 16]  # each code once in a group
    for dtype in HALVES:
        check(ops, w, x.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types_of_bias(ops: Any, dtype: torch.dtype) -> None:
    for bias_dtype in FLOATS:
        for m in (1, 19):
            w = weight(KINDS[3], 37, 70, 32)
            check(ops, w, awkward((m, 70), dtype), floats((37,), bias_dtype))


@pytest.mark.parametrize("epilogue", range(7))
def test_functions_of_the_result(ops: Any, epilogue: int) -> None:
    """What no function gives, put through the CPU's."""
    w = weight(KINDS[3], 37, 70, 32)
    for m in (3, 20):
        x = floats((m, 70))
        plain = linear(ops, w, x)
        got = linear(ops, w, x, epilogue=epilogue)
        one = weight(Kind(ref.INT8, True, torch.float32), 37, 37, codes=np.eye(37, dtype=np.int64))
        ones = torch.ops.qkernels.pack(one.data, torch.ones(37, 1), None, one.kind.layout, 37, -1)
        want = torch.ops.qkernels.linear(
            plain, ones, *[None] * 5, one.kind.layout, 37, 37, -1, 0, epilogue
        )
        same_tensor(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_stay_in_their_row(ops: Any, dtype: torch.dtype) -> None:
    w = weight(KINDS[3], 40, 100, 32)
    bits = packed(ops, w)
    for m in (5, 20):
        x = floats((m, 100), dtype)
        want = linear(ops, w, x, bits=bits)
        for bad in (float("nan"), float("inf"), float("-inf")):
            broken = x.clone()
            broken[3, 50] = bad
            got = linear(ops, w, broken, bits=bits)
            assert not torch.isfinite(got[3]).any()
            assert torch.isnan(got[3, w.codes[:, 50] == 8]).all()
            if bad != bad:
                assert torch.isnan(got[3]).all()
            keep = torch.arange(m) != 3
            same_tensor(got[keep], want[keep])


def test_a_broken_weight_breaks_its_own_output_only(ops: Any) -> None:
    w = weight(KINDS[3], 40, 100, 32)
    x = floats((3, 100), torch.bfloat16)
    want = linear(ops, w, x)
    w.scale_tensor[17, 2] = float("nan")
    got = linear(ops, w, x)
    assert torch.isnan(got[:, 17]).all()
    keep = torch.arange(40) != 17
    same_tensor(got[:, keep], want[:, keep])


def test_any_strides(ops: Any) -> None:
    w = weight(KINDS[3], 35, 128, 32)
    bits = packed(ops, w)
    for dtype in FLOATS:
        x = awkward((13, 128), dtype)
        want = linear(ops, w, x, bits=bits)
        for _, view in strided(x):
            same_tensor(linear(ops, w, view, bits=bits), want)
        # Contiguous, but no 16-byte line begins there.
        shifted = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].reshape(x.shape)
        same_tensor(linear(ops, w, shifted, bits=bits), want)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (0, 70), (2, 0, 70)])
def test_any_batch_rank(ops: Any, shape: tuple[int, ...]) -> None:
    check(ops, weight(KINDS[3], 35, 70, 32), floats(shape, torch.bfloat16))


def test_nothing_to_do(ops: Any) -> None:
    for dtype in FLOATS:
        for n, k, group_size in ((0, 5, -1), (5, 0, -1), (5, 0, 8)):
            check(ops, weight(KINDS[3], n, k, group_size), floats((3, k), dtype), floats((n,)))


def test_an_index_that_is_none_gives_nan(ops: Any) -> None:
    """The glue of a GPU does not read k_perm."""
    w = weight(KINDS[3], 20, 64, 32)
    perm = torch.arange(64)
    perm[5] = 64
    assert torch.isnan(linear(ops, w, floats((2, 64)), perm=perm)).all()


def test_wrong_calls_say_what_is_wrong(ops: Any) -> None:
    w = weight(KINDS[3], 20, 64, 32)
    with pytest.raises(RuntimeError, match="linear: x has 63 features"):
        linear(ops, w, torch.ones(2, 63))
    with pytest.raises(RuntimeError, match="packed for another device"):
        ops.linear(torch.ones(2, 64), w.packed, *[None] * 5, *w.sizes, 0, 0)
