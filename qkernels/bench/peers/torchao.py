"""torchao: int8 layers, dynamic and weight-only, eager and compiled; its int4 for CPUs; PT2E."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from qkernels.bench.engines import (
    Call,
    CnnEngine,
    LinearEngine,
    ModelEngine,
    by_shape,
    compile_alone,
)

_GROUP = 128


def _int4_config() -> Any:
    """Its int4 layers for CPUs have moved between releases; this is where 0.18 has them."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=_GROUP)


def _linear(
    config: Callable[[], Any], dtype: torch.dtype, compiled: bool
) -> Callable[[Tensor, int], Sequence[Call]]:
    def quantized(weight: Tensor) -> Tensor:
        n, k = weight.shape
        layer = nn.Linear(k, n, bias=False, dtype=dtype)
        layer.weight.data.copy_(weight)
        model = nn.Sequential(layer)
        quantize_(model, config())
        return layer.weight

    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        product: Any = F.linear
        if compiled:
            # Anew for each layer, so that its sizes are constants. The copies of a weight are
            # arguments: a module for each would be compiled for each, until torch gives up.
            torch._dynamo.reset()
            product = torch.compile(_product)
        weights = [quantized(weight) for _ in range(copies)]
        return [lambda x, w=w: product(x, w) for w in weights]  # type: ignore[misc]

    return build


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def linear_engines() -> list[LinearEngine]:
    def engine(
        name: str, kind: str, bits: float, config: Callable[[], Any], dtype: torch.dtype, arith: str
    ) -> list[LinearEngine]:
        return [
            LinearEngine(
                f"torchao {name} {how}", kind, dtype, bits, arith, _linear(config, dtype, compiled)
            )
            for how, compiled in (("eager", False), ("compiled", True))
        ]

    w8a8, w8 = Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    engines = engine("W8A8", "8 bits", 8, w8a8, torch.bfloat16, "int8")
    engines += engine("W8A16", "8 bits", 8, w8, torch.bfloat16, "bf16")[1:]
    try:
        _int4_config()
    except ImportError:
        return engines
    bits = 4 + 32 / _GROUP
    return [
        *engines,
        *engine(f"int4 g{_GROUP}", "4 bits", bits, _int4_config, torch.bfloat16, "bf16")[:1],
    ]


def _pt2e(model: nn.Module, batches: Sequence[Tensor]) -> Call:
    """Export, calibrate and compile, as its tutorial for x86 and Inductor has it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def prepare(x: Tensor) -> Call:
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(model, (batches[0][: len(x)],)).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = prepare_pt2e(exported, quantizer)
            for batch in batches:
                for part in batch.split(len(x)):
                    prepared(part)
            compiled: Call = torch.compile(convert_pt2e(prepared))
        # Compiled in the mode that it is timed in; with frozen weights, or nothing is in int8.
        with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
            compiled(x)
        return compiled

    return by_shape(prepare)


def cnn_engines() -> list[CnnEngine]:
    return [CnnEngine("torchao PT2E compiled", "8 bits", _pt2e, compiled=True)]


def model_engines() -> list[ModelEngine]:
    def convert(model: nn.Module) -> Any:
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return compile_alone(model)

    return [ModelEngine("torchao W8A8 compiled", "8 bits", convert, compiled=True)]
