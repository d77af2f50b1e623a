"""`optimize="mse"`: a grid of shrunken ranges, then alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.optimize.groups import GroupFit

# Scales are tried as shares of those that reach the extremes of a group: clipping a few weights
# makes the step for all others finer.
_SHARES_4_BITS = tuple(1.06 - 0.04 * i for i in range(14))
_SHARES_8_BITS = tuple(1.0 - 0.02 * i for i in range(1, 16))
# With errors that count differently, whatever counts little may be clipped far.
_ASYMMETRIC_SHARES = tuple(1.0 - 0.07 * i for i in range(9))
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
    low = fit.values.amin(-1).clamp(max=0)
    high = fit.values.amax(-1).clamp(min=0)
    for low_share in _ASYMMETRIC_SHARES:
        for high_share in _ASYMMETRIC_SHARES:
            scale = (high * high_share - low * low_share) / fit.steps
            zero_point = fit.lowest_code - low * low_share / scale
            fit.offer(scale, fit.clamp_zero_point(zero_point))


def _refine(fit: GroupFit) -> None:
    """Offer the best scale, and the best line, for the codes that the groups have now.

    With d the approximation, the values are nearest to a·d for a = Σ w·d / Σ d²; with a zero point
    they are nearest to the regression line a·d + b, which is the scale a·s and the zero point
    z - b / (a·s). Zero points beside the one there is get the best scale for their codes as well.
    """
    approximation = fit.approximation(fit.scale, fit.zero_point)
    scale = fit.scale.float()
    fit.offer(scale * _slope(fit, fit.values, approximation), fit.zero_point)
    if fit.zero_point is None:
        return
    value_mean, mean = (fit.mean(t).unsqueeze(-1) for t in (fit.values, approximation))
    slope = _slope(fit, fit.values - value_mean, approximation - mean)
    offset = (value_mean - slope.unsqueeze(-1) * mean).squeeze(-1)
    scale = scale * slope
    fit.offer(scale, fit.clamp_zero_point(fit.zero_point - offset / scale))
    for step in (-1, 1):
        zero_point = fit.clamp_zero_point(fit.zero_point.float() + step)
        approximation = fit.approximation(fit.scale, zero_point)
        fit.offer(fit.scale.float() * _slope(fit, fit.values, approximation), zero_point)


def _slope(fit: GroupFit, values: Tensor, approximation: Tensor) -> Tensor:
    weighted = approximation if fit.importance is None else approximation * fit.importance
    return (weighted * values).sum(-1) / (weighted * approximation).sum(-1)
