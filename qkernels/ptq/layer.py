"""One weight with its input's statistics in, one quantized weight out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkernels.calibration import Int8Range
from qkernels.functional import Quantized
from qkernels.nn import QLinear
from qkernels.nn.conv import QConvNd
from qkernels.nn.kinds import quantized_from_shell
from qkernels.optimize import search_scales
from qkernels.ptq.gptq import gptq
from qkernels.ptq.options import Options
from qkernels.ptq.scaling import awq_factors, smoothquant_factors
from qkernels.ptq.statistics import InputStatistics, LayerStatistics
from qkernels.quantize import give_range
from qkernels.schemes import Scheme

FloatLayer = nn.Linear | nn.modules.conv._ConvNd
QuantizedLayer = QLinear | QConvNd


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


def solve(weight: Tensor, scheme: Scheme, stats: LayerStatistics, options: Options) -> Solved:
    """Quantize a weight by the methods that were asked for, each group of channels for itself.

    Args:
        weight: float [out_features, in_features], or a convolution's weight as a matrix.
        scheme: how it is to be stored.
        stats: of the layer's input; without any rows, scales are searched for without data.
        options: the methods and their settings; several groups have no input transform.
    """
    weight = weight.detach().float()
    if len(stats.groups) == 1:
        return _solve(weight, scheme, stats.groups[0], options)
    rows = weight.chunk(len(stats.groups))
    parts = [
        _solve(part, scheme, of, options).weight
        for part, of in zip(rows, stats.groups, strict=True)
    ]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Solved(
        Quantized(
            torch.cat([part.data for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            scheme.format,
            scheme.group_size,
            weight.shape,
        )
    )


def _solve(weight: Tensor, scheme: Scheme, stats: InputStatistics, options: Options) -> Solved:
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


def build(
    old: Sequence[FloatLayer],
    schemes: Sequence[Scheme],
    ranges: Sequence[Int8Range | None],
    solved: Solved,
) -> list[QuantizedLayer]:
    """Quantized layers for float ones that share a weight; they share its packed form.

    Args:
        old: the float layers.
        schemes: theirs, which store the weight in the same way.
        ranges: of their inputs, None where a scheme is not static.
        solved: the weight.
    """
    layers: list[QuantizedLayer] = []
    for layer, scheme, x_range in zip(old, schemes, ranges, strict=True):
        new = quantized_from_shell(layer, scheme)
        assert isinstance(new, QLinear | QConvNd)
        new.packed = layers[0].packed if layers else new.packing.parameter(solved.weight)
        if isinstance(new, QLinear):
            new.set_input_transform(solved.x_premul, solved.k_perm)
        give_range(new, x_range)
        layers.append(new)
    return layers


@torch.no_grad()
def correct_bias(old: FloatLayer, new: QuantizedLayer, stats: LayerStatistics) -> None:
    """Add to the bias what rounding the weight took from the mean of the output.

    Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization
    and Bias Correction", 2019: b + (W - Ŵ) E[x]. For a convolution x is what its kernel covers,
    borders included, and the mean goes over all images and positions.

    Args:
        old: the float layer.
        new: the layer that replaces it, with the same bias, which is written to.
        stats: of the input of both.
    """
    if new.bias is None or any(group.rows == 0 for group in stats.groups):
        return
    lost = new.matrix_of(old).double() - new.float_weight(torch.float64)
    rows = lost.chunk(len(stats.groups))
    shift = torch.cat([part @ of.mean for part, of in zip(rows, stats.groups, strict=True)])
    new.bias.add_(shift.to(new.bias.dtype))


@torch.no_grad()
def sqnr_db(reference: Sequence[Tensor], layer: QuantizedLayer, inputs: Sequence[Tensor]) -> float:
    """Signal to noise of a layer's outputs in dB.

    Args:
        reference: what they should be.
        layer: the layer.
        inputs: its inputs, float32.
    """
    signal = noise = 0.0
    for x, y in zip(inputs, reference, strict=True):
        x = x.double() if layer.dtype == torch.float64 else x  # other biases go with any x
        noise += float((layer(x) - y).square().sum(dtype=torch.float64))
        signal += float(y.square().sum(dtype=torch.float64))
    ratio = torch.tensor(signal, dtype=torch.float64) / noise
    return float(10 * torch.log10(ratio))


@torch.no_grad()
def float_outputs(layer: FloatLayer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A float layer's outputs on float32 inputs, whatever its type, and without its hooks."""
    wide = copy.copy(layer)
    wide._parameters = {
        name: None if value is None else nn.Parameter(value.float(), requires_grad=False)
        for name, value in layer._parameters.items()
    }
    return [type(layer).forward(wide, x) for x in inputs]  # type: ignore[arg-type]
