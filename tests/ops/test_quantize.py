"""quantize and quantize_with against the contract: every format, grouping, type and odd value."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers import reference as ref
from helpers.check import same_bits, same_codes, same_tensor
from helpers.data import FLOATS, awkward, floats, strided

ops = torch.ops.qkernels

VARIANTS = [
    pytest.param(form, symmetric, id=f"{form.name}-{'symmetric' if symmetric else 'asymmetric'}")
    for form in ref.FORMATS
    for symmetric in ((True,) if form is ref.NF4 else (True, False))
]
GROUP_SIZES = (None, -1, 1, 3, 8, 16, 32, 33, 128, 10**9)
COLUMNS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 127, 130, 1000)


def check(
    x: torch.Tensor,
    form: ref.Format,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """x: [rows, cols]."""
    data, scale, zero = ops.quantize(x, form.code, group_size, symmetric, scale_dtype)
    want = ref.quantize(ref.values(x), form, group_size, symmetric, scale_dtype)
    assert scale.shape == want.scale.shape
    assert scale.dtype == scale_dtype
    same_bits(scale.reshape(-1, 1), want.scale.reshape(-1, 1))
    stored = ref.store(want.codes, form)
    assert data.numpy().dtype == stored.dtype
    same_codes(data, stored)
    assert zero.dtype == data.dtype
    if symmetric:
        assert zero.shape == (0,)
    else:
        same_codes(zero, want.zero)
    if np.isfinite(want.scale).all():
        given_zero = None if symmetric else zero
        same_tensor(ops.quantize_with(x, scale, given_zero, form.code, group_size), data)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_codes_scales_and_zero_points(
    form: ref.Format, symmetric: bool, dtype: torch.dtype
) -> None:
    for i, cols in enumerate(COLUMNS):
        x = awkward((13, cols), dtype)
        for group_size in GROUP_SIZES:
            check(x, form, group_size, symmetric, FLOATS[i % 3])


@pytest.mark.parametrize("largest", [3e38, 3e9, 1e-5, 190 * 2.0**-24, 1.4 * 2.0**-24, 3e-39])
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_scales_that_their_type_cannot_hold(
    form: ref.Format, symmetric: bool, scale_dtype: torch.dtype, largest: float
) -> None:
    """Quotients then lie far outside the codes; whole vectors of them, of both signs."""
    x = floats((6, 300)).clamp(-3, 3) / 3 * largest
    x[1], x[2] = x[1].abs(), -x[2].abs()
    for group_size in (-1, 64, 100):
        check(x, form, group_size, symmetric, scale_dtype)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_a_streamed_result(form: ref.Format, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """So large that it is written past the caches, from an odd address on too."""
    x = floats((2100, 1025))
    check(x[:, 1:], form, -1, symmetric, scale_dtype)
    check(x, form, -1, symmetric, scale_dtype)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_long_rows(form: ref.Format, symmetric: bool) -> None:
    """Longer than what is worked on at a time."""
    for cols, group_size in ((5000, -1), (5000, None), (9001, 300), (5000, 4097), (4200, 33)):
        check(awkward((3, cols), torch.bfloat16), form, group_size, symmetric)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_special_values(form: ref.Format, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """One special value in an ordinary row, in its vector part and in its tail."""
    special = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, 65520.0, 1e-7]
    special += [np.inf, -np.inf, np.nan]
    for cols in (1, 5, 16, 37):
        x = floats((2 * len(special), cols), seed="special")
        for i, value in enumerate(special):
            x[2 * i] = 0
            x[2 * i : 2 * i + 2, (7 * i) % cols] = value
        for group_size in (-1, 4, 16):
            check(x, form, group_size, symmetric, scale_dtype)
        for i in range(len(special)):
            check(x[2 * i : 2 * i + 1], form, None, symmetric, scale_dtype)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_nan_and_infinity_stay_in_their_group(form: ref.Format, symmetric: bool) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = floats((5, 40), seed="bad")
        clean = ops.quantize(x, form.code, 8, symmetric)
        x[2, 17] = bad
        data, scale, zero = ops.quantize(x, form.code, 8, symmetric)
        hit = torch.zeros_like(scale, dtype=torch.bool)
        hit[2, 2] = True
        assert torch.equal(scale.isnan(), hit)
        given_zero = None if symmetric else zero
        y = ops.dequantize(data, scale, given_zero, form.code, 8, 40, torch.float32)
        assert y[2, 16:24].isnan().all()
        clean_zero = None if symmetric else clean[2]
        kept = ops.dequantize(clean[0], clean[1], clean_zero, form.code, 8, 40, torch.float32)
        kept[2, 16:24] = torch.nan
        same_tensor(y, kept)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_zero_groups_have_scale_one_and_the_code_of_zero(form: ref.Format, symmetric: bool) -> None:
    x = torch.zeros(3, 10)
    x[1, 4:8] = -0.0
    data, scale, zero = ops.quantize(x, form.code, 4, symmetric)
    assert (scale == 1).all()
    assert symmetric or (zero == 0).all()
    given_zero = None if symmetric else zero
    assert (ops.dequantize(data, scale, given_zero, form.code, 4, 10, torch.float32) == 0).all()


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
def test_scales_are_normal_positive_and_finite(
    form: ref.Format, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    """So that dividing by one never gives infinity, whatever finite values came in."""
    x = torch.tensor([[1e-45], [-1e-45], [1e-39], [3.4028235e38], [-3.4028235e38], [1e-20]])
    _, scale, _ = ops.quantize(x.repeat(1, 20), form.code, -1, symmetric, scale_dtype)
    assert (scale.float() >= 2.0**-126).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_values_are_off_by_half_a_step_at_most(form: ref.Format, symmetric: bool) -> None:
    """Also at the ends: int4 symmetric puts them at 7.5 steps, between the last code and none."""
    x = floats((40, 96), seed="error")
    data, scale, zero = ops.quantize(x, form.code, 32, symmetric)
    given_zero = None if symmetric else zero
    y = ops.dequantize(data, scale, given_zero, form.code, 32, 96, torch.float32)
    step = scale.repeat_interleave(32, 1)
    if form is ref.NF4:
        levels = torch.from_numpy(ref.NF4_LEVELS) * step[..., None]
        best = (x[..., None] - levels).abs().amin(-1)
        assert ((x - y).abs() <= best + 1e-6 * step).all()
        return
    # An asymmetric zero point is rounded too, which may put the range's end half a step outside.
    steps = 0.5 if symmetric else 1.0
    assert ((x - y).abs() <= steps * step + x.abs() * 2.0**-22).all()


@pytest.mark.parametrize("form", [ref.INT8, ref.INT4, ref.INT16], ids=lambda form: form.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_go_to_even_and_then_saturate(form: ref.Format, symmetric: bool) -> None:
    halves = torch.arange(-40, 41) / 2
    big = torch.tensor([126.5, 127.5, 128.5, 32766.5, 32767.5, 1e9, 3e38, torch.inf])
    x = torch.cat([halves, big, -big, torch.nextafter(halves, torch.tensor(torch.inf))])
    low, high = form.symmetric if symmetric else form.asymmetric
    for zero in [form.offset] if symmetric else [low, low + 3, 7, high - 1, high]:
        stored = torch.tensor([zero * form.steps]).to(_storage(form))
        given_zero = None if symmetric else stored
        for width in (len(x), 5):  # a vector part with a tail, and a tail only
            part = x[-width:]
            data = ops.quantize_with(part, torch.ones(1), given_zero, form.code, None)
            codes = ref.unstore(data.numpy(), form, width)
            want = np.clip(np.rint(part.double().numpy()) + zero, low, high)
            np.testing.assert_array_equal(codes, want.astype(np.int64))


def _storage(form: ref.Format) -> torch.dtype:
    return {8: torch.int8, 16: torch.int16, 4: torch.uint8}[form.bits]


def test_nf4_ties_go_to_the_lower_level() -> None:
    levels = ref.NF4_LEVELS.astype(np.float64)
    middles = torch.from_numpy(((levels[:-1] + levels[1:]) / 2).astype(np.float32))
    below, above = (torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0))
    for x, want in ((below, range(15)), (middles, range(15)), (above, range(1, 16))):
        data = ops.quantize_with(x, torch.tensor(1.0), None, ref.NF4.code, None)
        assert ref.unstore(data.numpy(), ref.NF4, 15).tolist() == list(want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_half_precision_value(dtype: torch.dtype) -> None:
    """All 65536 bit patterns of a 16-bit float through given scales, NaN and infinity too."""
    if dtype == torch.float32:
        bits = np.arange(0, 2**32, 65521, dtype=np.uint32)
        x = torch.from_numpy(bits.view(np.float32).copy())
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for form in ref.FORMATS:
        for scale in (1.0, 0.37, 2.0**-126, 3e38):
            data = ops.quantize_with(x, torch.tensor(scale), None, form.code, None)
            want = ref.encode(ref.values(x), form, True, np.float32(scale), np.int64(form.middle))
            same_codes(data, ref.store(want, form))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, np.inf, np.nan])
def test_a_foolish_scale_still_gives_codes_in_range(scale: float) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 3e38, torch.inf, torch.nan] * 5)
    for form in ref.FORMATS:
        data = ops.quantize_with(x, torch.tensor(scale), None, form.code, None)
        with np.errstate(all="ignore"):
            want = ref.encode(ref.values(x), form, True, np.float32(scale), np.int64(form.middle))
        same_codes(data, ref.store(want, form))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0), (2, 0, 3), (1,), (1, 1, 1, 1)])
def test_empty_and_tiny_shapes(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    for form in ref.FORMATS:
        for group_size in (None, -1, 1, 4):
            data, scale, zero = ops.quantize(x, form.code, group_size)
            cols = (shape[-1] + 1) // 2 if form.bits == 4 else shape[-1]
            groups = 1 if group_size == -1 else -(-shape[-1] // (group_size or 1))
            assert data.shape == (*shape[:-1], cols)
            assert scale.shape == (() if group_size is None else (*shape[:-1], groups))
            assert zero.shape == (0,)
            if x.numel() == 0:
                assert (scale == 1).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_any_rank_is_rows_of_its_last_dimension(rank: int) -> None:
    x = awkward((24, 50)).reshape((50 * 24,) if rank == 1 else (*(2, 3, 4, 50)[-rank:-1], -1, 50))
    x = x.reshape(-1) if rank == 1 else x
    flat = x.reshape(-1, x.shape[-1])
    for form in ref.FORMATS:
        for group_size in (None, -1, 8):
            got = ops.quantize(x, form.code, group_size)
            want = ops.quantize(flat, form.code, group_size)
            for a, b in zip(got, want, strict=True):
                same_tensor(a.reshape(b.shape), b)


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_any_strides(form: ref.Format, symmetric: bool) -> None:
    x = awkward((20, 35))
    for group_size in (None, -1, 8):
        want = ops.quantize(x, form.code, group_size, symmetric)
        for name, view in strided(x):
            assert torch.equal(view, x), name
            for a, b in zip(
                ops.quantize(view, form.code, group_size, symmetric), want, strict=True
            ):
                same_tensor(a, b)
            scale, zero = want[1], None if symmetric else want[2]
            same_tensor(ops.quantize_with(view, scale, zero, form.code, group_size), want[0])
    row = awkward((1, 35))
    repeated = ops.quantize(row.expand(9, 35), form.code, -1, symmetric)
    once = ops.quantize(row, form.code, -1, symmetric)
    assert torch.equal(repeated[0], once[0].expand(9, -1))


@pytest.mark.parametrize(("form", "symmetric"), VARIANTS)
def test_out_forms_write_the_same(form: ref.Format, symmetric: bool) -> None:
    x = awkward((11, 21), torch.bfloat16)
    for group_size in (None, -1, 4):
        for scale_dtype in FLOATS:
            want = ops.quantize(x, form.code, group_size, symmetric, scale_dtype)
            outs = [torch.full_like(t, 3) for t in want]
            data, scale, zero = outs
            options = dict(group_size=group_size, symmetric=symmetric)
            assert (
                ops.quantize.out(x, form.code, **options, data=data, scale=scale, zero_point=zero)
                is None
            )
            for a, b in zip(outs, want, strict=True):
                same_tensor(a, b)
            data.fill_(3)
            given_zero = None if symmetric else zero
            assert (
                ops.quantize_with.out(x, scale, given_zero, form.code, group_size, out=data) is None
            )
            same_tensor(data, want[0])


@given(data=st.data())
def test_drawn_values(data: st.DataObject) -> None:
    """Hypothesis looks for the values, shapes and groups that nobody thought of."""
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=70))
    elements = data.draw(
        st.sampled_from(
            [
                st.floats(width=32),
                st.floats(-10, 10, width=32),
                st.sampled_from([0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.5, 1.5, -2.5]),
            ]
        )
    )
    x = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=elements)))
    form = data.draw(st.sampled_from(ref.FORMATS))
    symmetric = form is ref.NF4 or data.draw(st.booleans())
    group_size = data.draw(st.none() | st.just(-1) | st.integers(1, 80))
    dtype, scale_dtype = (data.draw(st.sampled_from(FLOATS)) for _ in range(2))
    check(x.to(dtype), form, group_size, symmetric, scale_dtype)
