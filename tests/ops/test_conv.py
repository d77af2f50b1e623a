"""conv: integer results equal to the reference to the bit, float ones inside the stated bound."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers import reference as ref
from helpers.check import float_path_bound, same_bits, same_codes, same_tensor, within
from helpers.conv import Geometry, conv_weight
from helpers.data import FLOATS, KINDS, Kind, floats, rng
from qkernels import _C

SYMMETRIC, ASYMMETRIC = 1, 2
INT8 = KINDS[0]
FUNCTIONS = (
    lambda t: t,
    F.relu,
    F.gelu,
    lambda t: F.gelu(t, approximate="tanh"),
    F.silu,
    F.relu6,
    F.hardswish,
)
ops = torch.ops.qkernels


def plane(size: tuple[int, ...], kernel: tuple[int, ...], **changes: object) -> Geometry:
    dims = len(size)
    same = Geometry(size, kernel, (1,) * dims, (0,) * dims, (0,) * dims, (1,) * dims)
    return replace(same, **changes)


GEOMETRIES = {
    "3x3": plane((9, 11), (3, 3), before=(1, 1), after=(1, 1), group_channels=8, group_outputs=16),
    "1x1": plane((5, 7), (1, 1), group_channels=24, group_outputs=70),
    "1x1 stride": plane((9, 9), (1, 1), stride=(2, 2), group_channels=16, group_outputs=33),
    "first layer": plane(
        (23, 30), (7, 7), stride=(2, 2), before=(3, 3), after=(3, 3), group_channels=3,
        group_outputs=64,
    ),
    "odd channels": plane((6, 8), (3, 2), group_channels=5, group_outputs=17),
    "uneven padding": plane((6, 8), (3, 2), before=(2, 0), after=(0, 1)),
    "negative padding": plane((9, 8), (3, 2), before=(-2, 1), after=(1, -3)),
    "dilated": plane((12, 13), (3, 3), dilation=(2, 3), before=(2, 3), after=(2, 3)),
    "strided": plane((12, 13), (3, 3), stride=(3, 2), before=(1, 0), after=(1, 0)),
    "groups": plane((7, 7), (3, 3), groups=3, group_channels=6, group_outputs=20),
    "depthwise": plane((9, 8), (3, 3), groups=35, group_channels=1, group_outputs=1),
    "depthwise strided": plane(
        (11, 12), (5, 3), stride=(2, 2), before=(2, 1), after=(2, 1), groups=16, group_channels=1,
        group_outputs=1,
    ),
    "depthwise dilated": plane(
        (11, 12), (2, 4), dilation=(3, 2), groups=50, group_channels=1, group_outputs=1
    ),
    "depthwise with 144 taps": plane(
        (13, 13), (12, 12), groups=8, group_channels=1, group_outputs=1
    ),
    "depthwise, two outputs each": plane(
        (6, 6), (3, 3), groups=9, group_channels=1, group_outputs=2
    ),
    "depthwise, wide": plane(
        (5, 9), (3, 3), before=(1, 1), after=(1, 1), groups=100, group_channels=1, group_outputs=1
    ),
    "depthwise, rows of 7": plane(
        (8, 12), (2, 7), before=(0, 3), after=(0, 3), groups=24, group_channels=1, group_outputs=1
    ),
    "3x3 without borders": plane((8, 9), (3, 3), group_channels=4, group_outputs=64),
    "1 channel": plane((9, 8), (5, 5), before=(2, 2), after=(2, 2), group_channels=1),
    "2 channels, dilated": plane((9, 9), (2, 3), dilation=(2, 1), group_channels=2),
    "1d": plane((40,), (5,), before=(2,), after=(2,), group_channels=12, group_outputs=20),
    "1d depthwise": plane((40,), (4,), groups=20, group_channels=1, group_outputs=1),
    "3d": plane((4, 5, 6), (3, 2, 3), before=(1, 1, 1), after=(1, 1, 1), stride=(1, 2, 1)),
    "transposed": plane(
        (5, 6), (4, 4), stride=(2, 2), before=(1, 1), after=(1, 1), transposed=True
    ),
    "transposed, output padding": plane(
        (5, 6), (3, 3), stride=(2, 3), before=(1, 1), after=(0, -1), transposed=True
    ),
    "transposed, cut": plane((5, 6), (2, 3), before=(3, 2), after=(0, 3), transposed=True),
    "transposed groups": plane(
        (5, 6), (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, group_channels=5,
        group_outputs=3, transposed=True,
    ),
    "transposed 1d": plane((9,), (4,), stride=(3,), transposed=True),
    "one pixel": plane((1, 1), (1, 1), batch=1, group_channels=7, group_outputs=1),
    "batch of 17": plane((3, 3), (3, 3), before=(1, 1), after=(1, 1), batch=17),
    "long": plane((4, 3), (3, 3), group_channels=600, group_outputs=50),
}  # fmt: skip
ALL = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def orders(x: Tensor) -> list[Tensor]:
    """x contiguous and, where there is such a thing, channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        return [x]
    return [x, x.contiguous(memory_format=formats[x.dim()])]


def test_the_isa_that_was_asked_for() -> None:
    name = _C.conv_kernel_name(INT8.layout, 9, 8, 1, 8, -1, 1)
    assert name.split("_")[2] == _C.isa().removesuffix("bf16")
    assert "depthwise" in _C.conv_kernel_name(INT8.layout, 9, 1, 8, 8, -1, 1)


@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@ALL
def test_integer(geometry: Geometry, activation: int) -> None:
    w = conv_weight(geometry, INT8)
    for i, dtype in enumerate(FLOATS):
        x = geometry.input(dtype, seed=i)
        bias = floats((geometry.outputs,), FLOATS[i - 1], seed="bias") if i % 2 else None
        expected = w.integer(x, bias, activation)
        for given_x in orders(x):
            y = w.conv(given_x, bias, activation=activation)
            assert y.dtype == dtype
            assert y.shape == (geometry.batch, geometry.outputs, *geometry.out)
            same_bits(y, expected)
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert y.stride() == w.conv(given_x, activation=activation).stride()


@ALL
def test_codes_in_and_out(geometry: Geometry) -> None:
    """int8 to int8, with a residual: one rounding at the end."""
    w = conv_weight(geometry, KINDS[2])
    shape = (geometry.batch, geometry.channels, *geometry.size)
    random = rng("codes", str(geometry))
    x = torch.from_numpy(random.integers(-128, 128, shape, "int8"))
    bias = floats((geometry.outputs,), seed="bias")
    x_range, residual_range, y_range = (0.01, -128), (0.5, 3), (0.7, -5)
    sums = w.integer(x, bias, ASYMMETRIC, x_range)
    residual = torch.from_numpy(random.integers(-128, 128, sums.shape, "int8"))
    expected = sums + (residual.numpy() - np.float32(3)) * np.float32(0.5)
    expected = np.where(expected < 0, np.float32(0), expected)
    codes = np.clip(np.rint(expected * (np.float32(1) / np.float32(0.7))) - 5, -128, 127)
    for given_x, given_residual in zip(orders(x), reversed(orders(residual)), strict=True):
        options = {"activation": ASYMMETRIC, "epilogue": 1, "x_range": x_range}
        y = w.conv(
            given_x,
            bias,
            residual=given_residual,
            residual_range=residual_range,
            y_range=y_range,
            **options,
        )
        assert y.dtype == torch.int8
        same_codes(y, codes)
        for dtype in FLOATS:
            real = ref.round_to((residual.numpy() - np.float32(3)) * np.float32(0.5), dtype)
            want = np.maximum(sums + real, np.float32(0))
            y = w.conv(
                given_x, bias, residual=torch.from_numpy(real).to(dtype), dtype=dtype, **options
            )
            same_bits(y, np.where(want == 0, np.float32(0), want))


@ALL
def test_codes_without_residual(geometry: Geometry) -> None:
    """Saturation stands for ReLU, ReLU6 and clamping, but where a quotient could leave int32."""
    w = conv_weight(geometry, KINDS[2])
    shape = (geometry.batch, geometry.channels, *geometry.size)
    x = torch.from_numpy(rng("codes", str(geometry)).integers(-128, 128, shape, "int8"))
    bias = floats((geometry.outputs,), seed="bias")
    sums = w.integer(x, bias, ASYMMETRIC, (0.01, 9))
    for epilogue, scale, zero in ((0, 0.3, 11), (1, 0.3, -128), (5, 0.05, -20), (0, 1e-37, 1)):
        limited = (sums, np.maximum(sums, 0), np.clip(sums, 0, 6))[min(epilogue, 2)]
        with np.errstate(over="ignore"):
            quotients = limited.astype(np.float32) * (np.float32(1) / np.float32(scale))
        codes = np.clip(np.rint(quotients.astype(np.float64)) + zero, -128, 127)
        for given_x in orders(x):
            y = w.conv(
                given_x,
                bias,
                activation=ASYMMETRIC,
                epilogue=epilogue,
                x_range=(0.01, 9),
                y_range=(scale, zero),
            )
            same_codes(y, codes)


@pytest.mark.parametrize("x_range", [(0.02, None), (0.02, 17)])
def test_static_ranges(x_range: tuple[float, int | None]) -> None:
    activation = SYMMETRIC if x_range[1] is None else ASYMMETRIC
    for name in ("3x3", "first layer", "depthwise", "transposed"):
        w = conv_weight(GEOMETRIES[name], INT8)
        for dtype in FLOATS:
            x = GEOMETRIES[name].input(dtype) * 3  # some of it saturates
            y = w.conv(x, activation=activation, x_range=x_range)
            same_bits(y, w.integer(x, None, activation, x_range))


@pytest.mark.parametrize("epilogue", range(7))
def test_epilogues(epilogue: int) -> None:
    """The functions are those of linear, which has tests of their values."""
    geometry = GEOMETRIES["3x3"]
    w = conv_weight(geometry, INT8)
    x = geometry.input()
    plain = w.conv(x, activation=SYMMETRIC)
    for given_x in orders(x):
        y = w.conv(given_x, activation=SYMMETRIC, epilogue=epilogue)
        want = FUNCTIONS[epilogue](plain.double())
        allowed = 0.0 if epilogue in (0, 1, 5) else 1e-6
        torch.testing.assert_close(y.double(), want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@ALL
def test_float_activations(geometry: Geometry, kind: Kind) -> None:
    groups = 1 if kind.form is ref.INT8 and kind.scale_dtype == torch.float32 else 7
    w = conv_weight(geometry, kind, -1 if groups == 1 else 16)
    x = geometry.input()
    bias = floats((geometry.outputs,), seed="bias")
    channel = (1, -1, *[1] * len(geometry.size))
    exact = geometry.sums(x, w.exact())
    magnitude = geometry.sums(x.abs(), np.abs(w.exact()))
    columns = w.codes.shape[1]
    # float_path_bound for one row and output with these magnitudes.
    unit = float_path_bound(np.ones((1, columns)), np.zeros((1, columns)), w.scale.shape[1])
    factor = (columns + w.scale.shape[1] + 8) * 2.0**-24
    bound = factor / (1 - factor) * magnitude + unit.max()
    bound = bound + 2.0**-23 * np.abs(ref.values(bias)).reshape(channel)
    for given_x in orders(x):
        y = w.conv(given_x, bias)
        within(y, exact + ref.values(bias).reshape(channel), bound)
    half = w.conv(x.bfloat16(), bias)
    assert half.dtype == torch.bfloat16
    want = geometry.sums(x.bfloat16(), w.exact()) + ref.values(bias).reshape(channel)
    if _C.isa() == "avx512bf16" and kind.form is ref.NF4:  # its levels are rounded
        bound = bound + 2.0**-8 * magnitude
    within(half, want, 1.02 * bound)


dims = st.integers(1, 3)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    n = draw(dims)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    return Geometry(
        size=each(1, 9),
        kernel=each(1, 4),
        stride=each(1, 3),
        before=each(-1, 3),
        after=each(-1, 3),
        dilation=each(1, 3),
        groups=draw(st.sampled_from([1, 1, 2, 3, 17])),
        group_channels=draw(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 13])),
        group_outputs=draw(st.sampled_from([1, 1, 2, 3, 16, 17, 49])),
        batch=draw(st.integers(1, 3)),
        transposed=draw(st.booleans()),
    )


@given(geometries(), st.sampled_from([SYMMETRIC, ASYMMETRIC]), st.booleans(), st.integers(0, 99))
def test_any_geometry(geometry: Geometry, activation: int, last: bool, seed: int) -> None:
    assume(geometry.possible)
    w = conv_weight(geometry, INT8, seed=seed)
    x = geometry.input(FLOATS[seed % 3], seed)
    same_bits(
        w.conv(orders(x)[-1 if last else 0], activation=activation), w.integer(x, None, activation)
    )


@given(geometries(), st.sampled_from(KINDS), st.sampled_from([-1, 1, 7, 32]))
def test_packing_is_invertible(geometry: Geometry, kind: Kind, group_size: int) -> None:
    w = conv_weight(geometry, kind, group_size)
    taps, channels, groups, group_size = w.sizes
    sizes = (kind.layout, taps, channels, groups)
    data, scale, zero = ops.unpack_conv(w.packed, *sizes, geometry.outputs, group_size)
    same_tensor(data, w.stored[0])
    same_tensor(scale, w.stored[1])
    if w.stored[2] is not None:
        same_tensor(zero, w.stored[2])
    assert tuple(w.packed.shape) == _C.conv_packed_shape(*sizes, geometry.outputs, group_size)


@pytest.mark.parametrize("extreme", [-128, 127])
def test_extreme_codes(extreme: int) -> None:
    """The largest products there are, on an input whose zero point is at the other end."""
    geometry = plane((3, 3), (3, 3), before=(1, 1), after=(1, 1), group_channels=600)
    for form in (geometry, replace(geometry, groups=32, group_channels=1, group_outputs=1)):
        w = conv_weight(form, INT8)
        data = torch.full_like(w.stored[0], -128)
        packed = ops.pack_conv(data, w.stored[1], None, INT8.layout, *w.sizes)
        w = replace(w, packed=packed, codes=np.full_like(w.codes, -128))
        x = torch.full((2, form.channels, 3, 3), extreme, dtype=torch.int8)
        x_range = (1.0, -1 - extreme)
        y = w.conv(x, activation=ASYMMETRIC, x_range=x_range)
        same_bits(y, w.integer(x, None, ASYMMETRIC, x_range))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["3x3", "depthwise", "transposed"])
def test_a_bad_image_touches_no_other(name: str, bad: float) -> None:
    geometry = replace(GEOMETRIES[name], batch=3)
    w = conv_weight(geometry, INT8)
    x = geometry.input()
    for x_range in ((None, None), (0.05, None)):
        good = w.conv(x, activation=SYMMETRIC, x_range=x_range)
        spoiled = x.clone()
        spoiled[1, 0, 0, 0] = bad
        y = w.conv(spoiled, activation=SYMMETRIC, x_range=x_range)
        assert y[1].isnan().all()
        codes = w.conv(spoiled, activation=SYMMETRIC, x_range=x_range, y_range=(0.5, 7))
        assert (codes[1] == 7).all()
        assert (codes[::2] != 7).any()
        same_tensor(y[::2], good[::2])


@pytest.mark.parametrize("name", ["3x3", "first layer", "depthwise", "groups", "long"])
def test_images_alone_and_in_company(name: str) -> None:
    geometry = replace(GEOMETRIES[name], batch=9)
    w = conv_weight(geometry, INT8)
    x = geometry.input()
    whole = w.conv(x, activation=ASYMMETRIC)
    for i in range(9):
        same_tensor(w.conv(x[i : i + 1], activation=ASYMMETRIC), whole[i : i + 1])
    same_tensor(w.conv(x[2:], activation=ASYMMETRIC), whole[2:])


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batches(batch: int) -> None:
    geometry = replace(GEOMETRIES["3x3"], batch=batch)
    w = conv_weight(geometry, INT8)
    assert w.conv(geometry.input(), activation=SYMMETRIC).shape[0] == batch
    assert w.conv(geometry.input()).shape[0] == batch


@pytest.mark.parametrize("activation", [0, SYMMETRIC])
@ALL
def test_gradients(geometry: Geometry, activation: int) -> None:
    """Those of torch in float64, through the weight as it is stored."""
    w = conv_weight(geometry, INT8)
    x = geometry.input().requires_grad_()
    bias = floats((geometry.outputs,), seed="bias").requires_grad_()
    y = w.conv(x, bias, activation=activation, differentiable=True)
    grad = floats(tuple(y.shape), seed="grad")
    y.backward(grad)

    exact = x.detach().double().requires_grad_()
    weight = w.exact()
    geometry.products(exact, weight).backward(grad.double())
    assert x.grad is not None and bias.grad is not None and exact.grad is not None
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5 * scale)
    want = grad.double().sum((0, *range(2, grad.dim())))
    torch.testing.assert_close(bias.grad.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", [0, SYMMETRIC, ASYMMETRIC])
def test_no_channels(activation: int, transposed: bool) -> None:
    """A sum of nothing: the bias alone, in every order of x. Torch knows no such convolution."""
    geometry = plane((5, 4), (3, 3), stride=(2, 2), group_channels=0, transposed=transposed)
    w = conv_weight(geometry, INT8)
    bias = floats((geometry.outputs,))
    want = bias.view(1, -1, 1, 1).expand(geometry.batch, geometry.outputs, *geometry.out)
    for x in (torch.empty(2, 0, 5, 4), torch.empty(2, 5, 4, 0).permute(0, 3, 1, 2)):
        same_tensor(w.conv(x, bias, activation=activation), want)
