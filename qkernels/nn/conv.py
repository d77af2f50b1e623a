"""QConv1d … QConvTranspose2d: torch's convolutions on a packed quantized weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import _C, functional
from qkernels.formats import kernel_dtype_code
from qkernels.nn.carry import carry_over, why_not_quantizable, why_not_replaceable
from qkernels.nn.module import QModule, on_hopper
from qkernels.nn.ranges import add_range_buffers, set_range
from qkernels.nn.storage import quantize_weight
from qkernels.schemes import W8A8, Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

_DEFAULT_SCHEME = W8A8()
# What torch's constructors make of their arguments.
_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class QConvNd(QModule):
    """What the quantized convolutions share; use `QConv2d` and the others.

    The weight is stored as a matrix [out_channels, taps * in_channels / groups], channels of a tap
    side by side; a scale belongs to an output channel, or to a group along a row.
    """

    float_type: ClassVar[type[nn.modules.conv._ConvNd]]
    ops = ("pack_conv", "unpack_conv", "conv")

    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str

    def _set_up(self, like: nn.modules.conv._ConvNd, scheme: Scheme, device: Any) -> None:
        """Take geometry, bias and dtype from a torch module, and leave the weight unset."""
        taps = math.prod(like.kernel_size)
        columns = taps * like.in_channels // like.groups
        conv = (taps, like.groups)
        dtype = like.weight.dtype
        QModule.__init__(self, like.out_channels, columns, scheme, device, dtype, conv)
        reason = why_no_conv(columns, scheme)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        for name in _GEOMETRY:
            if name in like.__dict__:
                setattr(self, name, getattr(like, name))
        device = self.packed.device
        bias = None
        if like.bias is not None:
            bias = nn.Parameter(torch.empty(like.out_channels, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.epilogue = "none"
        add_range_buffers(self, scheme, device)
        dims = len(self.kernel_size)
        # Zeros that the op adds itself: in front, then behind.
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            self._op_padding = [t // 2 for t in total] + [t - t // 2 for t in total]
        elif self.padding == "valid" or self.padding_mode != "zeros":
            self._op_padding = [0] * dims
        else:
            assert not isinstance(self.padding, str)
            self._op_padding = list(self.padding)

    @classmethod
    @torch.inference_mode(False)  # what is made must be usable outside of it
    def from_float(
        cls,
        conv: nn.modules.conv._ConvNd,
        scheme: Scheme = _DEFAULT_SCHEME,
        *,
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
    ) -> Self:
        """A quantized convolution with the weight of a float one.

        It keeps the bias (the same parameter), the mode, the dtype and the hooks.

        Args:
            conv: the torch module of the same name, on the CPU or a GPU, where the new one will
                be too.
            scheme: how to quantize it.
            x_scale: for a static scheme, the scale of x.
            x_zero_point: for a static asymmetric scheme, the int8 code of zero.

        Raises:
            TypeError: another module, or a subclass with a forward of its own.
            ValueError: the layer cannot be replaced or quantized, or the scheme needs x_scale.

        Example:
            >>> qk.nn.QConv2d.from_float(nn.Conv2d(3, 8, 3), qk.W8A8()).out_channels
            8
        """
        if not isinstance(conv, cls.float_type) or type(conv).forward is not cls.float_type.forward:
            wanted = cls.float_type.__name__
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(conv).__name__}; expected an nn.{wanted}, "
                f"with the forward of nn.{wanted}"
            )
        columns = conv.weight[0].numel() if not conv.transposed else conv.weight[:, 0].numel()
        reason = (
            why_not_replaceable(conv)
            or why_not_quantizable(conv.weight)
            or why_no_conv(columns, scheme)
        )
        if reason is not None:
            raise ValueError(f"{cls.__name__}.from_float: the layer cannot be quantized: {reason}")
        new = cls.shell(conv, scheme)
        set_range(new, x_scale, x_zero_point)
        new.packed = new.packing.parameter(quantize_weight(cls.matrix_of(conv), scheme))
        return new

    @classmethod
    def shell(cls, conv: nn.modules.conv._ConvNd, scheme: Scheme) -> Self:
        """Everything of `from_float` but the weight: `packed` is on the meta device.

        Args:
            conv: the torch module of the same name, on any device.
            scheme: how its weight is going to be quantized.
        """
        new = cls.__new__(cls)
        new._set_up(conv, scheme, "meta")
        new.bias = conv.bias  # type: ignore[assignment]
        for name, buffer in new._buffers.items():
            if buffer is not None:
                new._buffers[name] = torch.empty_like(buffer, device=conv.weight.device)
        carry_over(conv, new)
        return new

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """A float module's weight as the matrix that is quantized.

        Args:
            module: of the kind that this class replaces.
        """
        assert isinstance(module, nn.modules.conv._ConvNd)
        return weight_matrix(module.weight, module.transposed, module.groups)

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does, and quantize the weight."""
        like = self._float_module(self.packed.device)
        self.set_weight(self.matrix_of(like))
        if self.bias is not None and like.bias is not None:
            with torch.no_grad():
                self.bias.copy_(like.bias)

    def dequantize(self) -> nn.modules.conv._ConvNd:
        """The float convolution that this one computes with: it keeps bias, mode, dtype and hooks.

        Raises:
            ValueError: an activation function is fused into this one, which no float layer has.

        Example:
            >>> qk.nn.QConv2d(8, 4, 3).dequantize()
            Conv2d(8, 4, kernel_size=(3, 3), stride=(1, 1))
        """
        self.check_not_fused("dequantize")
        new = self._float_module("meta")
        columns = self.in_channels // self.groups
        weight = self.float_weight().view(self.out_channels, *self.kernel_size, columns)
        weight = weight.movedim(-1, 1)
        if self.transposed:
            dims = tuple(range(2, weight.dim()))
            grouped = weight.flip(dims).unflatten(0, (self.groups, -1)).transpose(1, 2)
            weight = grouped.flatten(0, 1)
        new.weight = nn.Parameter(weight.contiguous())
        new.bias = self.bias
        carry_over(self, new, (*self.own_attributes, "_op_padding"))
        return new

    def _float_module(self, device: torch.device | str) -> nn.modules.conv._ConvNd:
        options: dict[str, Any] = {"output_padding": self.output_padding} if self.transposed else {}
        make: Any = self.float_type
        made: nn.modules.conv._ConvNd = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=device,
            dtype=self.dtype,
            **options,
        )
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return self._convolve(x, self._op_padding)

    def _convolve(self, x: Tensor, padding: list[int]) -> Tensor:
        scheme = self.scheme
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            raise RuntimeError(
                f"{self._label()}: x has shape {tuple(x.shape)}; expected (batch, "
                f"{self.in_channels}, {dims} spatial dimensions), or the same without a batch"
            )
        try:
            y = functional.conv(
                x.unsqueeze(0) if x.dim() == dims + 1 else x,
                self.packed,
                self.bias,
                layout=self.layout,
                out_channels=self.out_channels,
                kernel_size=self.kernel_size,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
                transposed=self.transposed,
                group_size=scheme.group_size,
                activation=scheme.activation,
                epilogue=self.epilogue,
                x_scale=self.x_scale if scheme.static else None,
                x_zero_point=self.x_zero_point if scheme.static else None,
            )
        except RuntimeError as error:
            raise self._named(error) from None
        return y.squeeze(0) if x.dim() == dims + 1 else y

    def _keeps_dtype(self, tensor: Tensor) -> bool:
        return super()._keeps_dtype(tensor) or tensor is self.x_scale

    @property
    def kernel(self) -> str:
        """The kernel that inputs of the layer's dtype run, or why none can."""
        if self.packed.device.type not in ("cpu", "cuda"):
            return f"none on {self.packed.device.type}"
        try:
            return self.kernel_for(self.dtype)
        except RuntimeError as error:
            return f"none ({error})"

    def kernel_for(self, dtype: torch.dtype) -> str:
        """The kernel that inputs of a dtype run.

        Args:
            dtype: of the input.

        Raises:
            RuntimeError: QKERNELS_ISA names an instruction set that the machine lacks.

        Example:
            >>> qk.nn.QConv2d(8, 16, 3).kernel_for(torch.float32).startswith("conv_w8a8_")
            True
        """
        taps, groups = math.prod(self.kernel_size), self.groups
        return _C.conv_kernel_name(
            self.layout,
            taps,
            self.in_channels // groups,
            groups,
            self.out_channels,
            self.scheme.group_size,
            self.scheme.activation_code,
            kernel_dtype_code(dtype),
            on_hopper(self.packed),
        )

    def extra_repr(self) -> str:
        this: Any = self  # it has all that torch's own method reads
        shown = self.float_type.extra_repr(this)
        return f"{shown}, scheme={self.scheme}, kernel={self.kernel}{self.epilogue_text}"


class _QConv(QConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        scheme: Scheme = _DEFAULT_SCHEME,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        make: Any = self.float_type
        like = make(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
            dtype=dtype,
        )
        self._set_up(like, scheme, device)
        self.reset_parameters()


class QConv1d(_QConv):
    """`nn.Conv1d` with a quantized weight; see `QConv2d`.

    Example:
        >>> qk.nn.QConv1d(8, 16, 5, padding=2)(torch.randn(2, 8, 100)).shape
        torch.Size([2, 16, 100])
    """

    float_type = nn.Conv1d


class QConv2d(_QConv):
    """`nn.Conv2d` with a quantized weight: its arguments, and a scheme.

    The weight is frozen; the bias is an ordinary parameter, and gradients flow to it and to x. With
    W8A8 the products are integers, and x has a scale for each image (or a measured one, if the
    scheme is static). The other schemes keep x as it is.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        kernel_size: as for `nn.Conv2d`, as are stride, padding, dilation, groups, bias and
            padding_mode.
        scheme: how the weight is stored and what the arithmetic is.
        device: "cpu", "cuda", or "meta" for a module that is filled by loading.
        dtype: of the bias, and of the float layer that `dequantize` gives.

    Raises:
        TypeError: scheme is not a Scheme, or dtype is not floating.
        ValueError: an argument that torch refuses, or a scheme without a convolution.

    Example:
        >>> conv = qk.nn.QConv2d(3, 16, 3, stride=2, padding=1, scheme=qk.W8A8())
        >>> conv(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 16, 16, 16])
    """

    float_type = nn.Conv2d


class QConv3d(_QConv):
    """`nn.Conv3d` with a quantized weight; see `QConv2d`.

    Example:
        >>> qk.nn.QConv3d(2, 4, 3, padding=1)(torch.randn(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    float_type = nn.Conv3d


class _QConvTranspose(QConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        scheme: Scheme = _DEFAULT_SCHEME,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        make: Any = self.float_type
        like = make(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device="meta",
            dtype=dtype,
        )
        self._set_up(like, scheme, device)
        self.reset_parameters()

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = list(self._op_padding)
        # torch's own rule, which reads nothing of the module but this.
        this: Any = self
        extra = nn.ConvTranspose2d._output_padding(
            this,
            x,
            output_size,
            list(self.stride),
            padding,
            list(self.kernel_size),
            len(self.kernel_size),
            list(self.dilation),
        )
        behind = [p - e for p, e in zip(padding, extra, strict=True)]
        return self._convolve(x, [*padding, *behind])


class QConvTranspose1d(_QConvTranspose):
    """`nn.ConvTranspose1d` with a quantized weight; see `QConv2d`.

    Example:
        >>> qk.nn.QConvTranspose1d(8, 4, 4, stride=2, padding=1)(torch.randn(1, 8, 10)).shape
        torch.Size([1, 4, 20])
    """

    float_type = nn.ConvTranspose1d


class QConvTranspose2d(_QConvTranspose):
    """`nn.ConvTranspose2d` with a quantized weight; see `QConv2d`.

    Example:
        >>> qk.nn.QConvTranspose2d(8, 4, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 4, 10, 10])
    """

    float_type = nn.ConvTranspose2d


def weight_matrix(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A convolution's weight as the matrix that is quantized.

    Args:
        weight: [out, in / groups, *kernel], or transposed [in, out / groups, *kernel].
        transposed: whether it is that of a transposed convolution.
        groups: of channels.
    """
    if transposed:
        # [in, out / groups, *kernel] to [out, in / groups, *kernel], seen from the result.
        dims = tuple(range(2, weight.dim()))
        grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        weight = grouped.flatten(0, 1).flip(dims)
    return weight.movedim(1, -1).flatten(1)


def why_no_conv(columns: int, scheme: Scheme) -> str | None:
    """Why a convolution has no kernel for a scheme, or None.

    Args:
        columns: weights of an output channel.
        scheme: that is asked for.
    """
    if scheme.activation == "float":
        return None
    if scheme.format != "int8" or scheme.group_size != -1:
        return (
            f"a convolution with int8 activations needs int8 weights with one scale for each "
            f"output channel, not {scheme}; use W8A8(), or W4A16(...) to store 4 bits"
        )
    limit = _C.LONGEST_CONV_SUM
    if columns > limit:
        return (
            f"{scheme} sums {columns} integer products in int32, which could overflow (the limit "
            f"is {limit}); use a scheme with float activations"
        )
    return None
