"""Sums, concatenations and tables of int8 codes, exactly; and the functions in Python."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import int8 as ref
from helpers.check import same_bits, same_codes, same_tensor
from helpers.data import FLOATS, strided
from helpers.int8 import (
    RANGES,
    SCALES,
    ZEROS,
    codes,
    mean,
    orders,
    plane,
    pool,
    scale_of,
    zero_of,
)
from qkernels import int8
from qkernels.functional import EPILOGUES

ops = torch.ops.qkernels


# ---- add -----------------------------------------------------------------------------------------


def add(a: Tensor, b: Tensor, a_range: Any, b_range: Any, y_range: Any = None, epilogue: int = 0,
        dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    ranges = [a_range, b_range, y_range or (None, None)]
    given_ranges = []
    for scale, zero in ranges:
        given_ranges += [None if scale is None else scale_of(scale), zero_of(zero)]
    return ops.add(a, b, *given_ranges, epilogue, dtype)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 15, 17, 31, 33, 63, 64, 65, 127, 128, 129, 1000])
def test_add(count: int) -> None:
    a, b = codes((count,), "a"), codes((count,), "b")
    for i, a_range in enumerate(RANGES):
        b_range, y_range = RANGES[i - 1], RANGES[i - 2]
        want = ref.real(a, *a_range) + ref.real(b, *b_range)
        same_codes(add(a, b, a_range, b_range, y_range), ref.quantized(want, *y_range))
        for dtype in FLOATS:
            y = add(a, b, a_range, b_range, dtype=dtype)
            assert y.dtype == dtype
            same_bits(y, want)


def test_add_of_all_codes() -> None:
    every = torch.arange(-128, 128).to(torch.int8)
    a, b = every.repeat_interleave(256), every.repeat(256)
    for a_range, b_range, y_range in (
        ((0.5, 0), (0.5, 0), (0.5, 0)),
        ((0.1, 3), (0.3, -5), (0.2, 1)),
        ((1.0, 127), (1.0, -128), (4.0, 0)),  # ties
        ((3e38, -128), (3e38, 127), (2.0**-126, 5)),  # infinities, and their difference
        ((2.0**-126, 0), (2.0**-120, 0), (3e38, -128)),
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            want = ref.real(a, *a_range) + ref.real(b, *b_range)
        same_codes(add(a, b, a_range, b_range, y_range), ref.quantized(want, *y_range))
        same_tensor(add(a, b, a_range, b_range, y_range), add(b, a, b_range, a_range, y_range))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_add_and_a_function(name: str) -> None:
    """The codes are those of the float result, and that is near the exact one."""
    a, b = codes((2, 70, 5, 3), "a"), codes((2, 70, 5, 3), "b")
    for given_a in orders(a):
        arguments = (given_a, b, (0.05, 3), (0.03, -7))
        real = add(*arguments, epilogue=EPILOGUES[name])
        exact = FUNCTIONS[name](add(*arguments).double())
        torch.testing.assert_close(real.double(), exact, rtol=1e-6, atol=3e-7 * 12)
        y = add(*arguments, (0.06, -20), EPILOGUES[name])
        same_tensor(y, ops.quantize_with(real, scale_of(0.06), zero_of(-20), 0, None))
        assert real.stride() == y.stride() == given_a.stride()
        for dtype in FLOATS[1:]:
            same_bits(add(*arguments, epilogue=EPILOGUES[name], dtype=dtype), real.numpy())


@given(st.integers(0, 200), SCALES, ZEROS, SCALES, ZEROS, SCALES, ZEROS, st.integers(0, 99))
def test_any_add(
    count: int, a_scale: float, a_zero: int | None, b_scale: float, b_zero: int | None,
    y_scale: float, y_zero: int | None, seed: int,
) -> None:  # fmt: skip
    a, b = codes((count,), (seed, "a")), codes((count,), (seed, "b"))
    want = ref.real(a, a_scale, a_zero) + ref.real(b, b_scale, b_zero)
    y = add(a, b, (a_scale, a_zero), (b_scale, b_zero), (y_scale, y_zero))
    same_codes(y, ref.quantized(want, y_scale, y_zero))


# ---- concat and lookup ---------------------------------------------------------------------------


def concat(xs: list[Tensor], ranges: list[Any], y_range: Any, dim: int) -> Tensor:
    scales = torch.tensor([scale for scale, _ in ranges])
    zeros = torch.tensor([zero or 0 for _, zero in ranges], dtype=torch.int8)
    given_zeros = None if all(zero is None for _, zero in ranges) else zeros
    return ops.concat(xs, scales, given_zeros, scale_of(y_range[0]), zero_of(y_range[1]), dim)


@pytest.mark.parametrize("dims", [1, 2, 4, 5])
def test_concat(dims: int) -> None:
    for dim in range(-dims, dims):
        xs = []
        for i, size in enumerate((3, 0, 65, 32, 1)):
            shape = [2, 3, 4, 5, 2][:dims]
            shape[dim] = size
            xs.append(codes(tuple(shape), i))
        want = [ref.quantized(ref.real(x, *r), 0.5, -128) for x, r in zip(xs, RANGES, strict=True)]
        # The second of RANGES is the result's own: its codes are copied.
        want[1] = xs[1].numpy()
        for mixed in (xs, [orders(x)[-1] for x in xs], [orders(x)[i % 2 - 1] for i, x in
                                                        enumerate(xs)]):  # fmt: skip
            same_codes(concat(mixed, RANGES, (0.5, -128), dim), np.concatenate(want, dim))


@pytest.mark.parametrize("zero", [None, 0, -128, 5])
def test_codes_of_one_scale_are_copied(zero: int | None) -> None:
    xs = [codes((2, c, 5, 4), c) for c in (3, 70)]
    for last in (0, 1):
        y = concat([orders(x)[last] for x in xs], [(0.3, zero)] * 2, (0.3, zero), 1)
        same_tensor(y, torch.cat(xs, 1))
        assert y.is_contiguous(memory_format=(torch.contiguous_format, torch.channels_last)[last])


@given(SCALES, ZEROS, SCALES, ZEROS)
def test_any_requantization(scale: float, zero: int | None, y_scale: float, y_zero: int | None):
    x = torch.arange(-128, 128).to(torch.int8)
    y = concat([x], [(scale, zero)], (y_scale, y_zero), 0)
    same_codes(y, ref.quantized(ref.real(x, scale, zero), y_scale, y_zero))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 63, 64, 65, 127, 1000])
def test_lookup(count: int) -> None:
    x, table = codes((count,)), codes((256,), "table")
    same_tensor(ops.lookup(x, table), table[x.long() + 128])


def test_lookup_of_all_codes() -> None:
    every = torch.arange(-128, 128).to(torch.int8)
    for table in (every, every.flip(0), codes((256,))):
        for start in range(0, 256, 37):  # each code in different lanes
            x = every.roll(start)
            same_tensor(ops.lookup(x, table), table[x.long() + 128])


def test_orders_are_kept() -> None:
    table = codes((256,), "table")
    for x in (codes((2, 5, 3, 4)), codes((2, 5, 3, 4, 2))):
        for given_x in orders(x):
            y = ops.lookup(given_x, table)
            assert y.stride() == given_x.stride()
            same_tensor(y, table[x.long() + 128])


# ---- Any strides, threads, batches ---------------------------------------------------------------


def test_any_strides() -> None:
    flat = codes((6, 70))
    table = codes((256,), "table")
    x = flat.view(1, 6, 70, 1).expand(2, 6, 70, 1)
    w = plane((70, 1), 1, 2)
    want = pool(x.contiguous(), w)
    for name, other in strided(flat):
        same_tensor(ops.lookup(other, table), ops.lookup(flat, table))
        same_tensor(add(other, flat, (0.1, 3), (0.2, 1)), add(flat, flat, (0.1, 3), (0.2, 1)))
        image = other.unsqueeze(0).unsqueeze(-1).expand(2, 6, 70, 1)
        assert torch.equal(pool(image, w), want), name
        same_tensor(
            concat([other, flat], RANGES[:2], RANGES[1], 0),
            concat([flat, flat], RANGES[:2], RANGES[1], 0),
        )


@pytest.mark.parametrize("last", [0, 1])
def test_threads_and_batches_do_not_matter(last: int) -> None:
    x = orders(codes((5, 130, 40, 42)))[last]
    w = plane((40, 42), 3, 2, 1)
    table = codes((256,), "table")

    def results(x: Tensor) -> list[Tensor]:
        return [
            pool(x, w),
            mean(x, w, (0.3, 4), (0.2, -3), padding=False),
            ops.adaptive_avg_pool(x, scale_of(0.3), zero_of(4), None, None, [3, 2]),
            add(x, x, (0.3, 4), (0.1, 0), (0.2, 5), 1),
            concat([x, x], [(0.3, 4), (0.1, 0)], (0.1, 0), 1),
            ops.lookup(x, table),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(x)
        torch.set_num_threads(2)
        two = results(x)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        same_tensor(a, b)
    for i in range(len(x)):
        for a, b in zip(results(x[i : i + 1]), one, strict=True):
            same_tensor(a, b[i : i + 1])


# ---- The functions in Python ---------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_functions_take_what_torch_takes(dims: int) -> None:
    x = codes((2, 5, *(9, 8, 7)[:dims]))
    scale = scale_of(0.5)
    maximum = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    adaptive = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    for kernel, stride, padding in ((2, None, 0), ([3], 2, [1]), ([3] * dims, [1] * dims, 1)):
        for ceil in (False, True):
            want = maximum(x.float(), kernel, stride, padding, 1, ceil)
            assert torch.equal(int8.max_pool(x, kernel, stride, padding, 1, ceil).float(), want)
            want = average(x.double() * 0.5, kernel, stride, padding, ceil, False)
            y = int8.avg_pool(x, kernel, stride, padding, ceil, False, x_scale=scale)
            torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=0)
    assert torch.equal(int8.max_pool(x, 2, []), int8.max_pool(x, 2))
    y = int8.adaptive_avg_pool(x, 2, x_scale=scale, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5, *[2] * dims)
    y = int8.adaptive_avg_pool(x, (None,) * dims, x_scale=scale, y_scale=scale)
    same_tensor(y, x)
    want = adaptive(x.double() * 0.5, 3)
    torch.testing.assert_close(
        int8.adaptive_avg_pool(x, (3,) * dims, x_scale=scale).double(), want, rtol=1e-6, atol=0
    )


def test_functions_of_elements() -> None:
    a, b = codes((3, 70), "a"), codes((3, 70), "b")
    ranges = {"a_scale": scale_of(0.1), "b_scale": scale_of(0.2), "b_zero_point": zero_of(3)}
    y = int8.add(a, b, **ranges, epilogue="silu", dtype=torch.float16)
    same_tensor(y, add(a, b, (0.1, None), (0.2, 3), None, EPILOGUES["silu"], torch.float16))
    with pytest.raises(ValueError, match="epilogue must be one of .* got 'tanh'"):
        int8.add(a, b, **ranges, epilogue="tanh")
    y = int8.concat((a, b), scales=torch.tensor([0.1, 0.2]), y_scale=scale_of(0.2))
    same_tensor(y, concat([a, b], [(0.1, None), (0.2, None)], (0.2, None), 1))
    table = codes((256,), "table")
    same_tensor(int8.lookup(a, table), ops.lookup(a, table))


def network(x: Tensor) -> Tensor:
    half, quarter, zero = scale_of(0.5), scale_of(0.25), zero_of(-3)
    top = int8.max_pool(x, 3, 2, 1)
    mean = int8.avg_pool(x, 3, 2, 1, x_scale=half, x_zero_point=zero, y_scale=half,
                         y_zero_point=zero)  # fmt: skip
    both = int8.add(top, mean, a_scale=half, a_zero_point=zero, b_scale=half, b_zero_point=zero,
                    y_scale=quarter, epilogue="relu")  # fmt: skip
    scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([-3, 0], dtype=torch.int8)
    wide = int8.concat([top, both], scales=scales, zero_points=zeros, y_scale=half)
    wide = int8.lookup(wide, torch.arange(-128, 128).clamp(min=0).to(torch.int8))
    return int8.adaptive_avg_pool(wide, 1, x_scale=half).flatten(1)


def test_a_network_compiles_and_exports() -> None:
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (8, 9, 13):
        for x in orders(codes((2, 37, size, size + 1))):
            same_tensor(compiled(x), network(x))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x)

    x = codes((2, 37, 9, 8))
    exported = torch.export.export(Module(), (x,)).module()
    same_tensor(exported(x), network(x))
