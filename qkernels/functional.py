"""The ops as functions of tensors, with names instead of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from qkernels import _C
from qkernels.formats import format_of
from qkernels.schemes import ACTIVATIONS

# The op with an autograd formula costs microseconds more on every call, so inference uses the one
# without. Looking them up costs half a microsecond, so that is done here.
_LINEAR = torch.ops.qkernels.linear.default
# What calling the op does is call this; the compiler has to see the op itself.
_LINEAR_CALL = _LINEAR._op
_is_traced = torch.compiler.is_dynamo_compiling
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


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor in storage layout: codes, and what they mean.

    Args:
        data: codes; int8 or int16 of the tensor's shape, or uint8 with two 4-bit codes in a byte,
            the even one in the low half.
        scale: one value for each group, row or tensor.
        zero_point: codes of zero in the shape of `scale`, or None if symmetric.
        format: "int8", "int4", "nf4" or "int16".
        group_size: elements of the last dimension that share a scale; -1 for a whole row, None
            for the whole tensor.
        shape: shape of the tensor that was quantized.

    Example:
        >>> q = quantize(torch.randn(4, 6), "int4", group_size=3)
        >>> q.dequantize(torch.float32).shape
        torch.Size([4, 6])
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    group_size: int | None
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zero_point_bytes = 0 if self.zero_point is None else self.zero_point.nbytes
        return self.data.nbytes + self.scale.nbytes + zero_point_bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float tensor that the codes stand for.

        Args:
            dtype: torch.float32, torch.bfloat16 or torch.float16.
        """
        return dequantize(
            self.data,
            self.scale,
            self.zero_point,
            format=self.format,
            group_size=self.group_size,
            features=self.shape[-1],
            dtype=dtype,
        )

    def to(self, device: torch.device | str) -> Quantized:
        """The same on another device.

        Args:
            device: where to.

        Example:
            >>> quantize(torch.ones(2, 8), "int8").to("meta").data.device
            device(type='meta')
        """
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        parts = self.data.to(device), self.scale.to(device), zero_point
        return Quantized(*parts, self.format, self.group_size, self.shape)

    def __repr__(self) -> str:
        groups = f"groups of {self.group_size}"
        per = {None: "per tensor", -1: "per row"}.get(self.group_size, groups)
        kind = "symmetric" if self.zero_point is None else "asymmetric"
        scale = str(self.scale.dtype).removeprefix("torch.")
        return (
            f"Quantized({self.format} {list(self.shape)}, {per}, {kind}, {scale} scales, "
            f"{self.nbytes} bytes, device={str(self.data.device)!r})"
        )


def quantize(
    x: Tensor,
    format: str,
    group_size: int | None = -1,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """Quantize a tensor with scales taken from its own values.

    Args:
        x: float32, bfloat16 or float16 of any shape, with one dimension at least.
        format: "int8", "int4", "nf4" or "int16".
        group_size: elements of the last dimension that share a scale (the last group may be
            short); -1 for a whole row, None for the whole tensor.
        symmetric: no zero points; nf4 knows nothing else.
        scale_dtype: stored type of the scales, float32 by default. Codes are computed with the
            scales as stored.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> quantize(torch.tensor([[1.0, -2.0, 4.0]]), "int8").data
        tensor([[ 32, -64, 127]], dtype=torch.int8)
    """
    data, scale, zero_point = torch.ops.qkernels.quantize(
        x, format_of(format).code, group_size, symmetric, scale_dtype
    )
    return Quantized(data, scale, None if symmetric else zero_point, format, group_size, x.shape)


def quantize_with(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int | None = -1,
) -> Quantized:
    """Quantize a tensor with scales that are given.

    Args:
        x: float32, bfloat16 or float16 of any shape, with one dimension at least.
        scale: one value for each group, row or tensor, as `quantize` returns it.
        zero_point: codes of zero in the shape of `scale`, or None for symmetric.
        format: "int8", "int4", "nf4" or "int16".
        group_size: as for `quantize`.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> quantize_with(torch.tensor([0.5, 9.0]), torch.tensor(0.5), None, "int8", None).data
        tensor([ 1, 18], dtype=torch.int8)
    """
    code = format_of(format).code
    data = torch.ops.qkernels.quantize_with(x, scale, zero_point, code, group_size)
    return Quantized(data, scale, zero_point, format, group_size, x.shape)


def dequantize(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    format: str,
    group_size: int | None = -1,
    features: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The float tensor that codes stand for.

    Args:
        data: codes in storage layout, see `Quantized`.
        scale: one value for each group, row or tensor.
        zero_point: codes of zero in the shape of `scale`, or None for symmetric.
        format: "int8", "int4", "nf4" or "int16".
        group_size: as for `quantize`.
        features: size of the result's last dimension; by default as many as `data` can hold,
            which for 4-bit codes is one too many when the size was odd.
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> codes = torch.tensor([2, -4], dtype=torch.int8)
        >>> dequantize(codes, torch.tensor(0.5), format="int8", group_size=None)
        tensor([ 1., -2.])
    """
    form = format_of(format)
    if features is None:
        features = data.shape[-1] * (2 if form.bits == 4 else 1)
    out: Tensor = torch.ops.qkernels.dequantize(
        data, scale, zero_point, form.code, group_size, features, dtype
    )
    return out


def fake_quantize(
    x: Tensor,
    format: str,
    group_size: int | None = -1,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor as it comes back from `quantize`, in one pass; its gradient goes straight through.

    The scales follow the data, so nothing lies outside of their range and the gradient of x is that
    of the result (straight-through estimator: Bengio et al., 2013).

    Args:
        x: float32, bfloat16 or float16 of any shape, with one dimension at least; float64 is
            computed with in float32.
        format: "int8", "int4", "nf4" or "int16".
        group_size: as for `quantize`.
        symmetric: no zero points; nf4 knows nothing else.
        scale_dtype: type that scales are rounded to, float32 by default.

    Returns:
        The values of the codes, in the shape and type of x. A group with NaN or Inf is NaN.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> x = torch.tensor([[0.26, -0.5, 1.27]], requires_grad=True)
        >>> fake_quantize(x, "int8").sum().backward()
        >>> x.grad
        tensor([[1., 1., 1.]])
    """
    code = format_of(format).code
    if x.dtype == torch.float64:
        return fake_quantize(x.float(), format, group_size, symmetric, scale_dtype).double()
    out: Tensor = torch.ops.qkernels.fake_quantize(x, code, group_size, symmetric, scale_dtype)
    return out


def fake_quantize_with(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int | None = -1,
) -> Tensor:
    """A tensor as it comes back from `quantize_with`, differentiable in scales and zero points too.

    Inside of the codes' range the gradient of x is that of the result, outside it is 0. Scales get
    the gradient of LSQ (Esser et al., "Learned Step Size Quantization", 2020), zero points that of
    LSQ+ (Bhalgat et al., 2020).

    Args:
        x: float32, bfloat16 or float16 of any shape, with one dimension at least; float64 is
            computed with in float32.
        scale: one value for each group, row or tensor, as `quantize` returns it.
        zero_point: in the shape of `scale`: codes of zero, or float32 numbers, which are rounded to
            codes and get a gradient; None for symmetric.
        format: "int8", "int4", "nf4" or "int16".
        group_size: as for `quantize`.

    Returns:
        The values of the codes, in the shape and type of x. NaN and Inf give NaN.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> x = torch.tensor([0.7, 90.0], requires_grad=True)
        >>> y = fake_quantize_with(x, torch.tensor(0.5), None, "int8", None)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([ 0.5000, 63.5000]), tensor([1., 0.]))
    """
    code = format_of(format).code
    if x.dtype == torch.float64:
        return fake_quantize_with(x.float(), scale, zero_point, format, group_size).double()
    out: Tensor = torch.ops.qkernels.fake_quantize_with(x, scale, zero_point, code, group_size)
    return out


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
    call = _LINEAR if _is_traced() else _LINEAR_CALL
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


def pack(weight: Quantized, layout: int) -> Tensor:
    """A weight in the byte order that the matrix product reads.

    Args:
        weight: a quantized matrix [out_features, in_features], per row or in groups.
        layout: the layout to pack into, `Scheme.layout`.

    Returns:
        uint8 [ceil(out_features / 16), bytes]; `unpack` gives the weight back exactly.

    Raises:
        ValueError: the weight is not a matrix with scales by row or group.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> weight = quantize(torch.randn(16, 8), "int8")
        >>> packed = pack(weight, qk.W8A8().layout)
        >>> torch.equal(unpack(packed, qk.W8A8().layout, 16, 8).data, weight.data)
        True
    """
    if len(weight.shape) != 2 or weight.group_size is None:
        raise ValueError(
            f"pack: the weight is {weight!r}; expected two dimensions and scales per row or group"
        )
    packed: Tensor = torch.ops.qkernels.pack(
        weight.data, weight.scale, weight.zero_point, layout, weight.shape[1], weight.group_size
    )
    return packed


def unpack(
    packed: Tensor, layout: int, out_features: int, in_features: int, group_size: int = -1
) -> Quantized:
    """The quantized matrix that a packed weight holds, to the bit what was packed.

    Args:
        packed: uint8 [ceil(out_features / 16), bytes], from `pack`.
        layout: the layout it was packed into.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        group_size: values of a row that share a scale; -1 for a whole row.

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        See `pack`.
    """
    data, scale, zero_point = torch.ops.qkernels.unpack(
        packed, layout, in_features, out_features, group_size
    )
    meaning = _C.describe_layout(layout)
    return Quantized(
        data,
        scale,
        None if meaning["symmetric"] else zero_point,
        meaning["format"],
        group_size,
        torch.Size((out_features, in_features)),
    )


def pack_conv(weight: Quantized, layout: int, *, taps: int, groups: int = 1) -> Tensor:
    """A convolution's weight in the byte order that `conv` reads.

    Args:
        weight: a quantized matrix [out_channels, taps * in_channels / groups], the channels of a
            tap side by side: `weight.permute(0, 2, 3, 1).flatten(1)` of a 2d convolution.
        layout: the layout to pack into, `Scheme.layout`.
        taps: elements of the kernel.
        groups: groups of channels.

    Returns:
        uint8 [blocks, bytes]; `unpack_conv` gives the weight back exactly.

    Raises:
        ValueError: the weight is not a matrix with scales by row or group.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> weight = quantize(torch.randn(16, 9 * 8), "int8")
        >>> packed = pack_conv(weight, qk.W8A8().layout, taps=9)
        >>> same = unpack_conv(packed, qk.W8A8().layout, 16, 9 * 8, taps=9)
        >>> torch.equal(same.data, weight.data)
        True
    """
    if len(weight.shape) != 2 or weight.group_size is None or taps < 1 or weight.shape[1] % taps:
        raise ValueError(
            f"pack_conv: the weight is {weight!r} with taps={taps}; expected two dimensions, the "
            "second a multiple of taps, and scales per row or group"
        )
    packed: Tensor = torch.ops.qkernels.pack_conv(
        weight.data,
        weight.scale,
        weight.zero_point,
        layout,
        taps,
        weight.shape[1] // taps,
        groups,
        weight.group_size,
    )
    return packed


def unpack_conv(
    packed: Tensor,
    layout: int,
    out_channels: int,
    columns: int,
    group_size: int = -1,
    *,
    taps: int,
    groups: int = 1,
) -> Quantized:
    """The quantized matrix that a packed convolution weight holds, to the bit what was packed.

    Args:
        packed: uint8 [blocks, bytes], from `pack_conv`.
        layout: the layout it was packed into.
        out_channels: rows of the matrix.
        columns: taps * in_channels / groups.
        group_size: values of a row that share a scale; -1 for a whole row.
        taps: elements of the kernel.
        groups: groups of channels.

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        See `pack_conv`.
    """
    data, scale, zero_point = torch.ops.qkernels.unpack_conv(
        packed, layout, taps, columns // taps, groups, out_channels, group_size
    )
    meaning = _C.describe_layout(layout)
    return Quantized(
        data,
        scale,
        None if meaning["symmetric"] else zero_point,
        meaning["format"],
        group_size,
        torch.Size((out_channels, columns)),
    )


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
