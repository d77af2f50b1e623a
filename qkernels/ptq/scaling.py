"""Factors for the features of x that make a layer easier to quantize: SmoothQuant and AWQ."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.optimize import search_scales
from qkernels.schemes import Scheme

# AWQ tries this many exponents from 0 up to, not including, 1.
_GRID = 20


@torch.no_grad()
def smoothquant_factors(weight: Tensor, x_amax: Tensor, alpha: float = 0.5) -> Tensor:
    """What to multiply a weight's columns by, and divide x by, so that both are easy to quantize.

    Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models", 2022: s = max|x|^alpha / max|w|^(1 - alpha).

    Args:
        weight: float [out_features, in_features].
        x_amax: float [in_features], largest |x| of each feature.
        alpha: how much of the difficulty goes from x to the weight, 0 to 1.

    Returns:
        float32 [in_features], 1 where the feature or the column is zero.

    Example:
        >>> smoothquant_factors(torch.tensor([[1.0, -0.25]]), torch.tensor([4.0, 1.0]))
        tensor([2., 2.])
    """
    w_amax = weight.detach().double().abs().amax(0)
    x_amax = x_amax.double()
    factors = x_amax.pow(alpha) / w_amax.pow(1 - alpha)
    return _usable(torch.where((x_amax > 0) & (w_amax > 0), factors, 1.0))


@torch.no_grad()
def awq_factors(
    weight: Tensor,
    x_magnitude: Tensor,
    second_moments: Tensor,
    scheme: Scheme,
    alpha: float | None = None,
) -> Tensor:
    """What to multiply a weight's columns by, and divide x by, so that important ones lose less.

    Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight
    Quantization for LLM Compression and Acceleration", 2023: s = mean|x|^alpha, brought to a
    geometric middle of 1, with the alpha of a grid from 0 to 1 that makes the error of the layer's
    output smallest when the weight is rounded to nearest.

    Args:
        weight: float [out_features, in_features].
        x_magnitude: float [in_features], mean of |x|.
        second_moments: float [in_features, in_features], mean of x xᵀ.
        scheme: how the weight will be quantized.
        alpha: the exponent, or None to search for it.

    Returns:
        float32 [in_features].

    Example:
        >>> weight, x = torch.randn(16, 64), torch.randn(500, 64) * torch.logspace(-1, 1, 64)
        >>> moments = x.T @ x / 500
        >>> factors = awq_factors(weight, x.abs().mean(0), moments, qk.W4A16(group_size=32))
        >>> factors[-1] > factors[0]
        tensor(True)
    """
    weight = weight.detach().float()
    if alpha is not None:
        return _powers(x_magnitude, alpha)
    moments = second_moments.float()
    best, least = _powers(x_magnitude, 0.0), float("inf")
    for i in range(_GRID):
        factors = _powers(x_magnitude, i / _GRID)
        rounded = search_scales(weight * factors, scheme, "minmax").dequantize()
        error = rounded.div_(factors).sub_(weight)
        loss = float(((error @ moments) * error).sum(dtype=torch.float64))
        if loss < least:
            best, least = factors, loss
    return best


def _powers(x_magnitude: Tensor, alpha: float) -> Tensor:
    magnitude = x_magnitude.double()
    seen = magnitude > 0
    if not bool(seen.any()):
        return torch.ones_like(magnitude, dtype=torch.float32)
    # Relative to the mean, so that the lower limit of the paper's code means the same for any x.
    factors = (magnitude / magnitude[seen].mean()).clamp(min=1e-4).pow(alpha)
    low, high = factors[seen].aminmax()
    return _usable(torch.where(seen, factors / (low * high).sqrt(), 1.0))


def _usable(factors: Tensor) -> Tensor:
    """Factors whose inverses are normal numbers in float32."""
    return factors.clamp(1e-5, 1e5).float()
