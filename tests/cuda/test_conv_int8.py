"""conv with int8 activations as CUDA kernels, run by the emulator: the same bits as on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.conv import ConvWeight, Geometry, conv_weight
from helpers.data import FLOATS, Kind, floats, rng

cpu = torch.ops.qkernels
SYMMETRIC, ASYMMETRIC = 1, 2
KIND = Kind(ref.INT8, True, torch.float32)

GEOMETRIES = {
    "3 channels": Geometry((9, 8), (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), 1, 3, 24),
    "a tap is whole pieces": Geometry((6, 7), (3, 2), (1, 2), (2, 0), (0, 1), (2, 1), 1, 20, 70),
    "one tap": Geometry((9, 16), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1, 32, 130, 1),
    "groups": Geometry((5, 6), (2, 3), (1, 1), (1, 1), (1, 1), (1, 1), 3, 6, 18),
    "depthwise": Geometry((8, 7), (3, 3), (2, 1), (1, 1), (1, 1), (1, 2), 19, 1, 1),
    "a line": Geometry((40,), (5,), (3,), (2,), (1,), (2,), 1, 8, 17, 3),
    "a volume": Geometry((3, 4, 5), (2, 2, 3), (1, 2, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), 2, 4, 5),
    "transposed": Geometry((4, 5), (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), 2, 5, 6, 2, True),
}
# Channels that are whole pieces: codes of channels last are read where they are.
IN_PLACE = {
    "large tiles": Geometry((7, 9), (3, 3), (2, 1), (1, 1), (1, 1), (1, 1), 1, 16, 72),
    "narrow tiles": Geometry((7, 9), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1, 16, 40),
    "groups": Geometry((5, 6), (3, 2), (1, 2), (2, 0), (1, 1), (2, 1), 2, 16, 6),
    "cut off": Geometry((8, 9), (2, 3), (1, 1), (-1, 1), (1, -2), (1, 1), 1, 32, 8),
    "more taps than bits": Geometry((7, 8), (6, 6), (1, 1), (2, 2), (2, 3), (1, 1), 1, 16, 8),
    "depthwise": Geometry((8, 7), (3, 3), (2, 1), (1, 1), (1, 1), (1, 2), 16, 1, 1),
}
# Channels that come in pieces of 32, for products of warpgroups: how many multiprocessors have the
# tile of outputs x pixels that is named.
WARPGROUPS = {
    "64x128": (1, Geometry((9, 8), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1, 32, 40, 5)),
    "64x128, two taps a stage": (
        2,
        Geometry((17, 19), (3, 3), (2, 1), (1, 1), (1, 1), (1, 1), 1, 64, 64, 3),
    ),
    "128x96": (3, Geometry((7, 7), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1, 96, 128, 5)),
    "128x128": (2, Geometry((8, 8), (2, 2), (1, 1), (1, 0), (0, 1), (1, 1), 1, 128, 70, 4)),
    "128x128, channels first": (
        1,
        Geometry((7, 9), (2, 3), (1, 1), (2, 1), (1, 2), (2, 1), 1, 256, 200, 3),
    ),
    "128x192": (1, Geometry((10, 19), (1, 2), (1, 1), (0, 1), (0, 0), (1, 1), 1, 160, 72, 1)),
    "a line": (1, Geometry((40,), (5,), (3,), (2,), (1,), (2,), 1, 32, 17, 3)),
    "a volume": (
        4,
        Geometry((3, 4, 5), (2, 2, 3), (1, 2, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), 1, 32, 65),
    ),
    "transposed": (2, Geometry((4, 5), (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), 1, 64, 96, 2, True)),
    "more taps than bits": (
        1,
        Geometry((7, 8), (6, 6), (1, 1), (2, 2), (2, 3), (1, 1), 1, 32, 1),
    ),
    "cut off": (1, Geometry((8, 9), (2, 3), (1, 1), (-1, 1), (1, -2), (1, 1), 1, 32, 8)),
    "one pixel": (1, Geometry((1, 1), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1, 32, 2, 1)),
}


@pytest.fixture(params=[1, 64])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that large tiles fill, and one that they do not."""
    monkeypatch.setenv("QKERNELS_HOST_MULTIPROCESSORS", str(request.param))


def conv(ops: Any, w: ConvWeight, x: Tensor, dtype: Any = None, **rest: Any) -> Tensor:
    """The result, which is the CPU's."""
    arguments = list(w.arguments(x, **rest))
    want = cpu.conv(*arguments, dtype)
    layout = w.kind.cuda_layout
    at = next(i for i, value in enumerate(arguments) if value is w.packed)
    arguments[at] = ops.pack_conv(*w.stored, layout, *w.sizes)
    arguments[arguments.index(w.kind.layout, 10)] = layout
    y = ops.conv(*arguments, dtype)
    same_tensor(y, want)
    assert y.stride() == want.stride()
    return y


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry(ops: Any, name: str, activation: int) -> None:
    g = GEOMETRIES[name]
    w = conv_weight(g, KIND)
    for i, dtype in enumerate(FLOATS):
        x = g.input(dtype)
        if x.dim() == 4 and i == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        bias = floats((g.outputs,), dtype, seed="bias") if i else None
        y = conv(ops, w, x, bias=bias, activation=activation)
        if i == 0:
            same_bits(y, w.integer(x, bias, activation))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["3 channels", "one tap", "depthwise", "groups"])
def test_codes_in_and_out(ops: Any, name: str) -> None:
    g = GEOMETRIES[name]
    w = conv_weight(g, KIND)
    codes = rng("codes", name).integers(-128, 128, (g.batch, g.channels, *g.size), np.int8)
    shape = (g.batch, g.outputs, *g.out)
    for last in (False, True):
        order = torch.channels_last if last else torch.contiguous_format
        x = torch.from_numpy(codes).contiguous(memory_format=order)
        residual = torch.from_numpy(rng("residual", name).integers(-128, 128, shape, np.int8))
        given = {"x_scale": 0.02, "x_zero": 5, "activation": ASYMMETRIC}
        conv(ops, w, x, **given)
        conv(ops, w, x, **given, y_scale=0.5, y_zero=-3, epilogue=1)
        coded = {"residual": residual, "r_scale": 0.1, "r_zero": 4}
        conv(ops, w, x, **given, **coded, y_scale=0.5, y_zero=-3, epilogue=6)
        conv(ops, w, x, torch.float16, **given, residual=floats(shape, torch.bfloat16), epilogue=2)
        conv(ops, w, x, x_scale=0.02, activation=SYMMETRIC, y_scale=0.4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", IN_PLACE)
def test_codes_in_place(ops: Any, name: str) -> None:
    g = IN_PLACE[name]
    w = conv_weight(g, KIND)
    codes = rng("codes", name).integers(-128, 128, (g.batch, g.channels, *g.size), np.int8)
    x = torch.from_numpy(codes).contiguous(memory_format=torch.channels_last)
    shape = (g.batch, g.outputs, *g.out)
    given = {"x_scale": 0.02, "activation": SYMMETRIC, "bias": floats((g.outputs,), seed="bias")}
    conv(ops, w, x, **given)
    conv(ops, w, x, torch.bfloat16, **given, epilogue=1)
    for dtype in (torch.float32, torch.float16):
        conv(ops, w, x, **given, residual=floats(shape, dtype), y_scale=0.5, epilogue=1)
    residual = torch.from_numpy(rng("residual", name).integers(-128, 128, shape, np.int8))
    coded = {"residual": residual, "r_scale": 0.1, "r_zero": 4}
    conv(ops, w, x, **given, **coded, y_scale=0.5, y_zero=-3)
    conv(ops, w, x, **{**given, "activation": ASYMMETRIC}, x_zero=7, y_scale=0.5)


@pytest.fixture
def warpgroups(sm90: None, monkeypatch: pytest.MonkeyPatch, request: Any) -> Geometry:
    """A geometry, on a device of sm_90 whose size makes it take a certain tile."""
    multiprocessors, geometry = WARPGROUPS[request.param]
    monkeypatch.setenv("QKERNELS_HOST_MULTIPROCESSORS", str(multiprocessors))
    return geometry


@pytest.mark.parametrize("warpgroups", WARPGROUPS, indirect=True)
def test_warpgroups(ops: Any, warpgroups: Geometry) -> None:
    g = warpgroups
    w, bias = conv_weight(g, KIND), floats((g.outputs,), seed="bias")
    for activation in (SYMMETRIC, ASYMMETRIC):
        x = g.input()
        same_bits(conv(ops, w, x, bias=bias, activation=activation), w.integer(x, bias, activation))
    conv(ops, w, g.input(torch.bfloat16), x_scale=0.1, x_zero=3, activation=ASYMMETRIC)


def formats(x: Tensor) -> list[Tensor]:
    """x as it is and with channels last, where torch has that."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return [x] if last is None else [x, x.contiguous(memory_format=last)]


@pytest.mark.parametrize("warpgroups", WARPGROUPS, indirect=True)
def test_codes_by_warpgroups(ops: Any, warpgroups: Geometry) -> None:
    g = warpgroups
    w, shape = conv_weight(g, KIND), (g.batch, g.outputs, *g.out)
    codes = rng("codes").integers(-128, 128, (g.batch, g.channels, *g.size), np.int8)
    residual = torch.from_numpy(rng("residual").integers(-128, 128, shape, np.int8))
    given = {"x_scale": 0.02, "bias": floats((g.outputs,), seed="bias")}
    for x in formats(torch.from_numpy(codes)):
        conv(ops, w, x, **given, activation=SYMMETRIC, y_scale=0.5, epilogue=1)
        conv(ops, w, x, torch.bfloat16, **given, activation=SYMMETRIC)
        conv(ops, w, x, **given, activation=ASYMMETRIC, x_zero=-7, y_scale=0.5, y_zero=9)
        bad = {**given, "bias": given["bias"].clone().index_fill_(0, torch.tensor(0), torch.nan)}
        conv(ops, w, x, **bad, activation=SYMMETRIC, y_scale=0.5, y_zero=9)
        conv(
            ops, w, x, torch.float16, **given, activation=ASYMMETRIC, x_zero=100,
            residual=residual, r_scale=0.1, r_zero=4, epilogue=6,
        )  # fmt: skip


def test_a_bad_image_touches_no_other(ops: Any) -> None:
    for name in ("3 channels", "depthwise"):
        g = GEOMETRIES[name]
        w, x = conv_weight(g, KIND), g.input()
        x[0, 1, 2, 3] = float("nan")
        for rest in ({}, {"x_scale": 0.1}, {"x_scale": 0.1, "y_scale": 0.3, "y_zero": 2}):
            y = conv(ops, w, x, activation=ASYMMETRIC, **rest)
            if y.is_floating_point():
                assert y[0].isnan().all()
                assert y[1].isfinite().all()
            else:
                assert (y[0] == 2).all()


def test_extreme_codes(ops: Any) -> None:
    """Codes of 127 with a zero point of -128 and weights of -128: 255 * 128 for each product."""
    g = Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1, 64, 17)
    w = conv_weight(g, KIND)
    w.stored[0].fill_(-128)
    packed = cpu.pack_conv(*w.stored, KIND.layout, *w.sizes)
    w = ConvWeight(g, KIND, -1, w.codes * 0 - 128, w.scale, w.zero, w.stored, packed)
    x = torch.full((2, 64, 3, 3), 127, dtype=torch.int8)
    y = conv(ops, w, x, x_scale=1.0, x_zero=-128, activation=ASYMMETRIC)
    same_bits(y, w.integer(x, None, ASYMMETRIC, (1.0, -128)))


def test_packing_comes_back(ops: Any) -> None:
    for symmetric in (True, False):
        kind = Kind(ref.INT8, symmetric, torch.bfloat16)
        for g in GEOMETRIES.values():
            w = conv_weight(g, kind)
            layout = kind.cuda_layout
            packed = ops.pack_conv(*w.stored, layout, *w.sizes)
            taps, channels, groups, group_size = w.sizes
            back = ops.unpack_conv(packed, layout, taps, channels, groups, g.outputs, group_size)
            for got, want in zip(back, w.stored, strict=True):
                if want is not None:
                    same_tensor(got, want)
