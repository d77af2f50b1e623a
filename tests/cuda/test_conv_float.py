"""conv with float activations on CUDA: torch's convolution of the dequantized weight."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import HALF_ULP, same_tensor, within
from helpers.conv import ConvWeight, Geometry, conv_weight
from helpers.data import FLOATS, KINDS, Kind, floats
from qkernels import _C

GEOMETRIES = {
    "3 channels": Geometry((9, 8), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1, 3, 24),
    "padding on one side": Geometry((6, 7), (3, 2), (1, 2), (2, 0), (0, 1), (2, 1), 1, 20, 17),
    "padding that cuts": Geometry((8, 9), (3, 3), (1, 1), (-1, 0), (1, -2), (1, 1), 1, 4, 8),
    "one tap": Geometry((9, 16), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1, 32, 40, 1),
    "rows left over": Geometry((8, 8), (2, 3), (3, 2), (1, 1), (1, 1), (1, 1), 1, 8, 8),
    "groups": Geometry((5, 6), (2, 3), (1, 1), (1, 1), (1, 1), (1, 1), 3, 6, 18),
    "depthwise": Geometry((8, 7), (3, 3), (2, 1), (1, 1), (1, 1), (1, 2), 19, 1, 1),
    "a line": Geometry((40,), (5,), (3,), (2,), (1,), (2,), 1, 8, 17, 3),
    "a volume": Geometry((3, 4, 5), (2, 2, 3), (1, 2, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), 2, 4, 5),
    "a flat volume": Geometry((1, 4, 5), (1, 2, 3), (1, 2, 1), (0,) * 3, (0, 1, 1), (1,) * 3, 1, 5),
    "transposed": Geometry((4, 5), (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), 2, 5, 6, 2, True),
    "transposed, one stride": Geometry(
        (4, 5), (3, 2), (1, 1), (1, 0), (1, 1), (1, 2), 1, 5, 6, 2, True
    ),
    "transposed, cut": Geometry((4, 5), (3, 3), (2, 3), (0, 2), (2, 0), (1, 1), 1, 5, 6, 2, True),
    "transposed line": Geometry((9,), (4,), (3,), (1,), (1,), (1,), 2, 3, 4, 2, True),
}


@pytest.fixture(autouse=True)
def no_tf32() -> Any:
    """Torch's default for convolutions, which is less exact than the bound says."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def conv(
    ops: Any, w: ConvWeight, x: Tensor, bias: Tensor | None = None, epilogue: int = 0
) -> Tensor:
    arguments = list(w.arguments(x, bias, epilogue=epilogue))
    layout = w.kind.cuda_layout
    arguments[1] = ops.pack_conv(*w.stored, layout, *w.sizes)
    arguments[10] = layout
    y: Tensor = ops.conv(*arguments, None)
    assert y.dtype == x.dtype
    assert y.stride() == w.conv(x, bias, epilogue=epilogue).stride()
    return y


def check(w: ConvWeight, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """Torch rounds the sums to x's type before the bias."""
    g = w.geometry
    exact, magnitude = g.sums(x, w.exact()), g.sums(x.abs(), np.abs(w.exact()))
    unit = 3 * (w.codes.shape[1] + w.scale.shape[1] + 8) * 2.0**-24
    bound = unit * magnitude + 1e-30
    if x.dtype != torch.float32:
        tiny = 2.0**-25 if x.dtype == torch.float16 else 2.0**-134
        ones = g.sums(x.abs(), np.ones_like(w.exact()))
        bound = bound + 1.01 * HALF_ULP[x.dtype] * magnitude + tiny * ones
        bound = bound + HALF_ULP[x.dtype] * (np.abs(exact) + bound) + tiny
    if bias is not None:
        channel = ref.values(bias).reshape(1, -1, *[1] * len(g.size))
        exact, bound = exact + channel, bound + 2.0**-23 * np.abs(channel)
    within(y, exact, bound)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry(ops: Any, name: str, kind: Kind) -> None:
    g = GEOMETRIES[name]
    by_row = kind.form is ref.INT8 and kind.scale_dtype == torch.float32
    w = conv_weight(g, kind, -1 if by_row else (16, 7)[KINDS.index(kind) % 2])
    for i, dtype in enumerate(FLOATS):
        x = g.input(dtype)
        if x.dim() == 4 and i == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if x.dim() == 5 and i == 1:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        bias = floats((g.outputs,), FLOATS[i - 1], seed="bias") if i else None
        check(w, x, conv(ops, w, x, bias), bias)


@pytest.mark.parametrize("epilogue", range(7))
def test_functions_of_the_result(ops: Any, epilogue: int) -> None:
    """By vectors, along channels and along pixels, and one by one: what the CPU's kernel makes of
    the same sums."""
    one = Kind(ref.INT8, True, torch.float32)
    for size, outputs in (((4, 6), 24), ((3, 3), 5)):
        w = conv_weight(
            Geometry(size, (1, 1), (1,) * 2, (0,) * 2, (0,) * 2, (1,) * 2, 1, 4, outputs), one
        )
        for dtype in FLOATS:
            x = w.geometry.input(dtype)
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                bias = floats((outputs,), seed="bias")
                sums = conv(ops, w, given)
                same = torch.ops.qkernels.linear(
                    sums.movedim(1, -1), *identity(outputs), bias, *[None] * 4,
                    one.layout, outputs, outputs, -1, 0, epilogue,
                )  # fmt: skip
                same_tensor(conv(ops, w, given, bias, epilogue), same.movedim(-1, 1))


def identity(n: int) -> tuple[Tensor]:
    layout = _C.layout(0, 0, True)
    return (
        torch.ops.qkernels.pack(
            torch.eye(n, dtype=torch.int8), torch.ones(n, 1), None, layout, n, -1
        ),
    )


def test_nan_stays_in_its_image(ops: Any) -> None:
    w = conv_weight(GEOMETRIES["3 channels"], KINDS[3], 16)
    x = w.geometry.input()
    want = conv(ops, w, x)
    x[0, 1, 2, 3] = float("nan")
    y = conv(ops, w, x)
    assert y[0].isnan().any()
    same_tensor(y[1:], want[1:])


def test_its_name() -> None:
    for kind in KINDS:
        name = _C.conv_kernel_name(kind.cuda_layout, 9, 4, 1, 8, -1, 0, 1)
        assert name == "dequantize + convolution"
    layout = KINDS[0].cuda_layout
    assert _C.conv_kernel_name(layout, 9, 4, 1, 8, -1, 1) == "cuda implicit gemm int8 mma"
    assert _C.conv_kernel_name(layout, 9, 1, 8, 8, -1, 1) == "cuda depthwise int8"
    names = {
        c: _C.conv_kernel_name(layout, 9, c, 1, 8, -1, 1, hopper=True) for c in (48, 64, 1792, 1824)
    }
    assert [c for c, name in names.items() if name == "cuda implicit gemm int8 wgmma"] == [64, 1792]
