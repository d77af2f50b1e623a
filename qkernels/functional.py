"""The ops as functions of tensors, with names instead of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from qkernels.codes import (
    Quantized,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    pack,
    pack_conv,
    quantize,
    quantize_with,
    unpack,
    unpack_conv,
)
from qkernels.ops import refuse_forward_mode
from qkernels.schemes import ACTIVATIONS
from qkernels.transformer import add_norm, attention

__all__ = [
    "EPILOGUES",
    "Quantized",
    "add_norm",
    "attention",
    "conv",
    "dequantize",
    "embedding",
    "fake_quantize",
    "fake_quantize_with",
    "int_mm",
    "linear",
    "pack",
    "pack_conv",
    "quantize",
    "quantize_with",
    "unpack",
    "unpack_conv",
]

# The op with an autograd formula costs microseconds more on every call, so inference uses the one
# without. Looking them up costs half a microsecond, so that is done here.
_LINEAR = torch.ops.qkernels.linear.default
# What calling the op does is call this; the compiler has to see the op itself.
_LINEAR_CALL = _LINEAR._op
is_traced = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_float64 = torch.float64
_CONV = torch.ops.qkernels.conv.default
_CONV_DIFFERENTIABLE = torch.ops.qkernels.conv_differentiable.default
_LINEAR_DIFFERENTIABLE = torch.ops.qkernels.linear_differentiable.default

# The numbers that the linear op takes.
EPILOGUES: dict[str, int] = {
    "none": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "relu6": 5,
    "hardswish": 6,
}

# What torch computes for them.
EPILOGUE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
_BY_CODE = tuple(EPILOGUE_FUNCTIONS[name] for name in EPILOGUES)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact int32 product of two int8 matrices.

    Args:
        a: int8 [M, K].
        b: int8 [K, N].

    Returns:
        int32 [M, N].

    Raises:
        RuntimeError: other types or shapes, or a K so long that a sum could overflow.

    Example:
        >>> int_mm(torch.ones(1, 3, dtype=torch.int8), torch.full((3, 1), 2, dtype=torch.int8))
        tensor([[6]], dtype=torch.int32)
    """
    out: Tensor = torch.ops.qkernels.int_mm(a, b)
    return out


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    layout: int,
    in_features: int,
    out_features: int,
    group_size: int = -1,
    activation: str = "float",
    epilogue: str = "none",
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_premul: Tensor | None = None,
    k_perm: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with a packed quantized weight, differentiable in x and bias.

    Args:
        x: float [..., in_features]; float64 is computed with in float32.
        packed: uint8 [ceil(out_features / 16), bytes], from `pack`.
        bias: float [out_features], or None.
        layout: the weight's layout, `Scheme.layout`.
        in_features: features of x.
        out_features: features of the result.
        group_size: weights of a row that share a scale; -1 for a whole row.
        activation: "float" leaves x as it is; "symmetric" and "asymmetric" quantize it to int8,
            and the product is computed in integers.
        epilogue: function of the result: "none", "relu", "gelu" (erf), "gelu_tanh", "silu",
            "relu6" or "hardswish". Fused, unless a gradient is needed: then torch computes it.
        x_scale: float32, one element: quantize x with this scale instead of one for each row.
        x_zero_point: one element, the zero point that belongs to x_scale.
        x_premul: float32 [in_features], x is multiplied by it first.
        k_perm: int64 [in_features], column i of the weight belongs to feature k_perm[i] of x.

    Returns:
        [..., out_features] in the type of x.

    Raises:
        ValueError: an unknown activation or epilogue.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> scheme = qk.W8A8()
        >>> packed = pack(quantize(torch.randn(32, 64), "int8"), scheme.layout)
        >>> x = torch.randn(2, 64)
        >>> linear(x, packed, layout=scheme.layout, in_features=64, out_features=32).shape
        torch.Size([2, 32])
    """
    try:
        activation_code, epilogue_code = ACTIVATIONS[activation], EPILOGUES[epilogue]
    except KeyError as error:
        raise ValueError(
            f"linear: {error} is not known; expected activation in {list(ACTIVATIONS)} and "
            f"epilogue in {list(EPILOGUES)}"
        ) from None
    return linear_by_codes(
        x,
        packed,
        bias,
        x_scale,
        x_zero_point,
        x_premul,
        k_perm,
        layout,
        in_features,
        out_features,
        group_size,
        activation_code,
        epilogue_code,
    )


def linear_by_codes(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_premul: Tensor | None,
    k_perm: Tensor | None,
    layout: int,
    in_features: int,
    out_features: int,
    group_size: int,
    activation: int,
    epilogue: int,
) -> Tensor:
    """`linear` with numbers instead of names: arguments by name cost a small layer 0.6 µs.

    Args:
        x: as for `linear`, as are all that follow, in the order of the op.
        activation: a value of `qkernels.schemes.ACTIVATIONS`.
        epilogue: a value of `EPILOGUES`.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("linear")
    wants_grad = _is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if wants_grad or x.dtype is _float64:
        wide = x.dtype is _float64
        op = _LINEAR_DIFFERENTIABLE if wants_grad else _LINEAR
        y: Tensor = op(
            x.float() if wide else x,
            packed,
            bias.float() if wide and bias is not None else bias,
            x_scale,
            x_zero_point,
            x_premul,
            k_perm,
            layout,
            in_features,
            out_features,
            group_size,
            activation,
            0 if wants_grad else epilogue,
        )
        if wants_grad:
            y = _BY_CODE[epilogue](y)
        return y.double() if wide else y
    call = _LINEAR if is_traced() else _LINEAR_CALL
    out: Tensor = call(
        x,
        packed,
        bias,
        x_scale,
        x_zero_point,
        x_premul,
        k_perm,
        layout,
        in_features,
        out_features,
        group_size,
        activation,
        epilogue,
    )
    return out


def embedding(
    indices: Tensor,
    packed: Tensor,
    *,
    layout: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a packed quantized table, dequantized.

    Args:
        indices: int64 or int32 of any shape, each in [0, num_embeddings).
        packed: uint8 [ceil(num_embeddings / 16), bytes], from `pack`; the same bytes may serve as
            the weight of `linear`.
        layout: the table's layout, `Scheme.layout`.
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        group_size: values of a row that share a scale; -1 for a whole row.
        dtype: of the result; torch.float64 is computed with in float32.

    Returns:
        [*indices.shape, embedding_dim] in `dtype`.

    Raises:
        RuntimeError: an argument that the op refuses, or an index out of range.

    Example:
        >>> layout = qk.W8A16().layout
        >>> packed = pack(quantize(torch.eye(3), "int8"), layout)
        >>> embedding(torch.tensor([2]), packed, layout=layout, num_embeddings=3, embedding_dim=3)
        tensor([[0., 0., 1.]])
    """
    known = torch.float32 if dtype == torch.float64 else dtype
    out: Tensor = torch.ops.qkernels.embedding(
        indices, packed, layout, num_embeddings, embedding_dim, group_size, known
    )
    return out.to(dtype)


def conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    layout: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    group_size: int = -1,
    activation: str = "float",
    epilogue: str = "none",
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution with a packed quantized weight over one to three spatial dimensions.

    With int8 activations the result is `epilogue(conv(x) + bias + residual)`, computed from exact
    integer sums and rounded once. x may then hold int8 codes already, and so may the residual and
    the result: a chain of convolutions never leaves int8.

    Args:
        x: float, or int8 codes with `x_scale`: [batch, channels, *spatial], contiguous or
            channels_last; the result has the same order.
        packed: uint8 [blocks, bytes], from `pack_conv`. For a transposed convolution its taps are
            mirrored.
        bias: float [out_channels], or None.
        layout: the weight's layout, `Scheme.layout`.
        out_channels: channels of the result.
        kernel_size: one entry for each spatial dimension, as the following are.
        stride: of the kernel; transposed: of x in the result.
        padding: zeros around x, or twice as many entries: those in front, then those behind;
            transposed: what is cut off the result.
        dilation: distance of the kernel's elements.
        groups: groups of channels.
        transposed: whether this is the gradient of a convolution, as in `nn.ConvTranspose2d`.
        group_size: weights of a row that share a scale; -1 for a whole row.
        activation: "float" leaves x as it is; "symmetric" and "asymmetric" quantize it to int8,
            with a scale for each image, and the product is computed in integers.
        epilogue: function of the result, as for `linear`.
        x_scale: float32, one element: the scale of x.
        x_zero_point: int8, one element: the zero point of x.
        residual: added before the epilogue: float, or int8 codes, of the result's shape.
        residual_scale: float32, one element, for int8 codes.
        residual_zero_point: int8, one element, for int8 codes.
        y_scale: float32, one element: the result is int8 codes of this scale.
        y_zero_point: int8, one element: the zero point of the result.
        dtype: of a float result; by default that of x, float32 if x holds codes.

    Returns:
        [batch, out_channels, *spatial].

    Raises:
        ValueError: an unknown activation or epilogue.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> scheme = qk.W8A8()
        >>> packed = pack_conv(quantize(torch.randn(16, 9 * 8), "int8"), scheme.layout, taps=9)
        >>> geometry = dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
        >>> x = torch.randn(1, 8, 32, 32)
        >>> conv(
        ...     x, packed, layout=scheme.layout, out_channels=16, activation="symmetric", **geometry
        ... ).shape
        torch.Size([1, 16, 16, 16])
    """
    try:
        activation_code, epilogue_code = ACTIVATIONS[activation], EPILOGUES[epilogue]
    except KeyError as error:
        raise ValueError(
            f"conv: {error} is not known; expected activation in {list(ACTIVATIONS)} and "
            f"epilogue in {list(EPILOGUES)}"
        ) from None
    refuse_forward_mode("conv")
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    op = _CONV_DIFFERENTIABLE if wants_grad else _CONV
    wide = x.dtype == torch.float64
    y: Tensor = op(
        x.float() if wide else x,
        packed,
        bias.float() if wide and bias is not None else bias,
        residual,
        x_scale,
        x_zero_point,
        residual_scale,
        residual_zero_point,
        y_scale,
        y_zero_point,
        layout,
        out_channels,
        groups,
        group_size,
        kernel_size,
        stride,
        padding,
        dilation,
        transposed,
        activation_code,
        0 if wants_grad else epilogue_code,
        dtype,
    )
    if wants_grad:
        y = EPILOGUE_FUNCTIONS[epilogue](y)
    return y.double() if wide else y


# Symbolic tracing takes these as they are instead of tracing into them: what they do depends on
# the type of x and on whether a gradient is needed.
torch.fx.wrap("linear")
torch.fx.wrap("linear_by_codes")
torch.fx.wrap("embedding")
torch.fx.wrap("conv")
