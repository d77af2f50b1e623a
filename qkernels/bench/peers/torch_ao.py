"""torch.ao's dynamic int8 layers, with the engines `x86` (FBGEMM and oneDNN) and `onednn`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qkernels.bench.engines import Call, LinearEngine, ModelEngine

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


def linear_engines() -> list[LinearEngine]:
    there = torch.backends.quantized.supported_engines
    return [
        LinearEngine(f"torch.ao {e}", "8 bits", torch.float32, 8, "int8", _linear(e))
        for e in _ENGINES
        if e in there
    ]


def model_engines() -> list[ModelEngine]:
    return [
        ModelEngine(f"torch.ao {e}", "8 bits", lambda model, e=e: _quantized(model, e))  # type: ignore[misc]
        for e in _ENGINES
        if e in torch.backends.quantized.supported_engines
    ]
