"""`optimize="hqq"`: half-quadratic quantization, after Badri and Shaji (2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.optimize.groups import GroupFit

_NORM, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20


def fit_hqq(fit: GroupFit) -> None:
    """Minimize the 0.7-norm of the error of every group by a half-quadratic solver.

    The error is split into a sparse part e, the proximal operator of the norm (generalized soft
    thresholding), and a rest that a mean makes small: of the zero point, as in the paper, or of
    the scale where there is no zero point. All of it is computed in steps of the group's scale, so
    that the result does not depend on the size of the weights. The zero point is rounded at the
    end, since it is stored as an integer.

    Args:
        fit: the groups; gets the scales and zero points that are found.
    """
    scale = fit.scale.float()
    zero_point = None if fit.zero_point is None else fit.zero_point.float()
    values = fit.values / scale.unsqueeze(-1)
    best = torch.full_like(scale, torch.inf)
    beta = _BETA
    for _ in range(_ITERATIONS):
        if zero_point is None:
            approximation = fit.approximation(scale, None)
            rest = fit.values - approximation
            unit = scale.unsqueeze(-1)
            rest = rest - unit * shrink(rest / unit, beta)
            slope = (approximation * (rest + approximation)).sum(-1)
            proposed = scale * slope / approximation.square().sum(-1)
            error = fit.mean((fit.values - approximation).abs())
            better = (error < best) & proposed.isfinite() & (proposed != 0)
            scale = torch.where(better, proposed, scale)
        else:
            low = fit.lowest_code
            codes = (values + zero_point.unsqueeze(-1)).round().clamp(low, low + fit.steps)
            rest = values - (codes - zero_point.unsqueeze(-1))
            proposed = fit.mean(codes - values + shrink(rest, beta))
            error = fit.mean(rest.abs())
            better = error < best
            zero_point = torch.where(better, proposed, zero_point)
        best = torch.where(better, error, best)
        beta *= _KAPPA
        if not bool(better.any()):
            break
    fit.take(scale, None if zero_point is None else fit.clamp_zero_point(zero_point))


def shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal operator of the 0.7-norm: sign(x) · max(|x| - |x|^(p - 1) / beta, 0)."""
    magnitude = x.abs()
    # 0 to a negative power is infinity, which the relu turns into 0.
    return x.sign() * (magnitude - magnitude.pow(_NORM - 1) / beta).relu()
