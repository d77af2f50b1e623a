"""What torch must know of the ops for convolutions; that of the others is in `qkernels.ops`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import _C
from qkernels.ops import check_device, register_autocast, unpack


@torch.library.register_fake("qkernels::pack_conv")
def _pack_conv(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    layout: int,
    taps: int,
    group_channels: int,
    groups: int,
    group_size: int,
) -> Tensor:
    check_device("pack_conv", data, scale=scale, zero_point=zero_point)
    sizes = (taps, group_channels, groups, data.shape[0], group_size)
    return data.new_empty(_C.conv_packed_shape(layout, *sizes), dtype=torch.uint8)


@torch.library.register_fake("qkernels::unpack_conv")
def _unpack_conv(
    packed: Tensor,
    layout: int,
    taps: int,
    group_channels: int,
    groups: int,
    out_channels: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stored: tuple[Tensor, Tensor, Tensor]
    stored = unpack(packed, layout, taps * group_channels, out_channels, group_size)
    return stored


def _spatial_padding(padding: list[int], dims: int) -> tuple[list[int], list[int]]:
    """Padding in front and behind, which are given together or apart."""
    return padding[:dims], padding[-dims:]


def is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats or x.is_contiguous() or x.shape[1] < 2:
        return False
    return x.is_contiguous(memory_format=formats[x.dim()])


@torch.library.register_fake("qkernels::conv")
@torch.library.register_fake("qkernels::conv_differentiable")
def _conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    layout: int,
    out_channels: int,
    groups: int,
    group_size: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    activation: int,
    epilogue: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_device(
        "conv",
        x,
        packed=packed,
        bias=bias,
        residual=residual,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        y_scale=y_scale,
        y_zero_point=y_zero_point,
    )
    dims = x.dim() - 2
    out = []
    for i, (before, after) in enumerate(zip(*_spatial_padding(padding, dims), strict=True)):
        reach = dilation[i] * (kernel_size[i] - 1)
        size = x.shape[i + 2]
        if transposed:
            out.append((size - 1) * stride[i] - before - after + reach + 1)
        else:
            out.append((size + before + after - reach - 1) // stride[i] + 1)
    if y_scale is not None:
        dtype = torch.int8
    elif dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    order = torch.contiguous_format
    if is_channels_last(x):
        order = torch.channels_last if dims == 2 else torch.channels_last_3d
    shape = (x.shape[0], out_channels, *out)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=order)


@torch.library.register_fake("qkernels::conv_sequence")
def _conv_sequence(
    inputs: list[Tensor],
    constants: list[Tensor | None],
    layout: int,
    wiring: list[int],
    settings: list[int],
    outputs: list[int],
) -> list[Tensor]:
    values, numbers = list(inputs), iter(settings)

    def numbers_in_list() -> list[int]:
        return [next(numbers) for _ in range(next(numbers))]

    for step in range(len(wiring) // 2):
        x, residual = wiring[2 * step : 2 * step + 2]
        packed, bias, *codes = constants[8 * step : 8 * step + 8]
        rest = [
            *(next(numbers) for _ in range(3)),
            *(numbers_in_list() for _ in range(4)),
            *(next(numbers) for _ in range(3)),
        ]
        other = None if residual < 0 else values[residual]
        values.append(_conv(values[x], packed, bias, other, *codes, layout, *rest))
    return [values[i] for i in outputs]


def _save_for_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, residual = inputs[:4]
    y_scale, epilogue = inputs[8], inputs[20]
    if epilogue != 0 or residual is not None or y_scale is not None:
        raise RuntimeError(
            "qkernels::conv_differentiable: epilogue must be 0 (none), and residual and y_scale "
            "None; apply them to the result, so that torch differentiates them"
        )
    ctx.save_for_backward(packed)
    ctx.spatial = x.shape[2:]
    ctx.channels = x.shape[1]
    ctx.arguments = inputs[10:19]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _float_conv_weight(
    packed: Tensor, channels: int, arguments: tuple[Any, ...], dtype: torch.dtype
) -> Tensor:
    """The weight [out_channels, channels / groups, *kernel_size], taps as the op uses them."""
    layout, out_channels, groups, group_size, kernel_size = arguments[:5]
    taps = math.prod(kernel_size)
    columns = channels // groups
    data, scale, zero_point = torch.ops.qkernels.unpack_conv(
        packed, layout, taps, columns, groups, out_channels, group_size
    )
    meaning = _C.describe_layout(layout)
    row = next(row for row in _C.formats() if row["name"] == meaning["format"])
    matrix: Tensor = torch.ops.qkernels.dequantize(
        data,
        scale,
        None if meaning["symmetric"] else zero_point,
        row["code"],
        group_size,
        taps * columns,
        dtype,
    )
    return matrix.view(out_channels, *kernel_size, columns).movedim(-1, 1)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias through the weight as floats; quantizing x counts as the identity."""
    (packed,) = ctx.saved_tensors
    _layout, _outputs, groups, _group_size, kernel_size = ctx.arguments[:5]
    stride, padding, dilation, transposed = ctx.arguments[5:]
    dims = len(kernel_size)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _float_conv_weight(packed, ctx.channels, ctx.arguments, grad.dtype)
        before, _ = _spatial_padding(padding, dims)
        # Along each dimension x[i] met the tap t where the result was at (i + before - t *
        # dilation) / stride, or transposed at i * stride + t * dilation - before.
        amounts: list[int] = []  # F.pad takes the last dimension first; a negative amount cuts
        if transposed:
            weight = weight.flip(tuple(range(2, dims + 2)))
            for i in reversed(range(dims)):
                needed = (ctx.spatial[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1
                amounts += [before[i], needed - grad.shape[i + 2] - before[i]]
            outputs, columns = weight.shape[0] // groups, weight.shape[1]
            swapped = weight.unflatten(0, (groups, outputs)).transpose(1, 2)
            weight = swapped.reshape(groups * columns, outputs, *kernel_size)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            grad_x = convolve(
                F.pad(grad, amounts), weight, stride=stride, dilation=dilation, groups=groups
            )
        else:
            spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            whole = spread(grad, weight, stride=stride, dilation=dilation, groups=groups)
            for i in reversed(range(dims)):
                amounts += [-before[i], ctx.spatial[i] + before[i] - whole.shape[i + 2]]
            grad_x = F.pad(whole, amounts)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, *range(2, grad.dim()))).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *[None] * 19


torch.library.register_autograd(
    "qkernels::conv_differentiable", _conv_backward, setup_context=_save_for_conv_backward
)

for _name in ("conv", "conv_differentiable"):
    register_autocast(_name)
