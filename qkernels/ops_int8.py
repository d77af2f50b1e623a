"""Fakes of the ops on int8 codes between convolutions; the others are in `qkernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.ops import check_device
from qkernels.ops_conv import is_channels_last


def _empty_like_image(x: Tensor, spatial: list[int], dtype: torch.dtype) -> Tensor:
    """An image with other spatial dimensions in the order of x."""
    order = torch.contiguous_format
    if is_channels_last(x):
        order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    shape = [*x.shape[:2], *spatial]
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=order)


def _empty_in_order(x: Tensor, dtype: torch.dtype) -> Tensor:
    if is_channels_last(x):
        return _empty_like_image(x, list(x.shape[2:]), dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _result_dtype(y_scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    return torch.int8 if y_scale is not None else dtype or torch.float32


def _pooled(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> list[int]:
    out = []
    for size, kernel, step, pad, gap in zip(
        x.shape[2:], kernel_size, stride, padding, dilation, strict=True
    ):
        room = size + 2 * pad - gap * (kernel - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1
        out.append(count)
    return out


@torch.library.register_fake("qkernels::max_pool")
def _max_pool(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    spatial = _pooled(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _empty_like_image(x, spatial, torch.int8)


@torch.library.register_fake("qkernels::avg_pool")
def _avg_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_device(
        "avg_pool",
        x,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        y_scale=y_scale,
        y_zero_point=y_zero_point,
    )
    spatial = _pooled(x, kernel_size, stride, padding, [1] * len(kernel_size), ceil_mode)
    return _empty_like_image(x, spatial, _result_dtype(y_scale, dtype))


@torch.library.register_fake("qkernels::adaptive_avg_pool")
def _adaptive_avg_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    output_size: list[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_device(
        "adaptive_avg_pool",
        x,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        y_scale=y_scale,
        y_zero_point=y_zero_point,
    )
    return _empty_like_image(x, output_size, _result_dtype(y_scale, dtype))


@torch.library.register_fake("qkernels::add")
def _add(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    epilogue: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_device(
        "add",
        a,
        b=b,
        a_scale=a_scale,
        a_zero_point=a_zero_point,
        b_scale=b_scale,
        b_zero_point=b_zero_point,
        y_scale=y_scale,
        y_zero_point=y_zero_point,
    )
    return _empty_in_order(a, _result_dtype(y_scale, dtype))


@torch.library.register_fake("qkernels::concat")
def _concat(
    xs: list[Tensor],
    scales: Tensor,
    zero_points: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None,
    dim: int,
) -> Tensor:
    first = xs[0]
    others = {f"xs[{i}]": x for i, x in enumerate(xs)}
    check_device(
        "concat",
        first,
        **others,
        scales=scales,
        zero_points=zero_points,
        y_scale=y_scale,
        y_zero_point=y_zero_point,
    )
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in xs)
    order = torch.contiguous_format
    if is_channels_last(first):
        order = torch.channels_last if first.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=torch.int8, device=first.device, memory_format=order)


@torch.library.register_fake("qkernels::lookup")
def _lookup(x: Tensor, table: Tensor) -> Tensor:
    check_device("lookup", x, table=table)
    return _empty_in_order(x, torch.int8)
