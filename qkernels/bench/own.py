"""qkernels' own engines, with the same interface as the peers'."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import functional
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
from qkernels.formats import format_of
from qkernels.fuse import fuse_
from qkernels.lowering import lower
from qkernels.nn import QConv2d, QLinear
from qkernels.quantize import quantize_
from qkernels.schemes import NF4, W4A8, W4A16, W8A8, W8A16, Scheme

SCHEMES: dict[str, Scheme] = {
    "W8A8": W8A8(),
    "W4A8 g128": W4A8(),
    "W4A8 g32": W4A8(group_size=32),
    "W8A16": W8A16(),
    "W4A16 g128": W4A16(),
    "NF4 g64": NF4(),
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def stored_bits(scheme: Scheme) -> float:
    """Bits per weight with the scales and zero points of a long row.

    Example:
        >>> stored_bits(W4A8(group_size=32))
        4.75
    """
    bits = format_of(scheme.format).bits
    if scheme.group_size == -1:
        return bits
    scale = torch.finfo(scheme.scale_dtype).bits
    return bits + (scale + (0 if scheme.symmetric else 8)) / scheme.group_size


def _kind(scheme: Scheme) -> str:
    return f"{format_of(scheme.format).bits} bits"


def _layer(weight: Tensor, scheme: Scheme) -> QLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return QLinear.from_float(layer, scheme).eval()


def _linear(scheme: Scheme) -> Callable[[Tensor, int], Sequence[Call]]:
    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        layer = _layer(weight, scheme)
        return [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    return build


def linear_engines() -> list[LinearEngine]:
    """Every scheme; those with float activations for bfloat16 and for float32."""
    engines = []
    for name, scheme in SCHEMES.items():
        if scheme.activation == "float":
            variants = [(f"{name} {dtype}", dtype, dtype) for dtype in _DTYPES]
        else:
            arithmetic = "int8" if format_of(scheme.format).bits == 8 else "int4"
            variants = [(name, "fp32", arithmetic)]
        for variant, dtype, arithmetic in variants:
            engines.append(
                LinearEngine(
                    variant,
                    _kind(scheme),
                    _DTYPES[dtype],
                    stored_bits(scheme),
                    arithmetic,
                    _linear(scheme),
                    own=True,
                )
            )
    return engines


def backward_engines() -> list[LinearEngine]:
    """The gradient with respect to the input through a frozen quantized weight."""

    def prepare(scheme: Scheme) -> Callable[[Tensor, int], Sequence[Call]]:
        def build(weight: Tensor, copies: int) -> Sequence[Call]:
            n, k = weight.shape
            packed = _layer(weight, scheme).packed
            op = torch.ops.qkernels.linear_backward_input

            def one(copied: Tensor) -> Call:
                return lambda grad: op(grad, copied, scheme.layout, k, n, scheme.group_size)

            return [one(packed.detach().clone()) for _ in range(copies)]

        return build

    return [
        LinearEngine(
            name,
            _kind(scheme),
            torch.bfloat16,
            stored_bits(scheme),
            "bf16",
            prepare(scheme),
            own=True,
        )
        for name, scheme in SCHEMES.items()
        if scheme.activation == "float"  # the activation's type does not matter on the way back
    ]


def model_engines() -> list[ModelEngine]:
    """Whole models: every scheme; W8A8 also fused, and compiled by either backend."""

    def engine(
        name: str,
        scheme: Scheme,
        dtype: torch.dtype,
        *,
        fused: bool = False,
        attention: bool = False,
        backend: str | None = None,
    ) -> ModelEngine:
        def convert(model: nn.Module) -> Any:
            quantize_(model, scheme, ignore=(), progress=False)
            if fused:
                example = getattr(model, "dummy_inputs", None)  # of models of transformers
                fuse_(model, run=None if example is None else lambda model: model(**example))
            if attention:
                import qkernels.hf  # noqa: F401 - registers it

                model.set_attn_implementation("qkernels")  # type: ignore[operator]
            model = model.to(dtype)
            return model if backend is None else compile_alone(model, backend=backend)

        return ModelEngine(name, _kind(scheme), convert, own=True, compiled=backend is not None)

    engines = [
        engine(f"{name} {suffix}", scheme, dtype)
        for suffix, dtype in _DTYPES.items()
        for name, scheme in SCHEMES.items()
    ]
    w8a8 = SCHEMES["W8A8"]
    for suffix, dtype in _DTYPES.items():
        name = f"W8A8 {suffix}"
        engines.append(engine(f"{name} fused", w8a8, dtype, fused=True))
        own_attention = f"{name} fused with attention"
        engines.append(engine(own_attention, w8a8, dtype, fused=True, attention=True))
        engines.append(engine(f"{name} compiled", w8a8, dtype, backend="inductor"))
        engines.append(engine(f"{name} compiled by qkernels", w8a8, dtype, backend="qkernels"))
    return engines


def conv_engines() -> list[ConvEngine]:
    """Static W8A8 with codes in and out, and with float in and out."""

    def builder(from_float: bool) -> Callable[[ConvTask], Any]:
        return lambda task: _conv(task, from_float)

    return [
        ConvEngine("W8A8", "8 bits", 8, "int8", builder(False), own=True),
        ConvEngine("W8A8 from float", "8 bits from float", 8, "int8", builder(True), own=True),
    ]


def _conv(task: ConvTask, from_float: bool) -> tuple[Callable[[], Tensor], Callable[[Any], Tensor]]:
    shape = task.shape
    layer = nn.Conv2d(
        shape.channels,
        shape.out,
        shape.kernel,
        stride=shape.stride,
        padding=shape.padding,
        groups=shape.groups,
        device="meta",
    )
    layer.weight = nn.Parameter(task.weight, requires_grad=False)
    layer.bias = nn.Parameter(task.bias, requires_grad=False)
    # The codes 0 to 255 of the task are -128 to 127 here.
    x_scale = torch.tensor([task.x_scale])
    x_zero, y_zero = (
        torch.tensor([zero - 128], dtype=torch.int8)
        for zero in (task.x_zero_point, task.y_zero_point)
    )
    scheme = W8A8(static=True, activation="asymmetric")
    quantized = QConv2d.from_float(layer, scheme, x_scale=x_scale, x_zero_point=x_zero)
    y_scale = torch.tensor([task.y_scale])
    codes = (task.x / task.x_scale).round_().add_(x_zero).to(torch.int8)
    arguments: dict[str, Any] = {
        "layout": scheme.layout,
        "out_channels": shape.out,
        "kernel_size": [shape.kernel] * 2,
        "stride": [shape.stride] * 2,
        "padding": [shape.padding] * 2,
        "dilation": [1, 1],
        "groups": shape.groups,
        "activation": scheme.activation,
        "epilogue": "relu",
        "x_scale": x_scale,
        "x_zero_point": x_zero,
    }
    packed, bias = quantized.packed, quantized.bias
    if from_float:
        return lambda: functional.conv(task.x, packed, bias, **arguments), lambda result: result
    arguments |= {"y_scale": y_scale, "y_zero_point": y_zero}
    return (
        lambda: functional.conv(codes, packed, bias, **arguments),
        lambda result: (result.float() - y_zero) * y_scale,
    )


def cnn_engines() -> list[CnnEngine]:
    """Image classifiers lowered to W8A8, whose layers hand each other codes."""

    def convert(model: nn.Module, batches: Sequence[Tensor]) -> Call:
        return lower(model, batches[0], batches=batches, progress=False)

    return [CnnEngine("W8A8 lowered", "8 bits", convert, own=True)]


# What a codec is measured with: format, group size, symmetric.
_CODECS: dict[str, tuple[str, int, bool]] = {
    "int8": ("int8", -1, True),
    "int4": ("int4", 128, False),
    "nf4": ("nf4", 64, True),
}


def codec_engines() -> list[CodecEngine]:
    """quantize and dequantize into given tensors, and into new ones."""

    def quantizer(form: str, group: int, symmetric: bool, given: bool) -> Callable[[Tensor], Any]:
        def build(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
            code = format_of(form).code
            out = functional.quantize(x, form, group, symmetric)
            empty = torch.empty(0, dtype=out.data.dtype)
            zero = empty if out.zero_point is None else out.zero_point
            arguments = (x, code, group, symmetric)

            def into() -> object:
                op = torch.ops.qkernels.quantize.out
                return op(*arguments, data=out.data, scale=out.scale, zero_point=zero)

            def new() -> object:
                return functional.quantize(x, form, group, symmetric)

            if given:
                return into, lambda _: out.dequantize()
            return new, lambda result: result.dequantize()

        return build

    def dequantizer(form: str, group: int, symmetric: bool, given: bool) -> Callable[[Tensor], Any]:
        def build(x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
            q = functional.quantize(x, form, group, symmetric)
            out = torch.empty_like(x)

            def into() -> object:
                op = torch.ops.qkernels.dequantize.out
                return op(q.data, q.scale, q.zero_point, format_of(form).code, group, out=out)

            return (into, lambda _: out) if given else (q.dequantize, lambda result: result)

        return build

    engines = []
    for form, (name, group, symmetric) in _CODECS.items():
        for task, make in (("quantize", quantizer), ("dequantize", dequantizer)):
            for label, given in (("qkernels", False), ("qkernels out=", True)):
                build = make(name, group, symmetric, given)
                engines.append(CodecEngine(label, f"{task} {form}", build, own=True))
    return engines
