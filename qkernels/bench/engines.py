"""What is compared: products with a prepared weight, convolutions, codecs and whole models."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.bench.plan import Conv

Call = Callable[[Tensor], Tensor]

# Signal to quantization noise that a correct result reaches on normal weights and activations,
# less a margin. A wrong sign, scale or order of nibbles gives about 0 dB.
WORST_SQNR = {"float": 35.0, "8 bits": 28.0, "8 bits from float": 28.0, "4 bits": 15.0}


@dataclass(frozen=True)
class LinearEngine:
    """A way to compute `x @ weight.T`.

    Args:
        name: as results name it.
        kind: "float", "8 bits" or "4 bits" per weight: with whom it competes.
        dtype: type of the x that it is given.
        bits: stored bits per weight, scales included.
        arithmetic: what its products are made of: "int8" (int8 × int8), "int4" (int4 × int8),
            "bf16", "fp32", or "" where it is not known.
        build: prepares a float32 weight [N, K]; gives as many independent copies as asked for,
            each a function of x [M, K].
    """

    name: str
    kind: str
    dtype: torch.dtype
    bits: float
    arithmetic: str
    build: Callable[[Tensor, int], Sequence[Call]]
    own: bool = False


@dataclass(frozen=True)
class ModelEngine:
    """A way to run a float model faster.

    Args:
        name: as results name it.
        kind: "float", "8 bits" or "4 bits" per weight.
        convert: takes its own float32 copy of the model; returns what is called instead of it.
        compiled: whether `convert` compiles, which takes a while.
    """

    name: str
    kind: str
    convert: Callable[[nn.Module], Any]
    own: bool = False
    compiled: bool = False


def compile_alone(model: nn.Module, **options: Any) -> Any:
    """`torch.compile` as in a program with one model of a class.

    Of several, torch tries in every call what it compiled for the others first, unless told not to
    (which 2.13 and newer releases can be).

    Args:
        model: to be compiled.
        options: of `torch.compile`.

    Returns:
        The compiled model.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(model, **options)


@dataclass(frozen=True)
class ConvTask:
    """A convolution with bias and ReLU, and the ranges for those who compute it in int8.

    Args:
        shape: of the convolution.
        x: float32, channels_last, on a grid of 256 values.
        weight: float32 [out, channels / groups, kernel, kernel].
        bias: float32 [out].
        x_scale: distance of neighbouring values of x.
        x_zero_point: code of zero in x, 0 to 255.
        y_scale: the same of the result.
        y_zero_point: 0, as nothing is negative after a ReLU.
    """

    shape: Conv
    x: Tensor
    weight: Tensor
    bias: Tensor
    x_scale: float
    x_zero_point: int
    y_scale: float
    y_zero_point: int = 0


@dataclass(frozen=True)
class ConvEngine:
    """A way to compute `relu(conv(x) + bias)`.

    Args:
        name: as results name it.
        kind: "float"; "8 bits" takes and gives int8 codes, "8 bits from float" takes and gives
            float32 and computes with int8.
        bits: stored bits per weight.
        arithmetic: as for `LinearEngine`.
        build: prepares; gives the timed call, and a function that turns its result into the float
            tensor that it stands for.
    """

    name: str
    kind: str
    bits: float
    arithmetic: str
    build: Callable[[ConvTask], tuple[Callable[[], Any], Callable[[Any], Tensor]]]
    own: bool = False


@dataclass(frozen=True)
class CnnEngine:
    """A way to run an image classifier faster.

    Args:
        name: as results name it.
        kind: "float" or "8 bits".
        convert: takes its own float32 copy of the model and batches to calibrate with; returns a
            function of images that gives logits.
        compiled: whether `convert` compiles, which takes a while.
    """

    name: str
    kind: str
    convert: Callable[[nn.Module, Sequence[Tensor]], Call]
    own: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class CodecEngine:
    """A way to quantize or dequantize a tensor.

    Args:
        name: as results name it.
        task: such as "quantize int8" or "dequantize nf4".
        build: prepares for a float32 tensor; gives the timed call, and a function that turns its
            result into the float32 tensor that the codes stand for.
    """

    name: str
    task: str
    build: Callable[[Tensor], tuple[Callable[[], Any], Callable[[Any], Tensor]]]
    own: bool = False


def by_shape(prepare: Callable[[Tensor], Call]) -> Call:
    """A function for any x, by functions that are each made for one shape of x.

    Args:
        prepare: makes the function for the shape of its argument; called once for each.

    Example:
        >>> size = by_shape(lambda first: lambda x: torch.tensor(first.numel()))
        >>> size(torch.ones(2)), size(torch.ones(3))
        (tensor(2), tensor(3))
    """
    made: dict[torch.Size, Call] = {}

    def call(x: Tensor) -> Tensor:
        if x.shape not in made:
            made[x.shape] = prepare(x)
        return made[x.shape](x)

    return call


class WrongResultError(RuntimeError):
    """An engine computed something else than was asked for, so its time means nothing."""


def sqnr(reference: Tensor, got: Tensor) -> float:
    """Signal to noise in dB; -inf if anything is not finite.

    Example:
        >>> round(sqnr(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 1.1])))
        20
    """
    noise = (reference.double() - got.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def verified(name: str, kind: str, reference: Tensor, got: Tensor) -> float:
    """The result's SQNR in dB, if it is near enough to the float reference.

    Raises:
        WrongResultError: another shape, or less SQNR than a correct result of this kind has.
    """
    if got.shape != reference.shape:
        raise WrongResultError(f"{name}: shape {list(got.shape)}, not {list(reference.shape)}")
    value = sqnr(reference, got)
    if value < WORST_SQNR[kind]:
        raise WrongResultError(
            f"{name}: {value:.1f} dB SQNR, where a correct result of {kind} has more than "
            f"{WORST_SQNR[kind]:.0f} dB"
        )
    return value
