"""fake_quantize: the values of quantize, and the gradients of STE, LSQ and LSQ+."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.data import FLOATS, awkward, floats, rng, strided

ops = torch.ops.qkernels

VARIANTS = [
    pytest.param(form, symmetric, id=f"{form.name}-{'symmetric' if symmetric else 'asymmetric'}")
    for form in ref.FORMATS
    for symmetric in ((True,) if form is ref.NF4 else (True, False))
]
GROUP_SIZES = (None, -1, 1, 3, 8, 16, 33, 128, 10**9)
COLUMNS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 127, 130, 1000)

each_variant = pytest.mark.parametrize(("form", "symmetric"), VARIANTS)


def there_and_back(x, form, group_size, symmetric, scale_dtype=torch.float32):
    """By quantize and dequantize, whose own tests are against the reference."""
    data, scale, zero = ops.quantize(x, form.code, group_size, symmetric, scale_dtype)
    given_zero = None if symmetric else zero
    y = ops.dequantize(data, scale, given_zero, form.code, group_size, x.shape[-1], x.dtype)
    return y, scale, given_zero


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_variant
def test_values(form, symmetric, dtype):
    for i, cols in enumerate(COLUMNS):
        x = awkward((13, cols), dtype)
        for group_size in GROUP_SIZES:
            scale_dtype = FLOATS[i % 3]
            want, *_ = there_and_back(x, form, group_size, symmetric, scale_dtype)
            got = ops.fake_quantize(x, form.code, group_size, symmetric, scale_dtype)
            same_tensor(got, want)


@each_variant
def test_values_against_the_reference(form, symmetric):
    x = awkward((13, 37))
    for group_size in (-1, 8, 5):
        q = ref.quantize(ref.values(x), form, group_size, symmetric)
        wide = (ref.spread(part, 37, group_size) for part in (q.scale, q.zero))
        got = ops.fake_quantize(x, form.code, group_size, symmetric)
        same_bits(got, ref.decode(q.codes, form, *wide))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_variant
def test_values_with_given_scales(form, symmetric, dtype):
    for i, cols in enumerate(COLUMNS):
        x = awkward((13, cols), dtype)
        for group_size in GROUP_SIZES:
            _, scale, zero = there_and_back(x, form, group_size, symmetric, FLOATS[i % 3])
            # Twice as narrow, so that many are clipped.
            scale = scale / 2
            data = ops.quantize_with(x, scale, zero, form.code, group_size)
            want = ops.dequantize(data, scale, zero, form.code, group_size, cols, dtype)
            got = ops.fake_quantize_with(x, scale, zero, form.code, group_size)
            same_tensor(got, want)


@each_variant
def test_a_foolish_scale_gives_what_quantize_with_gives(form, symmetric):
    x = floats((6, 37))
    scale = torch.tensor([0.0, torch.inf, torch.nan, 1e-40, -0.5, 3e38])[:, None]
    data = ops.quantize_with(x, scale, None, form.code)
    want = ops.dequantize(data, scale, None, form.code, -1, 37, x.dtype)
    same_tensor(ops.fake_quantize_with(x, scale, None, form.code), want)


@each_variant
def test_nan_and_infinity_are_never_hidden(form, symmetric):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = floats((4, 40))
        y = ops.fake_quantize(x, form.code, 8, symmetric)
        x[1, 13] = bad
        broken = ops.fake_quantize(x, form.code, 8, symmetric)
        assert broken[1, 8:16].isnan().all()
        y[1, 8:16] = torch.nan
        same_tensor(broken, y)
        y = ops.fake_quantize_with(x, torch.tensor(0.1), None, form.code, None)
        assert y.isnan().sum() == 1 and y[1, 13].isnan()
        assert ops.fake_quantize(x, form.code, None, symmetric).isnan().all()


def test_any_strides():
    x = floats((13, 40))
    want = ops.fake_quantize(x, 1, 8)
    scale = torch.full((13, 5), 0.2)
    want_with = ops.fake_quantize_with(x, scale, None, 1, 8)
    want_gradients = ops.fake_quantize_backward(x.flip(0), x, scale, None, 1, 8)
    for _, view in strided(x):
        same_tensor(ops.fake_quantize(view, 1, 8), want)
        same_tensor(ops.fake_quantize_with(view, scale, None, 1, 8), want_with)
        got = ops.fake_quantize_backward(view.flip(0), view, scale, None, 1, 8)
        for a, b in zip(got, want_gradients, strict=True):
            same_tensor(a, b)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 5), (7,), (2, 3, 4, 6)])
@pytest.mark.parametrize("group_size", [None, -1, 4])
def test_any_shape(shape, group_size):
    x = floats(shape)
    y, scale, zero = there_and_back(x, ref.INT8, group_size, False)
    same_tensor(ops.fake_quantize(x, 0, group_size, False), y)
    same_tensor(ops.fake_quantize_with(x, scale, zero, 0, group_size), y)
    dx, dscale, dzero = ops.fake_quantize_backward(x, x, scale, zero, 0, group_size)
    assert dx.shape == shape
    assert dscale.shape == scale.shape
    assert dzero.shape == (scale.shape if scale.numel() else (0,))
    if x.numel() == 0:
        assert not dscale.any()


def test_large_tensors_go_past_the_caches():
    x = floats((40, 33000))
    for form in (ref.INT8, ref.NF4):
        same_tensor(ops.fake_quantize(x, form.code), there_and_back(x, form, -1, True)[0])


# ---- Gradients -----------------------------------------------------------------------------------


def gradients(x, grad, form, scale, zero):
    """What Esser et al. (2020, equations 3 and 5) and Bhalgat et al. (2020) say, in float64.

    The zero point is a code here: y = (clip(x / s + z) − z) s, hence dy/dz = −s where it clips.

    Args: float64 arrays; scale and zero broadcast against x.
    """
    low, high = form.symmetric if zero is None else form.asymmetric
    zero = form.offset if zero is None else zero
    low, high = (-1.0, 1.0) if form is ref.NF4 else (low - zero, high - zero)
    v = x / scale
    if form is ref.NF4:
        levels = ref.NF4_LEVELS.astype(np.float64)
        rounded = levels[np.abs(np.clip(v, low, high)[..., None] - levels).argmin(-1)]
    else:
        rounded = np.rint(np.clip(v, low, high))
    inside = (v >= low) & (v <= high)
    to_scale = np.where(inside, rounded - v, np.where(v < low, low, high))
    return grad * inside, grad * to_scale, np.where(inside, 0.0, -scale * grad)


def apart_from_ties(shape, scale, zero, form, seed):
    """x whose quotients are near no end of the range and near no tie, where rounding decides."""
    random = rng("apart", shape, seed)
    if form is ref.NF4:
        levels = np.arange(-130, 130) / 100 + 0.0031
        return random.choice(levels, shape) * scale
    low, high = form.symmetric if zero is None else form.asymmetric
    centre = form.offset if zero is None else zero
    around = [low - 5, low - 1, low, (low + high) // 2, high - 1, high, high + 6]
    whole = random.choice(around, shape) - centre
    part = random.choice([-0.41, -0.2, 0.13, 0.37], shape)
    return (whole + part) * scale


@pytest.mark.parametrize("dtype", FLOATS[:1], ids=str)
@each_variant
def test_gradients(form, symmetric, dtype):
    seen: list[bool] = []
    for rows, cols, group_size in ((5, 37, 8), (3, 200, -1), (1, 16, -1), (4, 33, None), (2, 9, 1)):
        random = rng("gradients", rows, cols, group_size)
        groups = 1 if group_size in (None, -1) else -(-cols // group_size)
        shape = () if group_size is None else (rows, groups)
        scale = np.float32(2.0) ** random.uniform(-6, 2, shape).astype(np.float32)
        zero = None
        if not symmetric:
            low, high = form.asymmetric
            zero = random.integers(low, high + 1, shape)

        def wide(part, group_size=group_size, cols=cols):
            spread = part is None or group_size is None
            return part if spread else ref.spread(part, cols, group_size)

        x = apart_from_ties((rows, cols), wide(scale), wide(zero), form, group_size)
        x = torch.from_numpy(x.astype(np.float32)).to(dtype).requires_grad_()
        grad = floats((rows, cols), dtype, seed="grad")
        s = torch.from_numpy(np.asarray(scale)).requires_grad_()
        z = None
        if zero is not None:
            z = torch.from_numpy(np.asarray(zero)).float().requires_grad_()
        ops.fake_quantize_with(x, s, z, form.code, group_size).backward(grad)

        exact = [ref.values(t).astype(np.float64) for t in (x, grad)]
        dx, ds, dz = gradients(*exact, form, wide(scale).astype(np.float64), wide(zero))
        np.testing.assert_array_equal(ref.values(x.grad), dx)

        def summed(part, group_size=group_size, cols=cols):
            if group_size is None:
                return part.sum()
            edges = ref.group_edges(cols, group_size)
            return np.stack([part[:, i:j].sum(1) for i, j in edges], 1)

        # One rounding for each term and sum, and two for each quotient.
        low, high = form.symmetric if zero is None else form.asymmetric
        quotients = 2.0**-23 * (high - low + 12) * summed(np.abs(exact[1]))
        for got, want in ((s.grad, ds), (None if z is None else z.grad, dz)):
            if got is not None:
                bound = (cols * rows + 300) * 2.0**-24 * summed(np.abs(want) + np.abs(exact[1]))
                assert (np.abs(ref.values(got) - summed(want)) <= bound + quotients).all()
        seen += [(dx == 0).any(), (dx != 0).any()]
    assert sum(seen) >= 8


@each_variant
def test_the_gradient_goes_straight_through_where_scales_follow_the_data(form, symmetric):
    x = awkward((13, 40)).requires_grad_()
    grad = floats((13, 40))
    ops.fake_quantize(x, form.code, 8, symmetric).backward(grad)
    same_tensor(x.grad, grad)


def test_the_ends_of_the_range_are_inside():
    x = torch.tensor([[-64.0, -63.5, 0.0, 63.5, 63.6, 64.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    ops.fake_quantize_with(x, scale, None, 0).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 0, 0]]
    assert scale.grad.item() == -127 + 0 + 0 + 0 + 127 + 127


def test_zeros_of_a_relu_are_inside():
    """An asymmetric range that begins at zero, as activations have it."""
    x = torch.zeros(1, 5, requires_grad=True)
    zero = torch.tensor([[-128]], dtype=torch.int8)
    ops.fake_quantize_with(x, torch.tensor([[0.1]]), zero, 0).sum().backward()
    assert x.grad.tolist() == [[1] * 5]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types_of_gradients(dtype):
    x = floats((3, 8), dtype).requires_grad_()
    scale = torch.full((3, 2), 0.25, dtype=dtype, requires_grad=True)
    zero = torch.full((3, 2), 7.4, requires_grad=True)
    y = ops.fake_quantize_with(x, scale, zero, 1, 4)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == scale.grad.dtype == dtype
    assert zero.grad.dtype == torch.float32
    assert scale.grad.any()


@pytest.mark.parametrize("form", [ref.INT8, ref.INT4, ref.INT16], ids=lambda form: form.name)
def test_float_zero_points_are_rounded_to_steps(form):
    code, (low, high) = form.code, form.asymmetric
    halves = torch.tensor([0.5, 1.5, 2.5]) / form.steps
    numbers = torch.cat([torch.tensor([low - 9.0, 3.2, high + 0.7]), low + halves])
    codes = (numbers * form.steps).round().clamp(low * form.steps, high * form.steps)
    stored = getattr(torch, ref.storage_dtype(form).__name__)
    x = floats((6, 20)) * 30
    scale = torch.full((6, 1), 0.7)
    want = ops.fake_quantize_with(x, scale, codes.to(stored)[:, None], code)
    same_tensor(ops.fake_quantize_with(x, scale, numbers[:, None], code), want)


def test_gradients_without_rows():
    x, scale, zero = (torch.zeros(0, n, requires_grad=True) for n in (8, 1, 1))
    ops.fake_quantize_with(x, scale, zero, 1, -1).sum().backward()
    assert zero.grad.shape == (0, 1) and scale.grad.shape == (0, 1) and x.grad.shape == (0, 8)


def test_nan_shows_in_the_gradient_of_the_scale():
    x = floats((2, 9))
    x[1, 4] = torch.nan
    dx, dscale, _ = ops.fake_quantize_backward(x, x, torch.ones(2, 1), None, 0)
    assert dscale[0].isfinite() and dscale[1].isnan()
    assert dx[1, 4].isnan()


@given(
    st.sampled_from(ref.FORMATS), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32 - 1)
)
def test_drawn(form, cols, group_size, seed):
    x = floats((3, cols), FLOATS[seed % 3], seed) * 10.0 ** (seed % 7 - 3)
    symmetric = form is ref.NF4 or seed % 2 == 0
    want, scale, zero = there_and_back(x, form, group_size, symmetric)
    same_tensor(ops.fake_quantize(x, form.code, group_size, symmetric), want)
    same_tensor(ops.fake_quantize_with(x, scale, zero, form.code, group_size), want)
