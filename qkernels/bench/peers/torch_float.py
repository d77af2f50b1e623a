"""torch in float: what a quantized layer has to be faster than."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.bench.engines import (
    Call,
    CnnEngine,
    CodecEngine,
    ConvEngine,
    ConvTask,
    LinearEngine,
    ModelEngine,
    compile_alone,
)


def _linear(dtype: torch.dtype) -> Callable[[Tensor, int], Sequence[Call]]:
    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        n, k = weight.shape
        layers = []
        for _ in range(copies):
            layer = nn.Linear(k, n, bias=False, dtype=dtype)
            layer.weight.data.copy_(weight)
            layers.append(layer)
        return layers

    return build


def linear_engines() -> list[LinearEngine]:
    return [
        LinearEngine("torch fp32", "float", torch.float32, 32, "fp32", _linear(torch.float32)),
        LinearEngine("torch bf16", "float", torch.bfloat16, 16, "bf16", _linear(torch.bfloat16)),
    ]


def model_engines() -> list[ModelEngine]:
    return [
        ModelEngine("torch fp32", "float", lambda model: model),
        ModelEngine("torch bf16", "float", lambda model: model.to(torch.bfloat16)),
        ModelEngine("torch fp32 compiled", "float", compile_alone, compiled=True),
        ModelEngine(
            "torch bf16 compiled",
            "float",
            lambda model: compile_alone(model.to(torch.bfloat16)),
            compiled=True,
        ),
    ]


def conv_engines() -> list[ConvEngine]:
    def build(dtype: torch.dtype) -> Callable[[ConvTask], Any]:
        def prepare(task: ConvTask) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
            weight = task.weight.to(dtype, memory_format=torch.channels_last)
            x, bias, shape = task.x.to(dtype), task.bias.to(dtype), task.shape

            def call() -> Tensor:
                y = F.conv2d(x, weight, bias, shape.stride, shape.padding, groups=shape.groups)
                return y.relu_()

            return call, lambda result: result

        return prepare

    return [
        ConvEngine("torch fp32", "float", 32, "fp32", build(torch.float32)),
        ConvEngine("torch bf16", "float", 16, "bf16", build(torch.bfloat16)),
    ]


def cnn_engines() -> list[CnnEngine]:
    def converter(dtype: torch.dtype) -> Callable[[nn.Module, Sequence[Tensor]], Call]:
        def convert(model: nn.Module, batches: Sequence[Tensor]) -> Call:
            model = model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return lambda x: model(x.to(dtype)).float()

        return convert

    return [
        CnnEngine("torch fp32", "float", converter(torch.float32)),
        CnnEngine("torch bf16", "float", converter(torch.bfloat16)),
    ]


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes in torch: int8 with one symmetric scale for each row."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def _dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale


def _dequantized(result: tuple[Tensor, Tensor]) -> Tensor:
    return _dequantize_rows(*result)


def codec_engines() -> list[CodecEngine]:
    def quantizer(wrap: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
        def build(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
            function = wrap(_quantize_rows)
            return lambda: function(x), _dequantized

        return build

    def dequantizer(wrap: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
        def build(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
            function, (codes, scale) = wrap(_dequantize_rows), _quantize_rows(x)
            return lambda: function(codes, scale), lambda result: result

        return build

    def eager(function: Any) -> Any:
        return function

    return [
        CodecEngine("torch eager", "quantize int8", quantizer(eager)),
        CodecEngine("torch compiled", "quantize int8", quantizer(torch.compile)),
        CodecEngine("torch eager", "dequantize int8", dequantizer(eager)),
        CodecEngine("torch compiled", "dequantize int8", dequantizer(torch.compile)),
    ]


def backward_engines() -> list[LinearEngine]:
    """The gradient with respect to the input: `grad @ weight`."""

    def build(dtype: torch.dtype) -> Callable[[Tensor, int], Sequence[Call]]:
        def prepare(weight: Tensor, copies: int) -> Sequence[Call]:
            matrices = [weight.to(dtype, copy=True) for _ in range(copies)]
            return [lambda grad, m=m: F.linear(grad, m.T) for m in matrices]  # type: ignore[misc]

        return prepare

    return [
        LinearEngine("torch bf16", "float", torch.bfloat16, 16, "bf16", build(torch.bfloat16)),
        LinearEngine("torch fp32", "float", torch.float32, 32, "fp32", build(torch.float32)),
    ]
