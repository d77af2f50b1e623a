"""Scales and zero points that make the error of a weight small, instead of fitting its extremes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import functional
from qkernels.functional import Quantized
from qkernels.nn.carry import FLOAT_DTYPES
from qkernels.optimize.groups import GroupFit
from qkernels.optimize.hqq import fit_hqq
from qkernels.optimize.mse import fit_mse
from qkernels.schemes import Scheme

_FITS: dict[str, Callable[[GroupFit], None]] = {"mse": fit_mse, "hqq": fit_hqq}
OPTIMIZERS = ("minmax", *_FITS)
# Elements that are searched at a time: 1 MiB of float32, which a cache holds from trial to trial.
_CHUNK = 1 << 18


@torch.no_grad()
def search_scales(
    weight: Tensor,
    scheme: Scheme,
    optimize: str = "mse",
    *,
    importance: Tensor | None = None,
) -> Quantized:
    """Quantize a matrix with scales and zero points that are searched for.

    Codes are those that the kernels give for the scales as stored (`functional.quantize_with`), so
    the result packs as it is. No group is worse than with "minmax", which is where "mse" starts.

    Args:
        weight: float32, bfloat16, float16 or float64 [out_features, in_features].
        scheme: says format, group size, symmetry and type of scales; a symmetric 4-bit scale may be
            negative, so that the longer end of the codes meets the longer end of the weights.
        optimize: "minmax" takes scales from the extremes of each group; "mse" looks for the
            smallest squared error on a grid and by alternating least squares; "hqq" for the
            smallest 0.7-norm of the error by a half-quadratic solver (Badri and Shaji,
            "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
        importance: float [in_features], weights of the squared error by column, such as the second
            moments of the layer's input; "mse" only.

    Returns:
        The weight in storage layout.

    Raises:
        TypeError: weight is not a floating-point tensor, or scheme is not a Scheme.
        ValueError: weight is not a matrix, optimize is not known, or importance does not fit.

    Example:
        >>> weight = torch.randn(32, 64)
        >>> scheme = qk.W4A16(group_size=32)
        >>> nearest = search_scales(weight, scheme, "minmax").dequantize()
        >>> searched = search_scales(weight, scheme, "mse").dequantize()
        >>> (searched - weight).norm() < 0.97 * (nearest - weight).norm()
        tensor(True)
    """
    _check(weight, scheme, importance)
    check_optimizer("search_scales", optimize)
    if importance is not None and optimize != "mse":
        raise ValueError(
            f"search_scales: importance is given but optimize is {optimize!r}, which has no use "
            'for it; pass optimize="mse" or no importance'
        )
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    if optimize == "minmax" or weight.numel() == 0:
        return functional.quantize(
            weight, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
        )
    size = min(scheme.group_size, weight.shape[1])
    size = weight.shape[1] if size == -1 else size
    fits = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        fit = GroupFit(*_in_groups(rows.float(), size, importance), scheme)
        _FITS[optimize](fit)
        fits.append(fit)
    scale = torch.cat([fit.scale for fit in fits])
    zeros = [fit.zero_point for fit in fits if fit.zero_point is not None]
    zero_point = torch.cat(zeros) if zeros else None
    return functional.quantize_with(weight, scale, zero_point, scheme.format, scheme.group_size)


def check_optimizer(op: str, optimize: object) -> None:
    """Refuse a name that stands for no way to choose scales.

    Args:
        op: the function that was called.
        optimize: what was given.

    Raises:
        ValueError: it is not in `OPTIMIZERS`.
    """
    if optimize not in OPTIMIZERS:
        raise ValueError(
            f"{op}: optimize is {optimize!r}; expected one of {', '.join(map(repr, OPTIMIZERS))}"
        )


def _check(weight: object, scheme: object, importance: Tensor | None) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in FLOAT_DTYPES:
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"search_scales: weight is {given}; expected a floating-point tensor")
    if not isinstance(scheme, Scheme):
        raise TypeError(f"search_scales: scheme is {scheme!r}; expected one like qk.W4A16()")
    if weight.dim() != 2:
        raise ValueError(
            f"search_scales: weight has shape {tuple(weight.shape)}; expected two dimensions "
            "(out_features, in_features)"
        )
    if importance is not None and importance.shape != weight.shape[1:]:
        raise ValueError(
            f"search_scales: importance has shape {tuple(importance.shape)}; expected "
            f"({weight.shape[1]},), one value for each column of weight"
        )


def _in_groups(rows: Tensor, size: int, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows [R, K] as [R, G, size], and how much each element counts, [G, size], None for all alike.

    A short last group is filled with zeros that do not count: no scale depends on a zero, and its
    code is exact.
    """
    columns = rows.shape[1]
    missing = -columns % size
    if importance is None and missing:
        importance = torch.ones(columns)
    if importance is not None:
        importance = F.pad(importance.float(), (0, missing)).reshape(-1, size)
    return F.pad(rows, (0, missing)).reshape(len(rows), -1, size), importance
