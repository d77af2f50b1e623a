"""`optimize="mse"`: a grid of shrunken ranges, then alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.optimize.groups import GroupFit

# Scales are tried as shares of those that reach the extremes of a group: clipping a few weights
# makes the step for all others finer.
_SHARES_4_BITS = tuple(1.06 - 0.04 * i for i in range(14))
_SHARES_8_BITS = tuple(1.0 - 0.02 * i for i in range(1, 16))
# Some groups fit best when they leave a code unused, so ranges may be wider than a group.
_ASYMMETRIC_SHARES = tuple(1.14 - 0.05 * i for i in range(11))
# Codes by which a range is moved besides: where it begins matters as much as how wide it is.
_SHIFT = 0.33
_REFINEMENTS = 4


def fit_mse(fit: GroupFit) -> None:
    """Search for the smallest squared error of every group.

    Args:
        fit: the groups; gets the scales and zero points that are found.
    """
    if fit.zero_point is None:
        _symmetric_grid(fit)
    else:
        _asymmetric_grid(fit)
    for _ in range(_REFINEMENTS):
        before = fit.error
        _refine(fit)
        if torch.equal(before.nan_to_num(), fit.error.nan_to_num()):
            return


def _symmetric_grid(fit: GroupFit) -> None:
    scale = fit.scale.float()
    is_int8 = fit.scheme.format == "int8"
    for share in _SHARES_8_BITS if is_int8 else _SHARES_4_BITS:
        fit.offer(scale * share, None)
        if not is_int8:  # whose codes reach as far down as up
            fit.offer(scale * -share, None)


def _asymmetric_grid(fit: GroupFit) -> None:
    """Ranges about the middle between a group's extremes, and from either of them.

    Each is followed by the best line for its codes, so that the grid may be coarse.
    """
    low = fit.values.amin(-1).clamp(max=0)
    high = fit.values.amax(-1).clamp(min=0)
    first, last = fit.form.lowest_code, fit.form.highest_code
    for share in _ASYMMETRIC_SHARES:
        scale = ((high - low) * share / (last - first)).to(fit.scale.dtype)
        middle = (first + last) / 2 - (high + low) / 2 / scale
        # To one extreme: the group is clipped, or leaves codes unused, at the other alone.
        room = (1 / share - 1) * (last - first) / 2
        for shift in (0, -_SHIFT, _SHIFT, *((-room, room) if abs(room) > _SHIFT else ())):
            zero_point = fit.form.to_zero_point(middle + shift)
            approximation = fit.approximation(scale, zero_point)
            line = _line(fit, approximation, scale, zero_point)
            fit.judge(approximation, scale, zero_point)
            fit.offer(*line)


def _refine(fit: GroupFit) -> None:
    """Offer the best scale, or the best line, for the codes that the groups have now.

    Zero points beside the one there is get the best scale for their codes as well.
    """
    scale, zero_point = fit.scale.float(), fit.zero_point
    approximation = fit.approximation(scale, zero_point)
    if zero_point is None:
        fit.offer(scale * _slope(fit, approximation), None)
        return
    fit.offer(*_line(fit, approximation, scale, zero_point))
    for step in (-1, 1):
        beside = fit.form.to_zero_point(fit.zero_codes + step / fit.form.zero_steps)
        approximation = fit.approximation(fit.scale, beside)
        fit.offer(fit.scale.float() * _slope(fit, approximation), beside)


def _line(
    fit: GroupFit, approximation: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale and the zero point that are best for the codes of others.

    With d the approximation, the values are nearest to the regression line a·d + b, which is the
    scale a·s and the zero point z - b / (a·s).
    """
    mean = fit.mean(approximation)
    covariance = fit.mean(fit.values * approximation) - fit.value_mean * mean
    slope = covariance / (fit.mean(approximation.square()) - mean.square())
    scale = scale * slope
    zero_codes = fit.form.zero_codes(zero_point) - (fit.value_mean - slope * mean) / scale
    return scale, fit.form.to_zero_point(zero_codes)


def _slope(fit: GroupFit, approximation: Tensor) -> Tensor:
    """What the scale is multiplied by to be best for its codes: Σ w·d / Σ d²."""
    return fit.mean(approximation * fit.values) / fit.mean(approximation.square())
