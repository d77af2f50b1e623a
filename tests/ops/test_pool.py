"""Pooling of int8 codes: equal to exact integers, and near torch's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import int8 as ref
from helpers.check import same_bits, same_codes, within
from helpers.data import FLOATS
from helpers.int8 import (
    CHANNELS,
    RANGES,
    SCALES,
    ZEROS,
    Adaptive,
    Windows,
    codes,
    mean,
    orders,
    plane,
    pool,
    scale_of,
    zero_of,
)
from helpers.reference import round_to

ops = torch.ops.qkernels

WINDOWS = {
    "3x3 stride 2": plane((13, 11), 3, 2, 1),
    "3x3 stride 1": plane((9, 10), 3, 1, 1),
    "2x2": plane((8, 6), 2, 2),
    "2x2 of odd sizes": plane((7, 9), 2, 2),
    "2x2 of odd sizes, ceil": plane((7, 9), 2, 2, ceil=True),
    "3x3 stride 2, ceil": plane((12, 9), 3, 2, 0, ceil=True),
    "3x3 stride 2, padded, ceil": plane((12, 9), 3, 2, 1, ceil=True),
    "a window that would begin in the border": plane((5, 5), 2, 3, 1, ceil=True),
    "smaller than the kernel, ceil": plane((2, 2), 3, 2, ceil=True),
    "one element": plane((1, 1), 1, 1),
    "uneven": Windows((9, 8), (3, 2), (1, 3), (1, 0), (1, 1)),
    "stride past the kernel": plane((17, 16), 2, 5, 1),
    "whole": plane((7, 7), 7, 1),
    "1d": plane((40,), 5, 3, 2),
    "1d stride 2, ceil": plane((130,), 3, 2, 1, ceil=True),
    "3d": Windows((4, 5, 6), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
    "3d, ceil": plane((5, 4, 7), 2, 2, 1, ceil=True),
    "wide": Windows((2, 300), (2, 3), (1, 2), (0, 1), (1, 1)),
}
DILATED = {
    "dilated": plane((12, 13), 3, 1, 1, 2),
    "dilated, strided": plane((12, 13), 2, 3, 1, 3),
    "dilated, windows of borders alone": plane((3, 3), 2, 1, 1, 4),
    "dilated, ceil": plane((9, 10), 2, 2, 1, 3, ceil=True),
    "dilated 1d": plane((50,), 4, 2, 2, 2),
}
ALL = {**WINDOWS, **DILATED}
each_windows = pytest.mark.parametrize("w", WINDOWS.values(), ids=WINDOWS)


# ---- max_pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", ALL.values(), ids=ALL)
def test_max_pool(w: Windows) -> None:
    for channels in (5, 64, 67):
        x = codes((2, channels, *w.size))
        want = ref.max_pool(x, w)
        for given_x in orders(x):
            y = pool(given_x, w)
            assert y.dtype == torch.int8
            same_codes(y, want)
            if channels > 1 and given_x is not x and y[0].numel() > channels:
                assert y.stride(1) == 1


@pytest.mark.parametrize("w", ALL.values(), ids=ALL)
def test_max_pool_is_torchs(w: Windows) -> None:
    x = codes((2, 3, *w.size))
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(w.size) - 1]
    want = function(x.float(), w.kernel, w.stride, w.padding, w.dilation, w.ceil)
    want = want.clamp(min=-128)  # -inf where a window holds borders alone
    for given_x in orders(x):
        assert torch.equal(pool(given_x, w).float(), want)


@pytest.mark.parametrize("channels", CHANNELS)
def test_max_pool_of_any_channels(channels: int) -> None:
    w = WINDOWS["3x3 stride 2"]
    for given_x in orders(codes((2, channels, *w.size))):
        same_codes(pool(given_x, w), ref.max_pool(given_x, w))


@pytest.mark.parametrize("fill", [-128, 127])
def test_borders_are_never_the_largest(fill: int) -> None:
    """A border of zeros would win over negative codes."""
    w = WINDOWS["3x3 stride 2, padded, ceil"]
    for given_x in orders(torch.full((1, 70, *w.size), fill, dtype=torch.int8)):
        assert (pool(given_x, w) == fill).all()


def test_windows_of_borders_alone_give_the_lowest_code() -> None:
    w = DILATED["dilated, windows of borders alone"]
    for given_x in orders(torch.full((1, 70, *w.size), 5, dtype=torch.int8)):
        assert (pool(given_x, w) == -128).all()


# ---- avg_pool ------------------------------------------------------------------------------------


@each_windows
@pytest.mark.parametrize("padding", [True, False])
def test_avg_pool(w: Windows, padding: bool) -> None:
    x = codes((2, 67, *w.size))
    for i, (scale, zero) in enumerate(RANGES):
        y_scale, y_zero = RANGES[(i + 2) % len(RANGES)]
        want = ref.means(x, w, zero or 0, padding)
        for given_x in orders(x):
            y = mean(given_x, w, (scale, zero), padding=padding)
            assert y.dtype == torch.float32
            same_bits(y, want.values(scale))
            y = mean(given_x, w, (scale, zero), (y_scale, y_zero), padding=padding)
            same_codes(y, want.codes(scale, y_scale, y_zero or 0))


@each_windows
@pytest.mark.parametrize("padding", [True, False])
def test_avg_pool_is_torchs(w: Windows, padding: bool) -> None:
    x = codes((2, 3, *w.size))
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(w.size) - 1]
    exact = (x.double() - 5) * float(scale_of(0.3))
    want = function(exact, w.kernel, w.stride, w.padding, w.ceil, padding).numpy()
    for given_x in orders(x):
        y = mean(given_x, w, (0.3, 5), padding=padding)
        within(y, want, 3 * 2.0**-24 * np.abs(want))


@pytest.mark.parametrize("divisor", [1, 4, 7, 2**31 - 1])
def test_divisor_override(divisor: int) -> None:
    w = WINDOWS["3x3 stride 2, padded, ceil"]
    x = codes((2, 35, *w.size))
    want = ref.means(x, w, 3, divisor=divisor)
    exact = F.avg_pool2d(x.double() - 3, w.kernel, w.stride, w.padding, w.ceil, True, divisor)
    for given_x in orders(x):
        y = mean(given_x, w, (1.0, 3), divisor=divisor)
        same_bits(y, want.values(1.0))
        within(y, exact.numpy(), 3 * 2.0**-24 * exact.abs().numpy())
        same_codes(mean(given_x, w, (1.0, 3), (0.5, -1), divisor=divisor), want.codes(1.0, 0.5, -1))


@pytest.mark.parametrize("channels", CHANNELS)
def test_avg_pool_of_any_channels(channels: int) -> None:
    w = WINDOWS["3x3 stride 2"]
    x = codes((2, channels, *w.size))
    want = ref.means(x, w, 9, False)
    for given_x in orders(x):
        same_codes(mean(given_x, w, (0.3, 9), (0.2, 1), padding=False), want.codes(0.3, 0.2, 1))
        for dtype in FLOATS:
            y = mean(given_x, w, (0.3, 9), padding=False, dtype=dtype)
            assert y.dtype == dtype
            same_bits(y, want.values(0.3))


def test_means_of_one_scale_are_rounded_half_to_even() -> None:
    """Not by a scale that is off by a bit: 1.5 and 2.5 are both 2."""
    x = torch.tensor([[[1, 2, 2, 3, -1, -2, 0, 1]]], dtype=torch.int8)
    w = plane((8,), 2, 2)
    for scale in (0.1, 0.3, 0.7):
        assert mean(x, w, (scale, 0), (scale, 0)).flatten().tolist() == [2, 2, -2, 0]


@pytest.mark.parametrize("fill", [-128, 127])
@pytest.mark.parametrize("size", [(16, 16), (16, 17), (37, 41), (2, 257), (1, 2300)])
def test_long_sums_of_extremes(size: tuple[int, int], fill: int) -> None:
    """256 codes fill a sum of 16 bits, and the zero point is at the other end."""
    zero = -1 - fill
    for channels in (1, 70):
        x = torch.full((1, channels, *size), fill, dtype=torch.int8)
        w = Windows(size, size, (1, 1), (0, 0), (1, 1))
        want = ref.means(x, w, zero)
        for given_x in orders(x):
            same_bits(mean(given_x, w, (0.25, zero)), want.values(0.25))
            y = ops.adaptive_avg_pool(given_x, scale_of(0.25), zero_of(zero), None, None, [1, 1])
            same_bits(y, want.values(0.25))


@pytest.mark.parametrize("scale", [2.0**-126, 3e38])
def test_scales_at_the_ends(scale: float) -> None:
    """Quotients leave float32 on the way; codes stay codes."""
    x, w = codes((1, 67, 6, 5)), plane((6, 5), 3, 1)
    other = 3e38 if scale < 1 else 2.0**-126
    for divisor in (1, 2**31 - 1):
        want = ref.means(x, w, 2, divisor=divisor)
        for given_x in orders(x):
            same_bits(mean(given_x, w, (scale, 2), divisor=divisor), want.values(scale))
            y = mean(given_x, w, (scale, 2), (other, -7), divisor=divisor)
            same_codes(y, want.codes(scale, other, -7))


# ---- adaptive_avg_pool ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "w",
    [
        Adaptive((7, 7), (1, 1)),
        Adaptive((7, 9), (3, 4)),
        Adaptive((6, 4), (3, 2)),
        Adaptive((3, 5), (5, 7)),
        Adaptive((9, 1), (2, 1)),
        Adaptive((10,), (3,)),
        Adaptive((2500,), (1,)),
        Adaptive((2500,), (7,)),
        Adaptive((4, 5, 6), (2, 3, 1)),
    ],
    ids=str,
)
def test_adaptive_avg_pool(w: Adaptive) -> None:
    function = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    for channels in (3, 17, 67):
        x = codes((2, channels, *w.size))
        want = ref.means(x, w, 4)
        exact = function[len(w.size) - 1]((x.double() - 4) * float(scale_of(0.3)), w.out).numpy()
        for given_x in orders(x):
            y = ops.adaptive_avg_pool(given_x, scale_of(0.3), zero_of(4), None, None, w.out)
            same_bits(y, want.values(0.3))
            within(y, exact, 3 * 2.0**-24 * np.abs(exact))
            y = ops.adaptive_avg_pool(
                given_x, scale_of(0.3), zero_of(4), scale_of(0.1), zero_of(-3), w.out
            )
            same_codes(y, want.codes(0.3, 0.1, -3))


# ---- Any windows ---------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> Windows:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    return Windows(each(1, 9), each(1, 4), each(1, 4), each(0, 3), each(1, 3), draw(st.booleans()))


@given(
    windows(), st.integers(1, 3), st.sampled_from(CHANNELS[1:]), st.booleans(), st.booleans(),
    SCALES, ZEROS, SCALES, ZEROS,
)  # fmt: skip
def test_any_windows(
    w: Windows, batch: int, channels: int, last: bool, padding: bool, x_scale: float,
    x_zero: int | None, y_scale: float, y_zero: int | None,
) -> None:  # fmt: skip
    assume(w.possible)
    x = orders(codes((batch, channels, *w.size)))[-1 if last else 0]
    same_codes(pool(x, w), ref.max_pool(x, w))
    plain = Windows(w.size, w.kernel, w.stride, w.padding, (1,) * len(w.size), w.ceil)
    if plain.possible:
        want = ref.means(x, plain, x_zero or 0, padding)
        y = mean(x, plain, (x_scale, x_zero), (y_scale, y_zero), padding=padding)
        same_codes(y, want.codes(x_scale, y_scale, y_zero or 0))
        same_bits(mean(x, plain, (x_scale, x_zero), padding=padding), want.values(x_scale))
    adaptive = Adaptive(w.size, w.kernel)
    y = ops.adaptive_avg_pool(x, scale_of(x_scale), zero_of(x_zero), None, None, w.kernel)
    same_bits(y, ref.means(x, adaptive, x_zero or 0).values(x_scale))


def test_a_float_result_is_rounded_once() -> None:
    x, w = codes((1, 40, 5, 5)), plane((5, 5), 5, 1)
    want = ref.means(x, w, 0).values(0.3)
    for dtype in FLOATS:
        y = mean(x, w, (0.3, 0), dtype=dtype)
        same_bits(y, round_to(want, dtype))
