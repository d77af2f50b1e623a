"""`optimize="hqq"`: half-quadratic quantization, after Badri and Shaji (2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.optimize.groups import GroupFit

_NORM, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20


def fit_hqq(fit: GroupFit) -> None:
    """Make the 0.7-norm of the error of every group small by a half-quadratic solver.

    The error is split into a sparse part, the proximal operator of the norm (generalized soft
    thresholding), and a rest that least squares makes small: over the zero point, as in the paper,
    and, since a stored zero point is rounded to a step of the format, over the scale after that.

    Args:
        fit: the groups; gets the scales and zero points that are found.
    """
    zero_point = None
    if fit.zero_point is not None:
        zero_point = fit.form.to_zero_point(solve_zero_point(fit))
    fit.take(solve_scale(fit, zero_point), zero_point)


def solve_zero_point(fit: GroupFit) -> Tensor:
    """The paper's solver, in codes; float32 [R, G], not rounded.

    Args:
        fit: the groups, whose scales and zero points it starts from.
    """
    values = fit.values / fit.scale.float().unsqueeze(-1)
    zero_point = fit.zero_codes
    best = torch.full_like(zero_point, torch.inf)
    beta = _BETA
    for _ in range(_ITERATIONS):
        codes = (values + zero_point.unsqueeze(-1)).round()
        codes = codes.clamp(fit.form.lowest_code, fit.form.highest_code)
        error = values - (codes - zero_point.unsqueeze(-1))
        proposed = fit.mean(codes - values + shrink(error, beta))
        size = fit.mean(error.abs())
        better = size < best
        if not bool(better.any()):
            break
        zero_point = torch.where(better, proposed, zero_point)
        best = torch.where(better, size, best)
        beta *= _KAPPA
    return zero_point


def solve_scale(fit: GroupFit, zero_point: Tensor | None) -> Tensor:
    """The same with the scale as what least squares finds; float32 [R, G].

    Args:
        fit: the groups, whose scales it starts from.
        zero_point: as stored, [R, G], or None if symmetric.
    """
    scale = fit.scale.float()
    best = torch.full_like(scale, torch.inf)
    beta = _BETA
    for _ in range(_ITERATIONS):
        approximation = fit.approximation(scale, zero_point)
        error = fit.values - approximation
        unit = scale.unsqueeze(-1)
        dense = fit.values - unit * shrink(error / unit, beta)
        proposed = scale * fit.mean(approximation * dense) / fit.mean(approximation.square())
        size = fit.mean(error.abs())
        better = (size < best) & proposed.isfinite() & (proposed != 0)
        if not bool(better.any()):
            break
        scale = torch.where(better, proposed, scale)
        best = torch.where(better, size, best)
        beta *= _KAPPA
    return scale


def shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal operator of the 0.7-norm: sign(x) · max(|x| - |x|^(p - 1) / beta, 0)."""
    magnitude = x.abs()
    # 0 to a negative power is infinity, which the relu turns into 0.
    return x.sign() * (magnitude - magnitude.pow(_NORM - 1) / beta).relu()
