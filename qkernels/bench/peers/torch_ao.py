"""torch.ao's dynamic int8 linear layers and static int8 convolutions.

Its engine `x86` takes FBGEMM's kernels or oneDNN's, by the layer; `onednn` always the latter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.bench.engines import Call, ConvEngine, ConvTask, LinearEngine, ModelEngine

_ENGINES = ("x86", "onednn")


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """The engine is chosen when a weight is packed; the packed weight then knows its own."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated, and says so each time
            yield
    finally:
        torch.backends.quantized.engine = before


def _quantized(model: nn.Module, engine: str) -> nn.Module:
    config = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    with _engine(engine):
        made: nn.Module = torch.ao.quantization.quantize_dynamic(model, config)
    return made


def _linear(engine: str) -> Callable[[Tensor, int], Sequence[Call]]:
    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        n, k = weight.shape
        layer = nn.Linear(k, n, bias=False)
        layer.weight.data = weight
        return [_quantized(nn.Sequential(layer), engine)[0] for _ in range(copies)]  # type: ignore[index]

    return build


def _conv_module(task: ConvTask) -> nn.Module:
    """The module that torch.ao has for a convolution with ReLU: a scale for each channel."""
    shape = task.shape
    layer = torch.ao.nn.intrinsic.quantized.ConvReLU2d(
        shape.channels,
        shape.out,
        shape.kernel,
        stride=shape.stride,
        padding=shape.padding,
        groups=shape.groups,
    )
    scales = task.weight.abs().amax((1, 2, 3)).double() / 127
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    weight = torch.quantize_per_channel(task.weight, scales, zeros, 0, torch.qint8)
    layer.set_weight_bias(weight, task.bias)
    layer.scale, layer.zero_point = task.y_scale, task.y_zero_point
    module: nn.Module = layer
    return module


def _conv(engine: str, from_float: bool) -> Callable[[ConvTask], Any]:
    def build(task: ConvTask) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        def quantized() -> Tensor:
            return torch.quantize_per_tensor(task.x, task.x_scale, task.x_zero_point, torch.quint8)

        with _engine(engine):
            layer = _conv_module(task)
        if from_float:
            return lambda: layer(quantized()).dequantize(), lambda result: result
        x = quantized()
        return lambda: layer(x), lambda result: result.dequantize()

    return build


def linear_engines() -> list[LinearEngine]:
    return [
        LinearEngine(f"torch.ao {e}", "8 bits", torch.float32, 8, "int8", _linear(e))
        for e in _there()
    ]


def conv_engines() -> list[ConvEngine]:
    return [
        ConvEngine(f"torch.ao {e}{' ' * bool(how)}{how}", kind, 8, "int8", _conv(e, bool(how)))
        for how, kind in (("", "8 bits"), ("from float", "8 bits from float"))
        for e in _there()
    ]


def model_engines() -> list[ModelEngine]:
    return [
        ModelEngine(f"torch.ao {e}", "8 bits", lambda model, e=e: _quantized(model, e))  # type: ignore[misc]
        for e in _there()
    ]


def _there() -> list[str]:
    return [e for e in _ENGINES if e in torch.backends.quantized.supported_engines]
