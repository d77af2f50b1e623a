"""Attention: near exact arithmetic, and the same bits however the work is cut."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.check import same_tensor, within
from helpers.data import FLOATS, floats, strided
from qkernels import functional
from qkernels.ops_transformer import attention_by_torch

ops = torch.ops.qkernels
UNIT = 2.0**-24

# Batch, rows, keys, heads, heads of k, features and value features.
SHAPES = [
    (1, 32, 32, 12, 12, 32, 32),
    (2, 33, 65, 4, 2, 16, 16),
    (1, 1, 130, 8, 2, 64, 64),
    (3, 1, 17, 2, 2, 5, 3),
    (2, 7, 3, 3, 3, 5, 18),
    (1, 100, 64, 2, 1, 40, 33),
    (2, 17, 200, 2, 2, 8, 1),
    (1, 129, 129, 1, 1, 127, 128),
    (1, 31, 33, 2, 2, 1, 47),
    (1, 13, 129, 1, 1, 17, 49),
    (2, 5, 1, 6, 3, 8, 8),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, rows, keys, heads, kv_heads, size, value_size = shape
    q = floats((batch, rows, heads * size), dtype, "q")
    k = floats((batch, keys, kv_heads * size), dtype, "k")
    return q, k, floats((batch, keys, kv_heads * value_size), dtype, "v")


def masks(shape: tuple[int, ...]) -> Iterator[Tensor | None]:
    """Of every kind and rank; the last ones leave some rows with no key at all."""
    batch, rows, keys, heads, *_ = shape
    yield None
    yield floats((rows, keys), torch.bfloat16, "mask")
    yield floats((batch, 1, 1, keys), seed="mask").expand(-1, heads, rows, -1)
    yield floats((1, heads, rows, 1), torch.float16, "mask")
    padding = floats((batch, 1, 1, keys), seed="bool") > -0.3
    yield padding
    each = floats((heads, keys, rows), seed="bool").transpose(1, 2) > 0.5
    each[:, ::3] = False
    yield each
    yield torch.where(each, floats((heads, rows, keys), seed="mask"), -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, heads: int, causal: bool = False) -> Tensor:
    return ops.attention(q, k, v, mask, heads, 0.7 * (q.shape[2] / heads) ** -0.5, causal)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far one in float32 may be from it (docs/NUMERICS.md)."""
    size = q.shape[2] // heads
    group = heads * size // k.shape[2]
    scale = torch.tensor(0.7 * size**-0.5).double()
    q, k, v = (t.double() for t in (q, k, v))
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = (
        t.unflatten(2, (heads // group, -1)).transpose(1, 2).repeat_interleave(group, 1)
        for t in (k, v)
    )
    added = torch.zeros((), dtype=torch.float64)
    if mask is not None:
        added = mask.double()
        if mask.dtype == torch.bool:
            added = added.masked_fill(~mask, -math.inf).masked_fill(mask, 0)
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        added = torch.zeros(later.shape).double().masked_fill(later, -math.inf) + added
    weights = (scale * q @ k.transpose(2, 3) + added).softmax(-1).nan_to_num(0)
    products = scale * q.abs() @ k.abs().transpose(2, 3)
    finite = added.abs().masked_fill(added.isinf(), 0)
    of_scores = ((size + 4) * products + 2 * finite).amax(-1, keepdim=True) + 90
    keys = k.shape[2]
    bound = UNIT * (2 * of_scores + 2 * keys + 16) * (weights @ v.abs())
    bound += keys * 2.0**-125 * v.abs().amax(2, keepdim=True)
    return tuple((t.transpose(1, 2).flatten(2)) for t in (weights @ v, 1.01 * bound))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_shape
def test_shapes_and_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = operands(shape, dtype)
    heads = shape[3]
    for mask in masks(shape):
        for causal in (False, True):
            y = attend(q, k, v, mask, heads, causal)
            assert y.dtype == dtype
            assert y.is_contiguous()
            want, bound = exact(q, k, v, mask, heads, causal)
            assert y.shape == want.shape
            within(y, want.numpy(), bound.numpy())


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2, 5, 5), (2, 0, 4, 2, 2, 5, 5)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    assert attend(*operands(shape), None, 2).shape == (shape[0], shape[1], 10)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_no_keys(rows: int) -> None:
    for causal in (False, True):
        y = attend(*operands((2, rows, 0, 4, 2, 5, 19)), None, 4, causal)
        assert torch.equal(y, torch.zeros(2, rows, 4 * 19))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    for shape in ((1, 33, 37, 2, 1, 16, 16), (1, 1, 70, 4, 4, 20, 11)):
        q, k, v = operands(shape, dtype)
        want = attend(q, k, v, None, shape[3])
        for i, t in enumerate((q, k, v)):
            for name, view in strided(t[0]):
                given = [q, k, v]
                given[i] = view[None]
                same_tensor(attend(*given, None, shape[3]), want), name
    q, k, v = operands((3, 9, 9, 2, 2, 8, 8), dtype)
    whole = torch.cat([q, k, v], 2)
    want = attend(q, k, v, None, 2)
    same_tensor(attend(*whole.split(16, 2), None, 2), want)
    turned = whole.transpose(0, 1).contiguous().transpose(0, 1)
    same_tensor(attend(*turned.split(16, 2), None, 2), want)
    same_tensor(
        attend(q[:1].expand(3, -1, -1), k[:1].expand(3, -1, -1), v[:1].expand(3, -1, -1), None, 2),
        want[:1].expand(3, -1, -1),
    )


@each_shape
def test_masks_of_any_strides(shape: tuple[int, ...]) -> None:
    batch, rows, keys, heads, *_ = shape
    q, k, v = operands(shape)
    for mask in masks(shape):
        if mask is None:
            continue
        whole = mask.expand(batch, heads, rows, keys)
        want = attend(q, k, v, whole.contiguous(), heads)
        for given in (mask, whole, whole.transpose(1, 2).contiguous().transpose(1, 2)):
            same_tensor(attend(q, k, v, given, heads), want)
        turned = whole.transpose(2, 3).contiguous().transpose(2, 3)
        same_tensor(attend(q, k, v, turned, heads), want)
        if mask.dtype == torch.bool:
            added = torch.zeros(whole.shape).masked_fill(~whole, -math.inf)
            same_tensor(attend(q, k, v, added, heads), want)


@each_shape
def test_shared_heads_are_repeated_heads(shape: tuple[int, ...]) -> None:
    _batch, _rows, _keys, heads, kv_heads, *_ = shape
    q, k, v = operands(shape)
    repeated = [
        t.unflatten(2, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 2).flatten(2)
        for t in (k, v)
    ]
    for mask in masks(shape):
        for causal in (False, True):
            same_tensor(
                attend(q, k, v, mask, heads, causal), attend(q, *repeated, mask, heads, causal)
            )


@each_shape
def test_causal_is_a_mask(shape: tuple[int, ...]) -> None:
    q, k, v = operands(shape)
    lower = torch.ones(shape[1], shape[2], dtype=torch.bool).tril()
    same_tensor(attend(q, k, v, None, shape[3], True), attend(q, k, v, lower, shape[3]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parts_are_parts_of_the_whole(dtype: torch.dtype) -> None:
    """A row's bits depend neither on the other rows, nor on other heads and sequences."""
    for shape in ((3, 70, 150, 4, 2, 24, 40), (2, 33, 33, 2, 2, 64, 64)):
        q, k, v = operands(shape, dtype)
        heads, size, values = shape[3], shape[5], shape[6]
        whole = attend(q, k, v, None, heads)
        for batch in range(shape[0]):
            alone = [t[batch : batch + 1] for t in (q, k, v)]
            same_tensor(attend(*alone, None, heads), whole[batch : batch + 1])
        for begin, end in ((0, 1), (1, 3), (5, 21), (16, 33), (31, 32)):
            same_tensor(attend(q[:, begin:end], k, v, None, heads), whole[:, begin:end])
        group = heads // shape[4]
        for head in range(heads):
            to = head // group
            one = (q[..., head * size :][..., :size], k[..., to * size :][..., :size])
            y = attend(*one, v[..., to * values :][..., :values], None, 1)
            same_tensor(y, whole[..., head * values :][..., :values])
        causal = attend(q, k, v, None, heads, True)
        same_tensor(attend(q[:, :30], k, v, None, heads, True), causal[:, :30])


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    q, k, v = operands((2, 130, 300, 4, 2, 64, 64))
    try:
        torch.set_num_threads(1)
        one = [attend(q, k, v, None, 4, causal) for causal in (False, True)]
        torch.set_num_threads(2)
        two = [attend(q, k, v, None, 4, causal) for causal in (False, True)]
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        same_tensor(a, b)


# ---- What is not ordinary ------------------------------------------------------------------------


def test_rows_that_attend_to_nothing_are_zero() -> None:
    q, k, v = operands((2, 35, 40, 2, 2, 16, 16))
    for mask in (torch.zeros(35, 40, dtype=torch.bool), torch.full((40,), -math.inf)):
        assert torch.equal(attend(q, k, v, mask, 2), torch.zeros(2, 35, 32))
    mask = torch.ones(35, 40, dtype=torch.bool)
    mask[[0, 17, 34]] = False
    y = attend(q, k, v, mask, 2)
    assert (y[:, [0, 17, 34]] == 0).all()
    same_tensor(y[:, 1:17], attend(q, k, v, None, 2)[:, 1:17])


def test_hidden_keys_have_weight_zero_exactly() -> None:
    q, k, v = operands((1, 20, 40, 2, 2, 16, 16))
    mask = torch.arange(40) < 23
    want = attend(q, k[:, :23], v[:, :23], None, 2)
    same_tensor(attend(q, k, v * torch.where(mask, 1, 1e37)[:, None], mask, 2), want)


def test_large_scores() -> None:
    for factor in (1e3, 1e18):
        q, k, v = operands((1, 20, 40, 1, 1, 16, 16))
        y = attend(q * factor, k, v, None, 1)
        assert y.isfinite().all()
        best = (q @ k.transpose(1, 2)).argmax(-1)
        torch.testing.assert_close(y[0], v[0, best[0]], rtol=0.3 if factor == 1e3 else 0, atol=2e-2)
    q, k, v = operands((1, 20, 40, 1, 1, 16, 16))
    low = torch.full((20, 40), -1e30)
    same_tensor(attend(q * 0, k, v, low, 1), attend(q * 0, k, v, None, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_touches_no_other(bad: float) -> None:
    q, k, v = operands((2, 35, 40, 2, 2, 16, 16))
    want = attend(q, k, v, None, 2)
    q[1, 7, 3] = bad
    y = attend(q, k, v, None, 2)
    assert y[1, 7, :16].isnan().all()
    same_tensor(y[1, 7, 16:], want[1, 7, 16:])
    y[1, 7] = want[1, 7]
    same_tensor(y, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_keys_and_values_reach_those_that_see_them(bad: float, dtype: torch.dtype) -> None:
    q, k, v = operands((1, 70, 70, 1, 1, 16, 16), dtype)
    want = attend(q, k, v, None, 1, True)
    for at in (1, 33, 41, 69):
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[0, at, 3] = math.nan
        v_bad[0, at, 3] = bad
        y = attend(q, k_bad, v, None, 1, True)
        same_tensor(y[:, :at], want[:, :at])
        assert y[:, at:].isnan().all()
        y = attend(q, k, v_bad, None, 1, True)
        same_tensor(y[:, :at], want[:, :at])
        assert not y[:, at:, 3].isfinite().any()
        others = [i for i in range(16) if i != 3]
        same_tensor(y[..., others], want[..., others])


def test_a_nan_in_the_mask() -> None:
    q, k, v = operands((1, 20, 40, 1, 1, 16, 16))
    mask = torch.zeros(20, 40)
    mask[3, 11] = math.nan
    y = attend(q, k, v, mask, 1)
    assert y[0, 3].isnan().all()
    assert y[0, 4:].isfinite().all()


# ---- In Python -----------------------------------------------------------------------------------


@each_shape
def test_torchs_kernels_in_its_place(shape: tuple[int, ...]) -> None:
    """What runs on CUDA."""
    q, k, v = operands(shape)
    for mask in masks(shape):
        for causal in (False, True):
            y = attention_by_torch(q, k, v, mask, shape[3], 0.7 * shape[5] ** -0.5, causal)
            assert y.is_contiguous()
            torch.testing.assert_close(y, attend(q, k, v, mask, shape[3], causal))


def test_function() -> None:
    q, k, v = operands((2, 5, 7, 4, 2, 8, 8))
    same_tensor(
        functional.attention(q, k, v, heads=4), ops.attention(q, k, v, None, 4, 8**-0.5, False)
    )
    mask = torch.ones(5, 7, dtype=torch.bool)
    same_tensor(
        functional.attention(q, k, v, mask, heads=4, scale=0.5, causal=True),
        ops.attention(q, k, v, mask, 4, 0.5, True),
    )


def test_gradients_are_refused() -> None:
    q, k, v = operands((1, 2, 2, 1, 1, 4, 4))
    for i in range(3):
        given = [t.clone().requires_grad_(i == j) for j, t in enumerate((q, k, v))]
        with pytest.raises(RuntimeError, match=r"attention has no gradient .* torch.no_grad\(\)"):
            functional.attention(*given, heads=1)
        with torch.no_grad():
            same_tensor(
                functional.attention(*given, heads=1), functional.attention(q, k, v, heads=1)
            )


def test_autocast() -> None:
    q, k, v = operands((1, 5, 7, 2, 2, 8, 8))
    mask = floats((5, 7))
    want = functional.attention(*(t.bfloat16() for t in (q, k, v)), mask, heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        same_tensor(functional.attention(q, k.bfloat16(), v, mask, heads=2), want)


def test_compiles_with_any_number_of_rows() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: functional.attention(q, k, v, heads=4, causal=True),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for rows in (5, 9, 33):
        given = operands((2, rows, rows + 2, 4, 2, 8, 12))
        same_tensor(compiled(*given), functional.attention(*given, heads=4, causal=True))
    assert counter.frame_count == 1
    torch.compiler.reset()
