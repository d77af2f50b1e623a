"""Comparisons that say where and by how much."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from helpers import reference as ref


def same_bits(got: Tensor, expected: np.ndarray) -> None:
    """`got` is `expected` (float32) rounded to its type, to the bit; a NaN equals any NaN."""
    want = ref.round_to(expected, got.dtype)
    have = ref.values(got).reshape(want.shape)
    assert tuple(got.shape[-1:]) == want.shape[-1:]
    equal = (have == want) & (np.signbit(have) == np.signbit(want))
    wrong = np.argwhere(~(equal | (np.isnan(have) & np.isnan(want))))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {want.size} differ; at {at}: {have[at]!r}, expected {want[at]!r}"
        )


def same_codes(got: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got.numpy().astype(np.int64), expected.astype(np.int64))


def same_tensor(got: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits; a NaN equals any NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.is_floating_point():
        got, expected = (torch.nan_to_num(t, nan=12345.0) for t in (got, expected))
        assert torch.equal(torch.signbit(got), torch.signbit(expected))
    assert torch.equal(got, expected)


HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def within(got: Tensor, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """|got - expected| <= bound before rounding to the type of `got`; all in float64."""
    have = got.detach().double().numpy().reshape(expected.shape)
    furthest = np.abs(expected) + bound
    allowed = bound + HALF_ULP[got.dtype] * furthest + SMALLEST[got.dtype]
    with np.errstate(invalid="ignore"):
        error = np.abs(have - expected)
    # What is past the largest number of the type is rounded to infinity.
    largest = torch.finfo(got.dtype).max * (1 + HALF_ULP[got.dtype])
    overflow = np.isinf(have) & (np.sign(have) == np.sign(expected)) & (furthest >= largest)
    wrong = np.argwhere(~((error <= allowed) | overflow | (have == expected)))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {error.size} are off; at {at}: {have[at]!r}, expected "
            f"{expected[at]!r}, error {error[at]:.3g}, allowed {allowed[at]:.3g}"
        )


def float_path_bound(x: np.ndarray, w: np.ndarray, groups: int) -> np.ndarray:
    """What a float-activation path may be off by before bias and rounding: x [M, K], w [N, K].

    One rounding for each product or sum in any order, one for each scale and a few at the end, each
    relative, or half the smallest subnormal if the result is that small.
    """
    terms = x.shape[1] + groups + 8
    unit = terms * 2.0**-24
    underflow = terms * 2.0**-149 * (1 + np.abs(w).max(initial=0))
    return unit / (1 - unit) * (np.abs(x) @ np.abs(w).T) + underflow


def bf16_instruction_bound(
    x: np.ndarray, w: np.ndarray, scale: np.ndarray, is_nf4: bool
) -> np.ndarray:
    """What vdpbf16ps adds to it: levels of nf4 are rounded, and subnormal numbers count as 0; `w`
    is what is added up.
    """
    rounding = 2.0**-8 * (np.abs(x) @ np.abs(w).T) if is_nf4 else 0.0
    lost = np.abs(w).sum(axis=1) + x.shape[1] * np.abs(scale).max(axis=1, initial=0)
    return rounding * (1 + 2.0**-20) + 2.0**-126 * lost
