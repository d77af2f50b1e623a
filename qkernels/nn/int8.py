"""The modules of a lowered model: layers that take int8 codes and give int8 codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels import _C, functional
from qkernels.nn.module import QModule, on_hopper
from qkernels.schemes import Scheme

_CONV = torch.ops.qkernels.conv.default
_SCALE, _ZERO_POINT = "_scale", "_zero_point"


@dataclass(frozen=True)
class Codes:
    """What int8 codes stand for: `(code - zero_point) * scale`.

    Args:
        scale: float32, one element.
        zero_point: int8, one element, or None for a symmetric quantizer.
    """

    scale: Tensor
    zero_point: Tensor | None


def _add_codes(module: nn.Module, name: str, codes: Codes | None) -> None:
    """Register the buffers `NAME_scale` and `NAME_zero_point`, None where there is nothing."""
    module.register_buffer(name + _SCALE, None if codes is None else codes.scale)
    module.register_buffer(name + _ZERO_POINT, None if codes is None else codes.zero_point)


class Int8Module(nn.Module):
    """A layer of a lowered model that holds no weight, only what its codes stand for.

    Args:
        settings: what its op takes besides tensors, plain JSON values.
        codes: what its int8 inputs and outputs stand for, by the names in `names`.
    """

    names: ClassVar[tuple[str, ...]] = ("x", "y")
    # The ops that a device must have for modules of this kind.
    ops: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Mapping[str, Any], codes: Mapping[str, Codes]) -> None:
        super().__init__()
        self.settings = dict(settings)
        for name in self.names:
            _add_codes(self, name, codes.get(name))

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items())


class Quantize(Int8Module):
    """A float tensor to int8 codes."""

    ops = ("quantize_with",)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_inside(
            x,
            lambda t: torch.ops.qkernels.quantize_with(t, self.y_scale, self.y_zero_point, 0, None),
        )


class Dequantize(Int8Module):
    """int8 codes to a float tensor."""

    ops = ("dequantize",)

    def forward(self, x: Tensor) -> Tensor:
        dtype = getattr(torch, self.settings["dtype"])
        return _channels_inside(
            x,
            lambda t: torch.ops.qkernels.dequantize(
                t, self.x_scale, self.x_zero_point, 0, None, t.shape[-1], dtype
            ),
        )


def _channels_inside(x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an elementwise op whose result is contiguous, and keep images channels_last."""
    if x.dim() not in (4, 5):
        return op(x)
    return op(x.movedim(1, -1).contiguous()).movedim(-1, 1)


class Int8Conv(QModule):
    """A convolution or Linear on int8 codes, with what follows it fused in.

    It computes `epilogue(conv(x) + bias + residual)` from exact integer sums and rounds once. x and
    the residual may be codes or float, and the result is codes if `codes` has "y".

    Args:
        settings: geometry as `qk.functional.conv` takes it: in_channels, out_channels,
            kernel_size, stride, padding, dilation, groups, transposed; and epilogue, bias (whether
            there is one), dtype (of a float result) and linear: whether it replaces a Linear,
            whose features come last.
        codes: what "x", "residual" and "y" stand for.
        scheme: static W8A8.
        device: of the weight, "meta" for a module that is filled later.
    """

    names: ClassVar[tuple[str, ...]] = ("x", "residual", "y")
    ops = ("pack_conv", "unpack_conv", "conv", "conv_sequence")
    bias: nn.Parameter | None

    def __init__(
        self,
        settings: Mapping[str, Any],
        codes: Mapping[str, Codes],
        scheme: Scheme,
        device: torch.device | str | None = None,
    ) -> None:
        s = self.settings = dict(settings)
        taps = math.prod(s["kernel_size"])
        columns = taps * s["in_channels"] // s["groups"]
        dtype = getattr(torch, s["dtype"])
        super().__init__(s["out_channels"], columns, scheme, device, dtype, (taps, s["groups"]))
        self.settings = s
        bias = torch.empty(s["out_channels"], device=device) if s["bias"] else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name in self.names:
            _add_codes(self, name, codes.get(name))
        self._rest = (
            s["out_channels"],
            s["groups"],
            -1,
            s["kernel_size"],
            s["stride"],
            s["padding"],
            s["dilation"],
            s["transposed"],
            scheme.activation_code,
            functional.EPILOGUES[s["epilogue"]],
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.settings["linear"]:
            return self._convolve(x, residual)
        # Rows of features are the pixels of one image, channels innermost: views, no copies.
        lead = x.shape[:-1]
        if residual is not None:
            residual = residual.reshape(1, -1, 1, residual.shape[-1]).permute(0, 3, 1, 2)
        y = self._convolve(x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2), residual)
        return y.permute(0, 2, 3, 1).reshape(*lead, y.shape[1])

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        packed, bias, *codes = self.op_tensors
        dtype = None if codes[-2] is not None else self.dtype
        try:
            y: Tensor = _CONV(x, packed, bias, residual, *codes, self.layout, *self._rest, dtype)
        except RuntimeError as error:
            raise self._named(error) from None
        return y

    @property
    def op_tensors(self) -> tuple[Tensor | None, ...]:
        """What the op takes of the layer's tensors, in its order: weight, bias, codes."""
        b, p = self._buffers, self._parameters  # attributes would cost a microsecond each
        return (
            p["packed"],
            p.get("bias"),
            b["x_scale"],
            b["x_zero_point"],
            b["residual_scale"],
            b["residual_zero_point"],
            b["y_scale"],
            b["y_zero_point"],
        )

    @property
    def op_settings(self) -> list[int]:
        """What the op takes besides, from out_channels to epilogue; lists behind their length."""
        numbers: list[int] = []
        for value in self._rest:
            numbers += [len(value), *value] if isinstance(value, list | tuple) else [int(value)]
        return numbers

    @property
    def joins(self) -> bool:
        """Whether `conv_sequence` can run the layer among others."""
        return not self.settings["linear"] and self.y_scale is not None

    @property
    def has_hooks(self) -> bool:
        """Whether a call of the layer runs hooks."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    @property
    def kernel(self) -> str:
        """The kernel that runs, or why none can."""
        s = self.settings
        taps = math.prod(s["kernel_size"])
        sizes = (taps, s["in_channels"] // s["groups"], s["groups"], s["out_channels"])
        try:
            code = self.scheme.activation_code
            return _C.conv_kernel_name(self.layout, *sizes, -1, code, hopper=on_hopper(self.packed))
        except RuntimeError as error:
            return f"none ({error})"

    def extra_repr(self) -> str:
        s = self.settings
        shown = [f"{s['in_channels']}, {s['out_channels']}"]
        if not s["linear"]:
            shown.append(f"kernel_size={tuple(s['kernel_size'])}")
            shown.append(f"stride={tuple(s['stride'])}")
        if s["groups"] != 1:
            shown.append(f"groups={s['groups']}")
        if s["epilogue"] != "none":
            shown.append(f"epilogue={s['epilogue']}")
        shown.append(f"gives={'codes' if self.y_scale is not None else s['dtype']}")
        return f"{', '.join(shown)}, scheme={self.scheme}, kernel={self.kernel}"


class Int8MaxPool(Int8Module):
    """Max pooling of codes; the result has the same scale."""

    ops = ("max_pool",)
    names = ()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.qkernels.max_pool(x, **self.settings)
        return y


class Int8AvgPool(Int8Module):
    """Average pooling of codes, to codes or float."""

    ops = ("avg_pool",)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.qkernels.avg_pool(x, **self._buffers, **_op_settings(self))
        return y


class Int8AdaptiveAvgPool(Int8Module):
    """Adaptive average pooling of codes, to codes or float."""

    ops = ("adaptive_avg_pool",)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.qkernels.adaptive_avg_pool(x, **self._buffers, **_op_settings(self))
        return y


class Int8Add(Int8Module):
    """`epilogue(a + b)` of two tensors of codes, to codes or float."""

    ops = ("add",)
    names = ("a", "b", "y")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        settings = _op_settings(self)
        settings["epilogue"] = functional.EPILOGUES[settings["epilogue"]]
        y: Tensor = torch.ops.qkernels.add(a, b, **self._buffers, **settings)
        return y


class Int8Concat(Int8Module):
    """Concatenation of codes, each brought to the result's scale; x has a scale for each."""

    ops = ("concat",)

    def forward(self, *xs: Tensor) -> Tensor:
        b = self._buffers
        y: Tensor = torch.ops.qkernels.concat(
            list(xs),
            b["x_scale"],
            b["x_zero_point"],
            b["y_scale"],
            b["y_zero_point"],
            self.settings["dim"],
        )
        return y


class Int8Lookup(Int8Module):
    """Any function of one number, as a table of 256 codes; `settings["function"]` says which."""

    ops = ("lookup",)
    names = ()

    def __init__(self, settings: Mapping[str, Any], codes: Mapping[str, Codes]) -> None:
        super().__init__(settings, codes)
        self.register_buffer("table", torch.zeros(256, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.qkernels.lookup(x, self.table)
        return y


def _op_settings(module: Int8Module) -> dict[str, Any]:
    """The settings with the dtype of a float result as torch knows it."""
    settings = dict(module.settings)
    dtype = settings.pop("dtype")
    settings["dtype"] = None if module._buffers["y_scale"] is not None else getattr(torch, dtype)
    return settings


INT8_MODULES: dict[str, type[Int8Module]] = {
    kind.__name__: kind
    for kind in (
        Quantize,
        Dequantize,
        Int8MaxPool,
        Int8AvgPool,
        Int8AdaptiveAvgPool,
        Int8Add,
        Int8Concat,
        Int8Lookup,
    )
}
