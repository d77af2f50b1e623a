"""bitsandbytes: NF4 layers on the CPU, and its NF4 codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from qkernels.bench.engines import Call, CodecEngine, LinearEngine, ModelEngine

_BLOCK = 64
_BITS = 4 + 32 / _BLOCK


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    n, k = weight.shape
    layer = bnb.nn.Linear4bit(
        k,
        n,
        bias=bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(
        weight.detach().clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        blocksize=_BLOCK,
    )
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    quantized: nn.Module = layer.to("cpu").eval()  # moving is what quantizes
    return quantized


def _linear(weight: Tensor, copies: int) -> Sequence[Call]:
    return [_layer(weight, None) for _ in range(copies)]


def _replace(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, _layer(child.weight, child.bias))
        else:
            _replace(child)
    return model


def linear_engines() -> list[LinearEngine]:
    return [LinearEngine("bitsandbytes nf4 bf16", "4 bits", torch.bfloat16, _BITS, "bf16", _linear)]


def model_engines() -> list[ModelEngine]:
    return [ModelEngine("bitsandbytes nf4", "4 bits", _replace)]


def codec_engines() -> list[CodecEngine]:
    def quantize(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        return (
            lambda: quantize_4bit(x, blocksize=_BLOCK, quant_type="nf4"),
            lambda result: dequantize_4bit(*result),
        )

    def dequantize(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        codes, state = quantize_4bit(x, blocksize=_BLOCK, quant_type="nf4")
        return lambda: dequantize_4bit(codes, state), lambda result: result

    return [
        CodecEngine("bitsandbytes", "quantize nf4", quantize),
        CodecEngine("bitsandbytes", "dequantize nf4", dequantize),
    ]
