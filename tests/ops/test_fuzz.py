"""No arguments crash the process: a wrong call raises, a right one gives what its schema says.

Drawn calls mix right and wrong values of every argument, among them numbers that overflow.
"""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.data import FLOATS, KINDS, floats, weight
from helpers.layout import layout_id
from qkernels import _C

ops = torch.ops.qkernels

# Calls are cheap and wrong ones are many.
many = settings(max_examples=5 * settings().max_examples)

SIZES = st.integers(0, 40)
FAR = st.sampled_from([-(2**63), -(2**31), -17, -2, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1])
ANY_DTYPE = st.sampled_from(
    [
        *FLOATS,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    ]
)
LAYOUTS = st.sampled_from([kind.layout for kind in KINDS]) | st.sampled_from(
    [0, -1, 2**62, layout_id(KINDS[0].form, 0, True, 2), layout_id(KINDS[0].form, 0, True, 1, 7)]
)


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda i: wrong if i == 0 else right)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of this shape and type nine times out of ten, with any strides."""
    dtype = draw(mostly(st.just(dtype), ANY_DTYPE))
    shape = draw(mostly(st.just(shape), st.lists(st.integers(0, 5), max_size=4).map(tuple)))
    x = (3 * floats(shape)).to(dtype)
    kind = draw(st.integers(0, 9))
    if kind == 0 and x.dim() == 2:
        x = x.t().contiguous().t()
    elif kind == 1 and x.dim() >= 1:
        x = torch.stack([x, x], -1)[..., 0]
    elif kind == 2 and x.dim() >= 1 and x.shape[0] > 0:
        x = x[:1].expand(x.shape)
    return x


def attempt(op: Any, *args: Any) -> Any:
    """The result, or None where a sentence was given instead."""
    try:
        return op(*args)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        assert len(str(error)) > 20
        return None


@many
@given(data=st.data())
def test_quantize_and_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    x = data.draw(tensors(shape, data.draw(st.sampled_from(FLOATS))))
    form = data.draw(mostly(st.integers(0, 3), FAR))
    group_size = data.draw(mostly(st.none() | st.just(-1) | st.integers(1, 12), FAR | st.just(0)))
    scale_dtype = data.draw(st.none() | ANY_DTYPE)
    result = attempt(ops.quantize, x, form, group_size, data.draw(st.booleans()), scale_dtype)
    if result is None:
        return
    codes, scale, zero = result
    features = data.draw(
        mostly(st.just(x.shape[-1]), FAR.filter(lambda n: n < 2**31 - 1 or n > 2**41))
    )
    dtype = data.draw(mostly(st.sampled_from(FLOATS), ANY_DTYPE))
    given_scale = data.draw(mostly(st.just(scale), tensors((3, 1), torch.float32)))
    y = attempt(ops.dequantize, codes, given_scale, zero, form, group_size, features, dtype)
    assert y is None or y.shape == x.shape
    again = attempt(ops.quantize_with, x, given_scale, zero, form, group_size)
    assert again is None or again.shape == codes.shape


@many
@given(data=st.data())
def test_packed_weights(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    n, k = data.draw(SIZES), data.draw(SIZES)
    w = weight(kind, n, k, data.draw(st.just(-1) | st.integers(1, 48)))
    layout = data.draw(mostly(st.just(w.layout), LAYOUTS))
    k, n, group_size = (data.draw(mostly(st.just(size), FAR | SIZES)) for size in w.sizes[1:])
    codes = data.draw(mostly(st.just(w.data), tensors((3, 4), w.data.dtype)))
    scale = data.draw(mostly(st.just(w.scale_tensor), tensors((3, 1), kind.scale_dtype)))
    zero = data.draw(mostly(st.just(w.zero_tensor), tensors((3, 1), w.data.dtype)))
    attempt(ops.pack, codes, scale, zero, layout, k, group_size)

    packed = data.draw(mostly(st.just(w.packed), st.integers(0, 3).flatmap(
        lambda blocks: tensors((blocks, data.draw(st.integers(0, 400))), torch.uint8)
    )))  # fmt: skip
    attempt(ops.unpack, packed, layout, k, n, group_size)
    indices = data.draw(tensors((2, 3), torch.int64))
    if data.draw(st.booleans()) and indices.dtype in (torch.int64, torch.int32):
        indices = indices.abs() % max(w.n, 1)
    dtype = data.draw(mostly(st.sampled_from(FLOATS), ANY_DTYPE))
    y = attempt(ops.embedding, indices, packed, layout, n, k, group_size, dtype)
    assert y is None or y.shape == (*indices.shape, k)
    grad = data.draw(tensors((2, w.n), torch.float32))
    dx = attempt(ops.linear_backward_input, grad, packed, layout, k, n, group_size)
    assert dx is None or dx.shape == (*grad.shape[:-1], k)


@many
@given(data=st.data())
def test_linear(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    w = weight(
        kind, data.draw(SIZES), data.draw(SIZES), data.draw(st.just(-1) | st.integers(1, 48))
    )
    batch = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    x = data.draw(tensors((*batch, w.k), data.draw(st.sampled_from(FLOATS))))
    rare = st.integers(0, 3)

    def extra(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return data.draw(tensors(shape, dtype)) if data.draw(rare) == 0 else None

    bias, premul = extra((w.n,), torch.float32), extra((w.k,), torch.float32)
    x_scale, x_zero = extra((1,), torch.float32), extra((1,), torch.int8)
    perm = extra((w.k,), torch.int64)
    if perm is not None and data.draw(rare) != 0 and perm.dtype == torch.int64:
        perm = perm.abs() % max(w.k, 1)
    layout = data.draw(mostly(st.just(w.layout), LAYOUTS))
    sizes = [data.draw(mostly(st.just(size), FAR | SIZES)) for size in w.sizes[1:]]
    activation = data.draw(mostly(st.integers(0, 2), FAR))
    epilogue = data.draw(mostly(st.integers(0, 4), FAR))
    op = data.draw(st.sampled_from([ops.linear, ops.linear_differentiable]))
    rest = (bias, x_scale, x_zero, premul, perm, layout, *sizes, activation, epilogue)
    y = attempt(op, x, w.packed, *rest)
    assert y is None or (y.shape == (*x.shape[:-1], w.n) and y.dtype == x.dtype)


def scales(shape: tuple[int, ...]) -> st.SearchStrategy[torch.Tensor]:
    return mostly(st.just(torch.full(shape, 0.3)), tensors(shape, torch.float32))


@many
@given(data=st.data())
def test_pooling(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(0, 9)) for _ in range(dims + 2))
    x = data.draw(tensors(shape, torch.int8))
    size = mostly(st.integers(0, 4), FAR)
    lists = st.lists(size, min_size=dims, max_size=dims) | st.lists(size, max_size=4)
    kernel, stride, padding, dilation, out = (data.draw(lists) for _ in range(5))
    ceil = data.draw(st.booleans())
    y = attempt(ops.max_pool, x, kernel, stride, padding, dilation, ceil)
    assert y is None or (y.shape[:2] == x.shape[:2] and y.dtype == torch.int8)
    scale, zero = data.draw(scales(())), data.draw(tensors((1,), torch.int8))
    ranges = (scale, zero, data.draw(st.sampled_from([None, scale])), None)
    windows = (kernel, stride, padding, ceil, data.draw(st.booleans()))
    divisor = data.draw(st.none() | size)
    y = attempt(ops.avg_pool, x, *ranges, *windows, divisor, data.draw(st.none() | ANY_DTYPE))
    assert y is None or y.shape[:2] == x.shape[:2]
    y = attempt(ops.adaptive_avg_pool, x, *ranges, out)
    assert y is None or (y.shape[:2] == x.shape[:2] and list(y.shape[2:]) == out)


@many
@given(data=st.data())
def test_sums_and_concatenations(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=5)))
    a, b = data.draw(tensors(shape, torch.int8)), data.draw(tensors(shape, torch.int8))
    scale, zero = data.draw(scales(())), data.draw(tensors((1,), torch.int8))
    ranges = (scale, zero, scale, None, data.draw(st.sampled_from([None, scale])), None)
    y = attempt(ops.add, a, b, *ranges, data.draw(mostly(st.integers(0, 6), FAR)))
    assert y is None or y.shape == a.shape == b.shape
    each, zeros = data.draw(scales((2,))), data.draw(tensors((2,), torch.int8))
    dim = data.draw(mostly(st.integers(-5, 5), FAR))
    y = attempt(ops.concat, [a, b], each, zeros, scale, zero, dim)
    assert y is None or y.numel() == a.numel() + b.numel()
    y = attempt(ops.lookup, a, data.draw(tensors((256,), torch.int8)))
    assert y is None or y.shape == a.shape


@many
@given(data=st.data())
def test_int_mm(data: st.DataObject) -> None:
    m, k, n = (data.draw(SIZES) for _ in range(3))
    a, b = data.draw(tensors((m, k), torch.int8)), data.draw(tensors((k, n), torch.int8))
    y = attempt(ops.int_mm, a, b)
    assert y is None or y.shape == (a.shape[0], b.shape[1])


@many
@given(
    layout=LAYOUTS | FAR,
    k=SIZES | FAR,
    group_size=st.just(-1) | SIZES | FAR,
    activation=st.integers(0, 2) | FAR.filter(lambda n: abs(n) < 2**31),
    rows=SIZES | FAR,
)
def test_introspection(layout: int, k: int, group_size: int, activation: int, rows: int) -> None:
    attempt(_C.describe_layout, layout)
    size = attempt(_C.block_bytes, layout, k, group_size)
    assert size is None or (size >= 0 and size % 64 == 0)
    name = attempt(_C.kernel_name, layout, activation, rows)
    assert name is None or name.startswith("matmul_")
    attempt(_C.layout, activation, activation, True)
