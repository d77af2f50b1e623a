"""One weight with its input's statistics in, one quantized weight out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.functional import Quantized
from qkernels.nn import QLinear
from qkernels.optimize import search_scales
from qkernels.ptq.gptq import gptq
from qkernels.ptq.scaling import awq_factors, smoothquant_factors
from qkernels.ptq.statistics import InputStatistics
from qkernels.schemes import Scheme


@dataclass(frozen=True)
class Options:
    """What `quantize_calibrated_` was asked for; see there."""

    method: tuple[str, ...]
    optimize: str
    act_order: str
    damping: float
    alpha: float | None

    @property
    def needs_moments(self) -> bool:
        """Whether the method looks at how features of x go together."""
        return "gptq" in self.method or ("awq" in self.method and self.alpha is None)


@dataclass(frozen=True)
class Solved:
    """A quantized weight and what is done to x before it.

    Args:
        weight: in storage layout.
        x_premul: see `QLinear`.
        k_perm: see `QLinear`.
    """

    weight: Quantized
    x_premul: Tensor | None = None
    k_perm: Tensor | None = None


def solve(weight: Tensor, scheme: Scheme, stats: InputStatistics, options: Options) -> Solved:
    """Quantize a weight by the methods that were asked for.

    Args:
        weight: float [out_features, in_features].
        scheme: how it is to be stored.
        stats: of the layer's input; without any rows, scales are searched for without data.
        options: the methods and their settings.
    """
    weight = weight.detach().float()
    if stats.rows == 0:
        return Solved(search_scales(weight, scheme, options.optimize))
    factors = _factors(weight, scheme, stats, options)
    if factors is not None:
        weight = weight * factors
    if "gptq" in options.method:
        moments = stats.second_moments
        if factors is not None:
            moments = moments / torch.outer(factors.double(), factors.double())
        rounded = gptq(
            weight,
            moments,
            scheme,
            optimize=options.optimize,
            act_order=options.act_order,
            damping=options.damping,
        )
        quantized, k_perm = rounded.weight, rounded.k_perm
    else:
        importance = None
        if options.optimize == "mse":
            importance = stats.mean_square / (1 if factors is None else factors.double().square())
            importance = importance if bool((importance > 0).any()) else None
        k_perm = None
        quantized = search_scales(weight, scheme, options.optimize, importance=importance)
    return Solved(quantized, None if factors is None else 1 / factors, k_perm)


def _factors(
    weight: Tensor, scheme: Scheme, stats: InputStatistics, options: Options
) -> Tensor | None:
    if "smoothquant" in options.method:
        alpha = 0.5 if options.alpha is None else options.alpha
        return smoothquant_factors(weight, stats.amax, alpha)
    if "awq" in options.method:
        moments = stats.second_moments if options.alpha is None else torch.empty(0)
        return awq_factors(weight, stats.mean_magnitude, moments, scheme, options.alpha)
    return None


def build(old: Sequence[nn.Linear], schemes: Sequence[Scheme], solved: Solved) -> list[QLinear]:
    """Quantized layers for float ones that share a weight; they share its packed form.

    Args:
        old: the float layers.
        schemes: theirs, which store the weight in the same way.
        solved: the weight.
    """
    layers: list[QLinear] = []
    for linear, scheme in zip(old, schemes, strict=True):
        new = QLinear.shell(linear, scheme)
        new.packed = layers[0].packed if layers else new.packing.parameter(solved.weight)
        new.set_input_transform(solved.x_premul, solved.k_perm)
        layers.append(new)
    return layers


@torch.no_grad()
def correct_bias(old: nn.Linear, new: QLinear, stats: InputStatistics) -> None:
    """Add to the bias what rounding the weight took from the mean of the output.

    Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization
    and Bias Correction", 2019: b + (W - Ŵ) E[x].

    Args:
        old: the float layer.
        new: the layer that replaces it, with the same bias, which is written to.
        stats: of the input of both.
    """
    if new.bias is None or stats.rows == 0:
        return
    lost = old.weight.double() - new.float_weight(torch.float64)
    new.bias.add_((lost @ stats.mean).to(new.bias.dtype))


@torch.no_grad()
def sqnr_db(reference: Tensor, layer: QLinear, x: Tensor) -> float:
    """Signal to noise of a layer's output in dB.

    Args:
        reference: what it should be, [rows, out_features].
        layer: the layer.
        x: its input, float32 [rows, in_features].
    """
    noise = (layer(x) - reference).square().sum(dtype=torch.float64)
    signal = reference.square().sum(dtype=torch.float64)
    return float(10 * torch.log10(signal / noise))


@torch.no_grad()
def float_output(layer: nn.Linear, x: Tensor) -> Tensor:
    """A float layer's output on float32 rows, whatever its type."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x, layer.weight.float(), bias)
