"""GPTQ: rounding column by column, each error made up for by the columns to come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkernels import functional
from qkernels.formats import format_of
from qkernels.functional import Quantized
from qkernels.optimize import search_scales
from qkernels.schemes import Scheme

ACT_ORDERS = ("static", "permute", "none")
# Columns whose errors reach the columns behind them in one product.
_BLOCK = 128
_OPS = torch.ops.qkernels


@dataclass(frozen=True)
class Rounded:
    """A weight rounded by GPTQ.

    Args:
        weight: its columns in the order of `k_perm`.
        k_perm: int64 [in_features], the column of the float weight that each stands for; None if
            they are where they were.
    """

    weight: Quantized
    k_perm: Tensor | None


@torch.no_grad()
def gptq(
    weight: Tensor,
    second_moments: Tensor,
    scheme: Scheme,
    *,
    optimize: str = "mse",
    act_order: str = "static",
    damping: float = 0.01,
) -> Rounded:
    """Round a weight so that its products with inputs like the calibration data change least.

    Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers", 2022. Columns without any input are rounded to nearest.

    Args:
        weight: float [out_features, in_features].
        second_moments: float64 [in_features, in_features], mean of x xᵀ over the inputs x.
        scheme: says format, group size, symmetry and type of scales.
        optimize: how scales are chosen, see `qk.optimize.search_scales`; "mse" counts the error of
            a column by its mean square input.
        act_order: columns are rounded from the largest to the smallest mean square input with
            groups as they are and scales from the float weight ("static"), or with groups of
            columns that follow each other in that order, which needs `k_perm` ("permute"), or in
            their own order ("none"). The latter two choose scales when a group's turn comes.
        damping: what is added to the diagonal of second_moments, as a share of its mean.

    Returns:
        The weight, and the order of its columns.

    Raises:
        ValueError: second_moments cannot be inverted whatever the damping, as with NaN inside.

    Example:
        >>> weight, x = torch.randn(16, 64), torch.randn(500, 64) @ torch.randn(64, 64)
        >>> scheme = qk.W4A16(group_size=32)
        >>> rounded = gptq(weight, (x.T @ x).double() / 500, scheme).weight.dequantize()
        >>> nearest = qk.optimize.search_scales(weight, scheme, "minmax").dequantize()
        >>> ((rounded - weight) @ x.T).norm() < 0.8 * ((nearest - weight) @ x.T).norm()
        tensor(True)
    """
    columns = weight.shape[1]
    group = columns if scheme.group_size == -1 else min(scheme.group_size, columns)
    # One group for the whole row: no order of columns changes what is in it.
    permutes = act_order == "permute" and group < columns
    is_static = group == columns or act_order == "static"
    importance = second_moments.diagonal().clone()
    order = torch.arange(columns)
    if act_order != "none":
        order = importance.argsort(descending=True, stable=True)
    place = order if permutes else torch.arange(columns)  # what is stored where
    weight = weight.detach().float()
    grid = _Grid(weight[:, place], importance[place], scheme, optimize, group)
    if is_static:
        grid.choose(range(0, columns, group))
    # Position in storage of the column whose turn it is.
    stored_at = (torch.arange(columns) if permutes else order).tolist()

    # One column after the other, so columns are kept together.
    left = weight[:, order].T.contiguous()
    factor = inverse_factor(second_moments[order][:, order], damping).float()
    rounded = torch.empty_like(left)
    for begin, end in _blocks(columns, group, aligned=not is_static):
        errors = torch.empty(end - begin, left.shape[1])
        for i in range(begin, end):
            column = stored_at[i]
            if not is_static and column % group == 0:
                grid.follow(column, left[i : i + group])
            rounded[i] = grid.round(column, left[i])
            error = (left[i] - rounded[i]) / factor[i, i]
            left[i + 1 : end] -= factor[i, i + 1 : end, None] * error
            errors[i - begin] = error
        left[end:] -= factor[begin:end, end:].T @ errors
    out = torch.empty_like(weight)
    out[:, stored_at] = rounded.T
    return Rounded(grid.encode(out), order if permutes else None)


def inverse_factor(second_moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped matrix of second moments.

    Args:
        second_moments: float64 [n, n], symmetric and positive semidefinite. Rows of zeros, inputs
            that never were, are given the mean of the diagonal and touch no other.
        damping: added to the diagonal, as a share of its mean; raised tenfold until the matrix can
            be inverted.

    Raises:
        ValueError: it never can, because it holds NaN or infinities.
    """
    diagonal = second_moments.diagonal()
    mean = float(diagonal.mean()) if diagonal.numel() else 0.0
    mean = mean if mean > 0 else 1.0
    extra = torch.where(diagonal == 0, mean, 0.0)
    for attempt in range(8):
        share = max(damping, 1e-6) * 10**attempt if attempt else damping
        damped = second_moments + torch.diag(extra + share * mean)
        lower: Tensor
        upper: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(upper.diagonal().isfinite().all()):
                return upper
    raise ValueError(
        "gptq: the second moments of the input cannot be inverted, even when strongly damped; "
        "check the calibration data for NaN, Inf and values beyond 1e18"
    )


def _blocks(columns: int, group: int, aligned: bool) -> Iterator[tuple[int, int]]:
    """Begin and end of blocks of columns; if aligned, each group that begins in a block is in it,
    or begins it: its columns must have seen all earlier errors when its scale is chosen."""
    if not aligned:
        group = 1
    if group < _BLOCK:
        step = _BLOCK // group * group
        yield from ((i, min(i + step, columns)) for i in range(0, columns, step))
        return
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        yield from ((i, min(i + _BLOCK, stop)) for i in range(start, stop, _BLOCK))


class _Grid:
    """The scales and zero points of a weight, in stored order, and rounding to them."""

    def __init__(
        self, weight: Tensor, importance: Tensor, scheme: Scheme, optimize: str, group: int
    ) -> None:
        self._weight = weight
        self._importance = importance if optimize == "mse" else None
        self._scheme = scheme
        self._optimize = optimize
        self._group = group
        self._code = format_of(scheme.format).code
        first = search_scales(weight[:, :0], scheme, "minmax")
        groups = -(-weight.shape[1] // group) if group else 1
        self._scale = first.scale.new_ones(len(weight), groups)
        self._zero: Tensor | None = None
        if first.zero_point is not None:
            self._zero = first.zero_point.new_zeros(len(weight), groups)

    def choose(self, starts: range) -> None:
        """Scales of all groups from the float weight."""
        if len(starts):
            self._search(self._weight, self._importance, slice(None), self._scheme.group_size)

    def follow(self, start: int, columns: Tensor) -> None:
        """The scale of the group that starts at a column, from what its columns are now, [n, N]."""
        importance = self._importance
        if importance is not None:
            importance = importance[start : start + self._group]
        at = start // self._group
        self._search(columns.T.contiguous(), importance, slice(at, at + 1), -1)

    def _search(
        self, weight: Tensor, importance: Tensor | None, where: slice, group_size: int
    ) -> None:
        scheme = replace(self._scheme, group_size=group_size)
        if importance is not None and not bool((importance > 0).any()):
            importance = None
        found = search_scales(weight, scheme, self._optimize, importance=importance)
        self._scale[:, where] = found.scale
        if self._zero is not None and found.zero_point is not None:
            self._zero[:, where] = found.zero_point

    def round(self, column: int, values: Tensor) -> Tensor:
        """The nearest values [N] that a column can take."""
        at = column // self._group
        scale = self._scale[:, at : at + 1]
        zero = None if self._zero is None else self._zero[:, at : at + 1]
        codes = _OPS.quantize_with(values.unsqueeze(1), scale, zero, self._code, -1)
        out = _OPS.dequantize(codes, scale, zero, self._code, -1, 1, torch.float32)
        assert isinstance(out, Tensor)
        return out.squeeze(1)

    def encode(self, values: Tensor) -> Quantized:
        """The codes of values [N, K] that `round` gave, in stored order.

        A value that is a code times its scale is far from the middle between two, so nothing moves.
        """
        return functional.quantize_with(
            values, self._scale, self._zero, self._scheme.format, self._scheme.group_size
        )
