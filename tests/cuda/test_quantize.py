"""The quantizers as CUDA kernels in the emulator: the same bits as on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference as ref
from helpers.check import same_bits, same_codes, same_tensor
from helpers.data import FLOATS, Kind, awkward, strided

cpu = torch.ops.qkernels

VARIANTS = [
    pytest.param(form, symmetric, id=f"{form.name}-{'symmetric' if symmetric else 'asymmetric'}")
    for form in ref.FORMATS
    for symmetric in ((True,) if form is ref.NF4 else (True, False))
]
GROUP_SIZES = (None, -1, 3, 8, 32)
COLUMNS = (0, 1, 7, 8, 33, 64, 127, 136)


def check(
    ops: Any,
    x: torch.Tensor,
    form: ref.Format,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Codes, scales and zero points are those of the reference, and of the CPU."""
    data, scale, zero = ops.quantize(x, form.code, group_size, symmetric, scale_dtype)
    want = ref.quantize(ref.values(x), form, group_size, symmetric, scale_dtype)
    same_codes(data, ref.store(want.codes, form))
    same_bits(scale.reshape(-1, 1), want.scale.reshape(-1, 1))
    if not symmetric:
        same_codes(zero, want.zero)
    on_cpu = cpu.quantize(x, form.code, group_size, symmetric, scale_dtype)
    for got, expected in zip((data, scale, zero), on_cpu, strict=True):
        same_tensor(got, expected)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_quantize(ops: Any, form: ref.Format, symmetric: bool) -> None:
    for i, cols in enumerate(COLUMNS):
        for j, group_size in enumerate(GROUP_SIZES):
            x = awkward((9, cols), FLOATS[(i + j) % 3])
            check(ops, x, form, group_size, symmetric, FLOATS[i % 3])


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_long_groups(ops: Any, form: ref.Format, symmetric: bool) -> None:
    """A warp, some warps and parts of groups; a short last group; rows that fill no registers."""
    for i, (cols, group_size) in enumerate(
        [(264, -1), (1000, 256), (1072, 528), (2056, -1), (5001, None), (16384, -1), (33000, -1)]
    ):
        x = awkward((9, 5001) if group_size is None else (1, cols), FLOATS[i % 3])
        check(ops, x, form, group_size, symmetric)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_special_values(ops: Any, form: ref.Format, symmetric: bool) -> None:
    special = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, 65520.0, 1e-7]
    special += [np.inf, -np.inf, np.nan]
    x = awkward((2 * len(special), 40))
    for i, value in enumerate(special):
        x[2 * i] = 0
        x[2 * i : 2 * i + 2, 7 * i % 40] = value
    for scale_dtype, group_size in zip(FLOATS, (-1, 8, 5), strict=True):
        check(ops, x, form, group_size, symmetric, scale_dtype)
    for i in range(2 * len(special)):
        check(ops, x[i : i + 1], form, None, symmetric)


def test_every_nf4_code_and_what_lies_beside_its_middles(ops: Any) -> None:
    levels = torch.from_numpy(ref.NF4_LEVELS)
    middles = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    around = [torch.nextafter(middles, torch.tensor(to)) for to in (-2.0, 2.0)]
    x = torch.cat([levels, middles, *around, torch.tensor([-7.0, 7.0, torch.nan, torch.inf])])
    want = cpu.quantize_with(x, torch.tensor(1.0), None, ref.NF4.code, None)
    same_tensor(ops.quantize_with(x, torch.tensor(1.0), None, ref.NF4.code, None), want)


def test_out(ops: Any) -> None:
    x = awkward((5, 48))
    for group_size in (None, 16, 5):
        want = cpu.quantize(x, ref.INT4.code, group_size, False, torch.bfloat16)
        out = [torch.full_like(t, 3) for t in want]
        data, scale, zero = out
        rest = {"data": data, "scale": scale, "zero_point": zero}
        assert ops.quantize.out(x, ref.INT4.code, group_size, False, **rest) is None
        for got, expected in zip(out, want, strict=True):
            same_tensor(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_quantize_with(ops: Any, form: ref.Format, symmetric: bool, dtype: torch.dtype) -> None:
    for i, cols in enumerate(COLUMNS):
        x = awkward((9, cols), dtype)
        for group_size in GROUP_SIZES:
            scale_dtype = FLOATS[i % 3]
            want = ref.quantize(ref.values(x), form, group_size, symmetric, scale_dtype)
            stored, scale, zero = cpu.quantize(x, form.code, group_size, symmetric, scale_dtype)
            data = ops.quantize_with(x, scale, None if symmetric else zero, form.code, group_size)
            same_codes(data, ref.store(want.codes, form))
            same_tensor(data, stored)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_dequantize(ops: Any, form: ref.Format, symmetric: bool, dtype: torch.dtype) -> None:
    for i, cols in enumerate(COLUMNS):
        x = awkward((9, cols))
        for group_size in GROUP_SIZES:
            given = cpu.quantize(x, form.code, group_size, symmetric, FLOATS[i % 3])
            rest = (form.code, group_size)
            got = ops.dequantize(*given, *rest, cols, dtype)
            same_tensor(got, cpu.dequantize(*given, *rest, cols, dtype))
            out = torch.full_like(got, 5)
            assert ops.dequantize.out(*given, *rest, out=out) is None
            same_tensor(out, got)


@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-126, 1e-45, 3e38, float("inf"), float("nan")])
def test_every_code_with_every_kind_of_scale(ops: Any, scale: float) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    for dtype in FLOATS:
        got = ops.dequantize(codes, torch.tensor(scale), None, ref.INT8.code, None, 256, dtype)
        same_bits(got, ref.decode(codes.numpy(), ref.INT8, np.float32(scale), np.int64(0)))


def test_any_strides(ops: Any) -> None:
    x = awkward((20, 35))
    scale = torch.full((20, 1), 0.03)
    want = cpu.quantize_with(x, scale, None, ref.INT8.code)
    for _, view in strided(x):
        same_tensor(ops.quantize_with(view, scale, None, ref.INT8.code), want)
        check(ops, view.resolve_neg() if view.is_neg() else view, ref.INT4, 5, False)
    # Rows that start on no vector.
    check(
        ops, torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)[:, :32], ref.INT8, 8, True
    )
    shifted = torch.cat([x.new_zeros(1), awkward((6, 32)).flatten()])[1:].view(6, 32)
    check(ops, shifted, ref.INT8, 8, True)


def test_zero_points_out_of_range_keep_codes_in_their_nibbles(ops: Any) -> None:
    """The glue of a GPU does not read them; they count as the largest one, 120 eighths."""
    high = torch.arange(121, 256, dtype=torch.uint8)[:, None]
    x = awkward((len(high), 16))
    x[::3, 5] = torch.nan
    scale = torch.ones(len(high), 1)
    zeros = (high, torch.full_like(high, 120))
    codes = [ops.quantize_with(x, scale, zero, ref.INT4.code) for zero in zeros]
    same_tensor(*codes)
    rest = (ref.INT4.code, -1, 16, x.dtype)
    same_tensor(*(ops.dequantize(codes[0], scale, zero, *rest) for zero in zeros))
    same_tensor(*(ops.fake_quantize_with(x, scale, zero, ref.INT4.code) for zero in zeros))
    layout = Kind(ref.INT4, False, torch.float32).cuda_layout
    same_tensor(*(ops.pack(codes[0], scale, zero, layout, 16, -1) for zero in zeros))


def test_wrong_calls_say_what_is_wrong(ops: Any) -> None:
    x, scale = torch.ones(2, 8), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="quantize_with: scale must have shape"):
        ops.quantize_with(x, torch.ones(3, 1), None, ref.INT8.code)
    with pytest.raises(RuntimeError, match="quantize_with: x must be float32, bfloat16 or float16"):
        ops.quantize_with(x.double(), scale, None, ref.INT8.code)
