"""`explain`: which kernel would run, and whether it is real integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import _C
from qkernels.nn import QEmbedding, QLinear
from qkernels.nn.conv import QConvNd
from qkernels.nn.int8 import Int8Conv
from qkernels.nn.module import QModule
from qkernels.summary import size_text


def explain(module: nn.Module, x: Any) -> str:
    """Say what a quantized module, or every quantized module of a model, does with an input.

    Nothing is guessed: the kernel's name, the instruction set and the layout of the weight are
    what the compiled library would use for an input of this shape. A single layer is not run; a
    model runs once, to see what reaches its layers.

    Args:
        module: a quantized layer, or a model that contains some.
        x: the input: for a `QLinear` float [..., in_features], for a convolution float [batch,
            channels, *spatial], for a `QEmbedding` indices of any shape, for a model a tensor, a
            tuple of arguments or a mapping of keyword arguments.

    Returns:
        A few sentences for a layer; for a model one line per quantized module.

    Raises:
        TypeError: the input of a layer is not a tensor, or `module` is not an `nn.Module`.
        ValueError: a layer's input is not one that the layer takes.

    Example:
        >>> layer = qk.nn.QLinear(64, 32, scheme=qk.W8A8())
        >>> "real integer arithmetic" in qk.explain(layer, torch.randn(4, 64))
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, QModule):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"explain: the input of a {type(module).__name__} must be a tensor, got "
                f"{type(x).__name__}"
            )
        return _explain_layer(module, x)
    return "\n".join(_explain_model(module, x))


def _explain_layer(module: QModule, x: Tensor) -> str:
    head = f"{_title(module)} on {_shape(x)} of {_dtype(x.dtype)}: "
    if isinstance(module, QEmbedding):
        return (
            f"{head}the rows of {x.numel()} indices are read from the packed table and dequantized "
            f"to {_dtype(module.dtype)}; no product is computed. {_storage(module)}"
        )
    if isinstance(module, QConvNd):
        return f"{head}{_explain_conv(module, x)}{_epilogue(module)} {_storage(module)}"
    if isinstance(module, Int8Conv):
        return f"{head}{_explain_lowered(module, x)} {_storage(module)}"
    if not isinstance(module, QLinear):
        return f"{head}explain knows no such module. {_storage(module)}"
    if x.dim() == 0 or x.shape[-1] != module.in_features:
        raise ValueError(
            f"explain: x has {x.shape[-1] if x.dim() else 0} features but the layer has "
            f"in_features={module.in_features}; pass x of shape (..., {module.in_features})"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"explain: x is {_dtype(x.dtype)} but a QLinear takes floating-point inputs; pass "
            f"x.float()"
        )
    rows = _rows(x)
    kernel, isa = module.kernel_for(rows, x.dtype), _isa(module)
    scheme = module.scheme
    weights = _C.describe_layout(module.layout)["format"]
    if scheme.activation == "float" and kernel.startswith("dequantize"):
        arithmetic = (
            f"float arithmetic, not integer. The {weights} weights are turned back to "
            f"{_dtype(x.dtype)}, and torch multiplies {_count(rows, 'row')} of x by them: {kernel} "
            f"({isa}), which is faster than a kernel of its own for so many."
        )
    elif scheme.activation == "float":
        arithmetic = (
            f"float arithmetic, not integer. x stays float; {kernel} ({isa}) turns the {weights} "
            f"weights back to float while it multiplies {_count(rows, 'row')}."
        )
    else:
        arithmetic = (
            f"real integer arithmetic. x is quantized to int8 ({scheme.activation}, "
            f"{_activation_scale(scheme.static)}) and {kernel} ({isa}) multiplies "
            f"{_count(rows, 'row')} of it by the {weights} weights, summed in int32; scales and "
            f"bias follow in float32."
        )
    return f"{head}{_transforms(module)}{arithmetic}{_epilogue(module)} {_storage(module)}"


def _explain_conv(module: QConvNd, x: Tensor) -> str:
    dims = len(module.kernel_size)
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != module.in_channels:
        raise ValueError(
            f"explain: x has shape {tuple(x.shape)} but the layer takes (batch, "
            f"{module.in_channels}, {_count(dims, 'spatial dimension')})"
        )
    scheme = module.scheme
    kernel = f"{module.kernel_for(x.dtype)} ({_isa(module)})"
    if scheme.activation == "float" and kernel.startswith("dequantize"):
        return (
            f"float arithmetic, not integer. The {scheme.format} weights are turned back to "
            f"{_dtype(x.dtype)}, and torch convolves x with them: {kernel}."
        )
    if scheme.activation == "float":
        return (
            f"float arithmetic, not integer. x stays float; {kernel} turns the {scheme.format} "
            f"weights back to float while it multiplies."
        )
    scale = "one scale for the tensor, measured beforehand" if scheme.static else "one per image"
    return (
        f"real integer arithmetic. x is quantized to int8 ({scheme.activation}, {scale}) and "
        f"{kernel} multiplies it by the {scheme.format} weights, summed in int32; scales and bias "
        "follow in float32."
    )


def _explain_lowered(module: Int8Conv, x: Tensor) -> str:
    takes = "takes int8 codes" if x.dtype == torch.int8 else "quantizes x to int8"
    gives = "rounds to int8 codes" if module.y_scale is not None else "gives floats"
    return (
        f"real integer arithmetic. {module.kernel} ({_isa(module)}) {takes}, sums products in "
        f"int32, "
        f"and {gives}."
    )


def _explain_model(model: nn.Module, x: Any) -> Iterator[str]:
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QModule)}
    if not quantized:
        yield (
            f"{type(model).__name__} has no quantized module: torch computes all of it; "
            f"quantize_(model, scheme) changes that."
        )
        return
    inputs = _record_inputs(model, quantized, x)
    where = ", ".join(sorted({_isa(module) for module in quantized.values()}))
    yield f"{type(model).__name__} with {_count(len(quantized), 'quantized module')} on {where}:"
    for name, module in quantized.items():
        if name not in inputs:
            yield f"{name}: {_title(module)} did not run on this input."
        elif isinstance(module, QLinear):
            kind = "float" if module.scheme.activation == "float" else "integer"
            seen = inputs[name]
            yield (
                f"{name}: {_title(module)}, {_count(_rows(seen), 'row')} of {_dtype(seen.dtype)}, "
                f"{kind} arithmetic by {module.kernel_for(_rows(seen), seen.dtype)}"
                f"{_with_epilogue(module)}, {_bits(module)}"
            )
        elif isinstance(module, QConvNd | Int8Conv):
            kind = "float" if module.scheme.activation == "float" else "integer"
            seen = inputs[name]
            kernel = (
                module.kernel if isinstance(module, Int8Conv) else module.kernel_for(seen.dtype)
            )
            yield (
                f"{name}: {_title(module)}, {_shape(seen)} of {_dtype(seen.dtype)}, {kind} "
                f"arithmetic by {kernel}{_with_epilogue(module)}, {_bits(module)}"
            )
        else:
            rows = _count(inputs[name].numel(), "row")
            yield f"{name}: {_title(module)}, {rows} dequantized, {_bits(module)}"


def _record_inputs(model: nn.Module, layers: dict[str, QModule], x: Any) -> dict[str, Tensor]:
    """An empty tensor of the shape and dtype that each layer got first, in one run of the model."""
    from qkernels.report.outputs import Caller, evaluating

    inputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    # Shape and dtype are all that is asked for, so no activation is kept.
                    inputs.setdefault(name, torch.empty_like(value, device="meta"))
                    return

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            Caller(model)(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _title(module: QModule) -> str:
    if isinstance(module, QLinear):
        return f"QLinear {module.in_features} → {module.out_features} {module.scheme}"
    if isinstance(module, QEmbedding):
        return f"QEmbedding {module.num_embeddings} × {module.embedding_dim} {module.scheme}"
    if isinstance(module, QConvNd):
        size = "×".join(map(str, module.kernel_size))
        channels = f"{module.in_channels} → {module.out_channels}"
        return f"{type(module).__name__} {channels}, {size} {module.scheme}"
    if isinstance(module, Int8Conv):
        s = module.settings
        size = "Linear" if s["linear"] else "×".join(map(str, s["kernel_size"]))
        return f"Int8Conv {s['in_channels']} → {s['out_channels']}, {size} {module.scheme}"
    return f"{type(module).__name__} {module.scheme}"


def _isa(module: QModule) -> str:
    """The instruction set of the CPU, or the GPU's architecture."""
    if not module.packed.is_cuda:
        return _C.isa()
    major, minor = torch.cuda.get_device_capability(module.packed.device)
    return f"sm_{major}{minor}"


def _transforms(module: QLinear) -> str:
    done = {
        "x_premul": "multiplied by x_premul, a factor for each feature",
        "k_perm": "put in the order of the weight's columns by k_perm",
    }
    said = [done[name] for name in module.input_transforms]
    return f"x is first {' and '.join(said)}. Then " if said else ""


def _with_epilogue(module: QModule) -> str:
    return "" if module.epilogue == "none" else f" with {module.epilogue}"


def _epilogue(module: QModule) -> str:
    if module.epilogue == "none":
        return ""
    return (
        f" The kernel also computes the activation function that was behind it, {module.epilogue}."
    )


def _activation_scale(static: bool) -> str:
    return "one scale for the tensor, measured beforehand" if static else "one scale for each row"


def _storage(module: QModule) -> str:
    layout = _C.describe_layout(module.layout)
    group = module.scheme.group_size
    per = "row" if group == -1 else f"group of {group}"
    zero = "" if layout["symmetric"] else " and a zero point"
    return (
        f"The weight is {size_text(module.packed.nbytes)} packed, {_bits(module)}: "
        f"{layout['format']} codes, a {layout['scale_dtype']} scale{zero} for each {per}."
    )


def _bits(module: QModule) -> str:
    """Bits per weight with everything that the packed layout holds: scales, sums, padding."""
    weights = module.shape[0] * module.shape[1]
    return f"{8 * module.packed.nbytes / max(weights, 1):.2f} bits per weight"


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "a scalar"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
