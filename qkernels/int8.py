"""What stands between two convolutions, from int8 codes to int8 codes: nothing becomes float.

A code stands for `(code - zero_point) * scale`. Scales are float32 tensors of one element, zero
points int8 tensors of one element; a zero point left out is 0. Images are [batch, channels,
*spatial], contiguous or, faster, channels_last, and the result has the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.functional import EPILOGUES

# Looking an op up costs half a microsecond.
_MAX_POOL = torch.ops.qkernels.max_pool.default
_AVG_POOL = torch.ops.qkernels.avg_pool.default
_ADAPTIVE_AVG_POOL = torch.ops.qkernels.adaptive_avg_pool.default
_ADD = torch.ops.qkernels.add.default
_CONCAT = torch.ops.qkernels.concat.default
_LOOKUP = torch.ops.qkernels.lookup.default

Sizes = int | Sequence[int]


def _each(x: Tensor, sizes: Sizes) -> Sequence[int]:
    """An entry for each spatial dimension, as torch's own pooling takes a number or a list."""
    if isinstance(sizes, int):
        return [sizes] * (x.dim() - 2)
    return [*sizes] * (x.dim() - 2) if len(sizes) == 1 else sizes


def max_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest code of each window; scale and zero point stay those of x.

    Args:
        x: int8 codes [batch, channels, *spatial], one to three spatial dimensions.
        kernel_size: of the windows; a number, or one for each spatial dimension, as what follows.
        stride: from a window to the next; kernel_size unless given.
        padding: border around x, at most half of kernel_size. It is never the largest.
        dilation: from an element of a window to the next.
        ceil_mode: whether a last window may reach past the border, as long as it begins in x or in
            front of it.

    Returns:
        int8 [batch, channels, *spatial].

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        >>> x = torch.tensor([[[1, 5, -3, 2]]], dtype=torch.int8)
        >>> max_pool(x, kernel_size=2)
        tensor([[[5, 2]]], dtype=torch.int8)
    """
    kernel = _each(x, kernel_size)
    step = kernel if stride is None else _each(x, stride) or kernel
    y: Tensor = _MAX_POOL(x, kernel, step, _each(x, padding), _each(x, dilation), ceil_mode)
    return y


def avg_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The mean of each window: an exact sum of integers, multiplied once and rounded once.

    Args:
        x: int8 codes [batch, channels, *spatial], one to three spatial dimensions.
        kernel_size: of the windows; a number, or one for each spatial dimension, as what follows.
        stride: from a window to the next; kernel_size unless given.
        padding: zeros around x, at most half of kernel_size.
        ceil_mode: whether a last window may reach past the border, as long as it begins in x or in
            front of it.
        count_include_pad: whether borders count in the number that sums are divided by.
        divisor_override: divides the sums instead of the number of elements.
        x_scale: float32, one element.
        x_zero_point: int8, one element.
        y_scale: float32, one element: the result is int8 codes of this scale.
        y_zero_point: int8, one element, with `y_scale`.
        dtype: of a float result, where `y_scale` is None; float32 unless given.

    Returns:
        int8 or float [batch, channels, *spatial].

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        >>> x = torch.tensor([[[1, 5, -3, 2]]], dtype=torch.int8)
        >>> avg_pool(x, kernel_size=2, x_scale=torch.tensor(0.5))
        tensor([[[ 1.5000, -0.2500]]])
    """
    kernel = _each(x, kernel_size)
    step = kernel if stride is None else _each(x, stride) or kernel
    windows = (kernel, step, _each(x, padding), ceil_mode, count_include_pad, divisor_override)
    y: Tensor = _AVG_POOL(x, x_scale, x_zero_point, y_scale, y_zero_point, *windows, dtype)
    return y


def adaptive_avg_pool(
    x: Tensor,
    output_size: int | Sequence[int | None],
    *,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Means of so many windows that the result has a given size, as `avg_pool` makes them.

    Args:
        x: int8 codes [batch, channels, *spatial], one to three spatial dimensions.
        output_size: of the result; one number, or one for each spatial dimension, None for that of
            x. Window i spans from floor(i * in / out) to ceil((i + 1) * in / out).
        x_scale: float32, one element.
        x_zero_point: int8, one element.
        y_scale: float32, one element: the result is int8 codes of this scale.
        y_zero_point: int8, one element, with `y_scale`.
        dtype: of a float result, where `y_scale` is None; float32 unless given.

    Returns:
        int8 or float [batch, channels, *output_size].

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        >>> x = torch.tensor([[[1, 5, -3, 2]]], dtype=torch.int8)
        >>> one = torch.tensor(1.0)
        >>> adaptive_avg_pool(x, 1, x_scale=one, y_scale=one)  # 1.25, rounded
        tensor([[[1]]], dtype=torch.int8)
    """
    if isinstance(output_size, int):
        sizes = [output_size] * (x.dim() - 2)
    else:
        sizes = [x.shape[i + 2] if n is None else n for i, n in enumerate(output_size)]
    ranges = (x_scale, x_zero_point, y_scale, y_zero_point)
    y: Tensor = _ADAPTIVE_AVG_POOL(x, *ranges, sizes, dtype)
    return y


def add(
    a: Tensor,
    b: Tensor,
    *,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    epilogue: str = "none",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`epilogue(a + b)` of two tensors of codes, rounded once.

    Args:
        a: int8 codes of any shape.
        b: int8 codes of the same shape.
        a_scale: float32, one element.
        b_scale: float32, one element.
        a_zero_point: int8, one element.
        b_zero_point: int8, one element.
        y_scale: float32, one element: the result is int8 codes of this scale.
        y_zero_point: int8, one element, with `y_scale`.
        epilogue: "none", "relu", "gelu", "gelu_tanh", "silu", "relu6" or "hardswish".
        dtype: of a float result, where `y_scale` is None; float32 unless given.

    Returns:
        int8 or float of the shape of a, in a's order.

    Raises:
        ValueError: an unknown epilogue.
        RuntimeError: an argument that the op refuses.

    Example:
        >>> a, b = torch.tensor([10, -20], dtype=torch.int8), torch.tensor([4, 4], dtype=torch.int8)
        >>> half, one = torch.tensor(0.5), torch.tensor(1.0)
        >>> add(a, b, a_scale=half, b_scale=one, y_scale=one, epilogue="relu")
        tensor([9, 0], dtype=torch.int8)
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"add: epilogue must be one of {list(EPILOGUES)}, got {epilogue!r}")
    ranges = (a_scale, a_zero_point, b_scale, b_zero_point, y_scale, y_zero_point)
    y: Tensor = _ADD(a, b, *ranges, EPILOGUES[epilogue], dtype)
    return y


def concat(
    xs: Sequence[Tensor],
    *,
    scales: Tensor,
    zero_points: Tensor | None = None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    """Tensors of codes side by side, all brought to one scale and zero point.

    Bytes are copied where scale and zero point are those of the result already.

    Args:
        xs: int8 codes, of one shape but for dimension `dim`.
        scales: float32 [len(xs)].
        zero_points: int8 [len(xs)].
        y_scale: float32, one element.
        y_zero_point: int8, one element.
        dim: the dimension that grows.

    Returns:
        int8 codes, in the order of `xs[0]`.

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        >>> a, b = torch.tensor([10, -20], dtype=torch.int8), torch.tensor([4], dtype=torch.int8)
        >>> concat([a, b], scales=torch.tensor([1.0, 0.5]), y_scale=torch.tensor(1.0), dim=0)
        tensor([ 10, -20,   2], dtype=torch.int8)
    """
    y: Tensor = _CONCAT(list(xs), scales, zero_points, y_scale, y_zero_point, dim)
    return y


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """Any function of a code, as a table of its 256 results.

    Args:
        x: int8 codes of any shape.
        table: int8 [256]: what -128, -127, …, 127 become.

    Returns:
        int8 of the shape of x, in x's order.

    Raises:
        RuntimeError: an argument that the op refuses.

    Example:
        >>> table = torch.arange(-128, 128).clamp(min=0).to(torch.int8)
        >>> lookup(torch.tensor([3, -3], dtype=torch.int8), table)
        tensor([3, 0], dtype=torch.int8)
    """
    y: Tensor = _LOOKUP(x, table)
    return y
