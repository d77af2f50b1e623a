"""Fused activation functions: near the exact ones, and the same function on every path."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import reference as ref
from helpers.check import same_bits, same_tensor, within
from helpers.data import FLOATS, INTEGER_KINDS, KINDS, awkward, floats, weight
from qkernels import _C

NONE, RELU, GELU, GELU_TANH, SILU, RELU6, HARDSWISH = range(7)
EXACT = {
    RELU: F.relu,
    GELU: F.gelu,
    GELU_TANH: lambda y: F.gelu(y, approximate="tanh"),
    SILU: F.silu,
    RELU6: F.relu6,
    HARDSWISH: F.hardswish,
}
# |error| <= this * |argument| before rounding to the result's type.
BOUND = {RELU: 0.0, GELU: 3e-7, GELU_TANH: 1.5e-7, SILU: 1.5e-7, RELU6: 0.0, HARDSWISH: 2e-7}
NAMES = ["relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish"]
EPILOGUES = pytest.mark.parametrize("epilogue", EXACT, ids=NAMES)


def identity(width: int):
    """A weight that hands its input, unchanged, to the epilogue."""
    ones = weight(KINDS[0], width, width, codes=np.eye(width, dtype=np.int64))
    scale = torch.ones(width, 1)
    packed = torch.ops.qkernels.pack(ones.data, scale, None, ones.layout, width, -1)

    def apply(x: Tensor, epilogue: int) -> Tensor:
        extra = (None, None, None, None, None)
        return torch.ops.qkernels.linear(
            x, packed, *extra, ones.layout, width, width, -1, 0, epilogue
        )

    return apply


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EPILOGUES
def test_accuracy(epilogue: int, dtype: torch.dtype) -> None:
    apply = identity(1)
    sweep = [torch.linspace(-end, end, 20_001) for end in (1e-3, 1, 6, 20, 100)]
    powers = 2.0 ** torch.linspace(-149, 127, 2000)
    x = torch.cat([*sweep, powers, -powers]).to(dtype)
    x = x[x.isfinite()]
    y = apply(x[:, None], epilogue)[:, 0]
    want = EXACT[epilogue](x.double()).numpy()
    within(y, want, BOUND[epilogue] * np.abs(x.double().numpy()) + 1e-36)


@EPILOGUES
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 33, 48, 49])
def test_every_lane_and_tail(epilogue: int, width: int) -> None:
    x = 3 * floats((9, width))
    whole, alone = identity(width)(x, epilogue), identity(1)(x.reshape(-1, 1), epilogue)
    same_tensor(whole.reshape(-1, 1), alone)


@EPILOGUES
def test_special_arguments(epilogue: int) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, -3e38])
    y = identity(1)(x[:, None], epilogue)[:, 0]
    assert (y[:2] == 0).all()
    largest = 6.0 if epilogue == RELU6 else torch.inf
    assert y[2] == largest
    assert not y[3] > 0
    assert y[4].isnan()
    assert (y[5:].isfinite()).all()
    assert y[6] == min(x[6], largest)
    if epilogue == RELU:
        assert y[3] == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EPILOGUES
def test_integer_paths(epilogue: int, dtype: torch.dtype) -> None:
    """The argument is known to the bit, so only the function itself may be off."""
    function = identity(1)
    for kind in INTEGER_KINDS:
        w = weight(kind, 49, 70, 32)
        x, bias = awkward((18, 70), dtype), floats((49,))
        for activation in (1, 2):
            y = w.linear(x, bias, activation=activation, epilogue=epilogue)
            argument = w.integer(x, bias, activation)
            want = EXACT[epilogue](torch.from_numpy(argument).double()).numpy()
            within(y, want, BOUND[epilogue] * np.abs(argument.astype(np.float64)) + 1e-36)
            # One function on every path: the same argument, the same bits.
            alone = function(torch.from_numpy(argument).reshape(-1, 1), epilogue)
            same_bits(y, alone.numpy().reshape(argument.shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EPILOGUES
def test_float_paths(epilogue: int, dtype: torch.dtype) -> None:
    """Equal to the function of the result without it, where that is not rounded before."""
    function = identity(1)
    # There vdpbf16ps adds in another order than the float32 product, rounds levels and flushes
    # subnormals; a single product of a row is the same for both.
    differs = _C.isa() == "avx512bf16" and dtype == torch.bfloat16
    for kind in KINDS:
        if differs and kind.form is ref.NF4:
            continue
        w = weight(kind, 49, 70, 32)
        for m in (1, 18):
            x, bias = awkward((m, 70), dtype), floats((49,))
            if differs:
                x = floats((m, 70), dtype) * torch.eye(m, 70).to(dtype)
            argument = w.linear(x.float(), bias)
            alone = function(argument.reshape(-1, 1), epilogue).reshape(m, 49)
            same_bits(w.linear(x, bias, epilogue=epilogue), ref.values(alone))
