"""How far the largest values of a layer's input and weight stand out."""

from __future__ import annotations

from torch import Tensor, nn

from qkernels.calibrate import channel_dim
from qkernels.nn.module import QModule


def channel_amax(module: nn.Module, x: Tensor) -> Tensor | None:
    """The largest magnitude in each channel of a layer's input; None where there are no channels.

    Args:
        module: a float layer.
        x: its input; NaN and Inf count as 0.
    """
    dim = channel_dim(module)
    if dim is None or not x.is_floating_point() or x.dim() < -dim or not x.numel():
        return None
    rows = x.detach().movedim(dim, 0).reshape(x.shape[dim], -1)
    return rows.nan_to_num(0, 0, 0).float().abs().amax(1)


def input_outlier(amax: Tensor | None) -> float | None:
    """The largest channel over the median of those that are not always 0.

    An int8 scale for a row has to reach the largest channel, and the others get what is left of
    the codes: the ratio says how little (Dettmers et al., "LLM.int8()", 2022).

    Args:
        amax: the largest magnitude in each channel.

    Example:
        >>> input_outlier(torch.tensor([0.0, 2.0, 1.0, 60.0, 2.0]))
        30.0
    """
    used = amax[amax > 0] if amax is not None else None
    if used is None or not used.numel():
        return None
    return float(used.max() / used.median())


def weight_outlier(module: nn.Module) -> float | None:
    """The largest magnitude of a float weight over its root mean square.

    Args:
        module: a layer; None for quantized ones and those without a weight matrix.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, QModule) or not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    flat = weight.detach().float().flatten()
    rms = float(flat.square().mean().sqrt()) if flat.numel() else 0.0
    return float(flat.abs().max()) / rms if rms > 0 else None
