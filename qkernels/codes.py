"""Quantized tensors: codes and back, and the order of bytes that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import _C
from qkernels.formats import format_of
from qkernels.ops import refuse_forward_mode


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor in storage layout: codes, and what they mean.

    Args:
        data: codes; int8 or int16 of the tensor's shape, or uint8 with two 4-bit codes in a byte,
            the even one in the low half.
        scale: one value for each group, row or tensor.
        zero_point: codes of zero in the shape of `scale`, those of int4 in eighths of a code, 0 to
            120; None if symmetric.
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
        zero_point: in the shape of `scale`, as `quantize` returns it: codes of zero, those of int4
            in eighths of a code; None for symmetric.
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
        zero_point: in the shape of `scale`, as `quantize` returns it: codes of zero, those of int4
            in eighths of a code; None for symmetric.
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
    refuse_forward_mode("fake_quantize")
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
        zero_point: in the shape of `scale`: as `quantize` returns it, or float32 numbers of codes,
            which are rounded to what can be stored and get a gradient; None for symmetric.
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
    refuse_forward_mode("fake_quantize_with")
    if x.dtype == torch.float64:
        return fake_quantize_with(x.float(), scale, zero_point, format, group_size).double()
    out: Tensor = torch.ops.qkernels.fake_quantize_with(x, scale, zero_point, code, group_size)
    return out


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


def _of_layout(
    stored: tuple[Tensor, Tensor, Tensor], layout: int, group_size: int, shape: tuple[int, int]
) -> Quantized:
    """What an op unpacked."""
    data, scale, zero_point = stored
    meaning = _C.describe_layout(layout)
    zeros = None if meaning["symmetric"] else zero_point
    return Quantized(data, scale, zeros, meaning["format"], group_size, torch.Size(shape))


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
    stored = torch.ops.qkernels.unpack(packed, layout, in_features, out_features, group_size)
    return _of_layout(stored, layout, group_size, (out_features, in_features))


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
    stored = torch.ops.qkernels.unpack_conv(
        packed, layout, taps, columns // taps, groups, out_channels, group_size
    )
    return _of_layout(stored, layout, group_size, (out_channels, columns))
