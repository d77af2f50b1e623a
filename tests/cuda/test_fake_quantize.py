"""fake_quantize and its gradients on CUDA: the same bits as on the CPU."""

from typing import Any

import pytest
import torch

from helpers import reference as ref
from helpers.check import same_tensor
from helpers.data import FLOATS, awkward, floats

cpu = torch.ops.qkernels

VARIANTS = [
    pytest.param(form, symmetric, id=f"{form.name}-{'symmetric' if symmetric else 'asymmetric'}")
    for form in ref.FORMATS
    for symmetric in ((True,) if form is ref.NF4 else (True, False))
]
GROUP_SIZES = (None, -1, 3, 8, 32)
COLUMNS = (0, 1, 7, 8, 33, 64, 136)

each_variant = pytest.mark.parametrize(("form", "symmetric"), VARIANTS)


@each_variant
def test_values(ops: Any, form: ref.Format, symmetric: bool) -> None:
    for i, cols in enumerate((*COLUMNS, 528)):
        for j, group_size in enumerate(GROUP_SIZES):
            x = awkward((9, cols), FLOATS[(i + j) % 3])
            if cols:
                x[2, 0], x[7, -1] = torch.inf, torch.nan
            rest = (form.code, group_size, symmetric, FLOATS[i % 3])
            same_tensor(ops.fake_quantize(x, *rest), cpu.fake_quantize(x, *rest))


def given(x: torch.Tensor, form: ref.Format, group_size: int | None, symmetric: bool) -> Any:
    """Scales that are twice too narrow, so that many are clipped."""
    _, scale, zero = cpu.quantize(x, form.code, group_size, symmetric)
    return scale / 2, None if symmetric else zero


@each_variant
def test_given_scales(ops: Any, form: ref.Format, symmetric: bool) -> None:
    for i, cols in enumerate(COLUMNS):
        for j, group_size in enumerate(GROUP_SIZES):
            x = awkward((9, cols), FLOATS[(i + j) % 3])
            rest = (*given(x, form, group_size, symmetric), form.code, group_size)
            want = cpu.fake_quantize_with(x, *rest)
            same_tensor(ops.fake_quantize_with(x, *rest), want)


@each_variant
def test_gradients(ops: Any, form: ref.Format, symmetric: bool) -> None:
    for i, cols in enumerate((*COLUMNS, 200)):
        for j, group_size in enumerate(GROUP_SIZES):
            dtype = FLOATS[(i + j) % 3]
            x = awkward((37, cols), dtype, seed=i)
            grad = floats((37, cols), dtype, seed=("grad", i))
            if cols > 1:
                x[1, 0], grad[5, 1] = torch.nan, torch.inf
            rest = (*given(x, form, group_size, symmetric), form.code, group_size)
            got = ops.fake_quantize_backward(grad, x, *rest)
            want = cpu.fake_quantize_backward(grad, x, *rest)
            for one, other in zip(got, want, strict=True):
                same_tensor(one, other)


def test_float_zero_points(ops: Any) -> None:
    x, grad = awkward((6, 40)), floats((6, 40), seed="grad")
    # Halves between codes, and of int4 between eighths; and out of range.
    zero = torch.tensor([[-300.0], [0.5], [3.1875], [2.4375], [15.5], [400.0]])
    for form in (ref.INT8, ref.INT4):
        for rows, group_size in ((slice(None), -1), (2, None)):
            one = zero[rows].reshape(-1)[0] if group_size is None else zero
            scale = torch.full_like(one, 0.07)
            rest = (scale, one, form.code, group_size)
            same_tensor(ops.fake_quantize_with(x, *rest), cpu.fake_quantize_with(x, *rest))
            got = ops.fake_quantize_backward(grad, x, *rest)
            want = cpu.fake_quantize_backward(grad, x, *rest)
            for mine, other in zip(got, want, strict=True):
                same_tensor(mine, other)


def test_a_zero_point_that_is_nan_shows(ops: Any) -> None:
    """The CPU refuses it; the glue of a GPU does not read it."""
    x = floats((2, 8))
    zero = torch.tensor([[torch.nan], [3.0]])
    y = ops.fake_quantize_with(x, torch.ones(2, 1), zero, ref.INT8.code)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_wrong_calls_say_what_is_wrong(ops: Any) -> None:
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="fake_quantize_with: scale must have shape"):
        ops.fake_quantize_with(x, torch.ones(3, 1), None, ref.INT8.code)
    with pytest.raises(RuntimeError, match="zero_point must have the shape of scale"):
        ops.fake_quantize_with(x, torch.ones(2, 1), torch.ones(3, 1), ref.INT8.code)
    with pytest.raises(RuntimeError, match="format nf4 has no zero point"):
        ops.fake_quantize_with(x, torch.ones(2, 1), torch.ones(2, 1), ref.NF4.code)
