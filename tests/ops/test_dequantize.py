"""dequantize: (code - zero point) * scale, rounded to float32 and then to the result's type."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.data import FLOATS, rng, strided

ops = torch.ops.qkernels


def stored(codes: np.ndarray, form: ref.Format) -> torch.Tensor:
    return torch.from_numpy(ref.store(codes, form))


def drawn(form: ref.Format, rows: int, cols: int, groups: int, scale_dtype: torch.dtype, seed=0):
    """Codes over the whole storage type, scales, zero points."""
    random = rng("dequantize", form.name, rows, cols, groups, seed)
    low, high = {8: (-128, 127), 16: (-32768, 32767), 4: (0, 15)}[form.bits]
    codes = random.integers(low, high + 1, (rows, cols))
    scale = np.float32(10.0) ** random.uniform(-6, 4, (rows, groups)).astype(np.float32)
    zero = random.integers(low * form.steps, high * form.steps + 1, (rows, groups))
    return codes, ref.round_to(scale, scale_dtype), zero


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", ref.FORMATS, ids=lambda form: form.name)
def test_values(form: ref.Format, dtype: torch.dtype) -> None:
    for i, cols in enumerate((1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 127, 1000)):
        for group_size in (-1, 1, 2, 5, 8, 32, 10**9):
            edges = ref.group_edges(cols, group_size)
            scale_dtype = FLOATS[i % 3]
            codes, scale, zero = drawn(form, 5, cols, len(edges), scale_dtype)
            for asymmetric in (False, True):
                if asymmetric and form is ref.NF4:
                    continue
                middle = zero if asymmetric else np.full_like(zero, form.middle)
                wide = (ref.spread(part, cols, group_size) for part in (scale, middle))
                want = ref.decode(codes, form, *wide)
                given_zero = torch.from_numpy(zero.astype(ref.storage_dtype(form)))
                scales = torch.from_numpy(scale).to(scale_dtype)
                arguments = (stored(codes, form), scales, given_zero if asymmetric else None)
                got = ops.dequantize(*arguments, form.code, group_size, cols, dtype)
                assert got.dtype == dtype
                same_bits(got, want)
                out = torch.full_like(got, 5)
                assert ops.dequantize.out(*arguments, form.code, group_size, out=out) is None
                same_tensor(out, got)


@pytest.mark.parametrize("form", ref.FORMATS, ids=lambda form: form.name)
def test_every_code_with_every_kind_of_scale(form: ref.Format) -> None:
    low, high = {8: (-128, 127), 16: (-32768, 32767), 4: (0, 15)}[form.bits]
    codes = np.arange(low, high + 1)
    for scale in (1.0, 0.1, 2.0**-126, 1e-45, 3e38, np.inf, np.nan, 0.0, -2.0):
        want = ref.decode(codes, form, np.float32(scale), np.int64(form.middle))
        for dtype in FLOATS:
            got = ops.dequantize(
                stored(codes, form), torch.tensor(scale), None, form.code, None, len(codes), dtype
            )
            same_bits(got, want)


def test_nf4_levels() -> None:
    data = stored(np.arange(16), ref.NF4)
    got = ops.dequantize(data, torch.tensor(1.0), None, ref.NF4.code, None, 16, torch.float32)
    same_bits(got, ref.NF4_LEVELS)
    assert got[7] == 0


@pytest.mark.parametrize("form", ref.FORMATS, ids=lambda form: form.name)
def test_quantizing_what_was_dequantized_gives_the_codes_back(form: ref.Format) -> None:
    low, high = form.symmetric
    codes = np.arange(low, high + 1)
    data = stored(codes, form)
    for scale in (1.0, 0.1, 1e-30, 12345.678, 1e30):
        if form is ref.INT16 and scale in (0.1, 12345.678):
            continue  # 32767 * 0.1 has more bits than float32: half a code may be lost
        s = torch.tensor(scale)
        y = ops.dequantize(data, s, None, form.code, None, len(codes), torch.float32)
        same_tensor(ops.quantize_with(y, s, None, form.code, None), data)


@pytest.mark.parametrize("form", ref.FORMATS, ids=lambda form: form.name)
def test_any_strides(form: ref.Format) -> None:
    codes, scale, _ = drawn(form, 12, 30, 5, torch.float32)
    data, scales = stored(codes, form), torch.from_numpy(scale)
    want = ops.dequantize(data, scales, None, form.code, 6, 30, torch.float32)
    for name, view in strided(data):
        assert torch.equal(view, data), name
        same_tensor(ops.dequantize(view, scales, None, form.code, 6, 30, torch.float32), want)
    for _, view in strided(scales):
        same_tensor(ops.dequantize(data, view, None, form.code, 6, 30, torch.float32), want)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (1,), (2, 3, 4, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    for form in ref.FORMATS:
        for group_size in (None, -1, 2):
            x = torch.ones(shape)
            data, scale, _ = ops.quantize(x, form.code, group_size)
            y = ops.dequantize(data, scale, None, form.code, group_size, shape[-1], torch.bfloat16)
            assert y.shape == shape
            assert y.dtype == torch.bfloat16
            if x.numel():
                rows = data.reshape(-1, data.shape[-1])
                scales = scale.reshape(len(rows), -1) if group_size else scale
                options = (form.code, group_size, shape[-1], torch.bfloat16)
                flat = ops.dequantize(rows, scales, None, *options)
                assert torch.equal(flat.reshape(shape), y)


@given(
    form=st.sampled_from(ref.FORMATS),
    rows=st.integers(0, 9),
    cols=st.integers(1, 90),
    group_size=st.just(-1) | st.integers(1, 100),
    dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_drawn(form, rows, cols, group_size, dtype, scale_dtype, seed) -> None:
    groups = len(ref.group_edges(cols, group_size))
    codes, scale, _ = drawn(form, rows, cols, groups, scale_dtype, seed)
    wide = ref.spread(scale, cols, group_size)
    want = ref.decode(codes, form, wide, np.int64(form.middle))
    scales = torch.from_numpy(scale).to(scale_dtype)
    got = ops.dequantize(stored(codes, form), scales, None, form.code, group_size, cols, dtype)
    same_bits(got, want)
