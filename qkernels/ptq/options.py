"""What `quantize_calibrated_` can be asked for, and what a kind of layer can have of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qkernels.optimize import check_optimizer
from qkernels.plan import Step
from qkernels.ptq.gptq import ACT_ORDERS

METHODS = ("awq", "smoothquant", "gptq", "bias_correction")
# They choose x_premul, which only QLinear has.
SCALING = ("awq", "smoothquant")
OP = "quantize_calibrated_"


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

    def for_layer(self, layer: nn.Module) -> Options:
        """What of it a layer can have: a convolution's kernel changes nothing of its input.

        Args:
            layer: a float Linear or convolution.
        """
        if isinstance(layer, nn.Linear):
            return self
        method = tuple(name for name in self.method if name not in SCALING)
        act_order = "static" if self.act_order == "permute" else self.act_order
        return replace(self, method=method, act_order=act_order)

    def note_for(self, layer: nn.Module) -> str:
        """What a summary has to say of a layer that cannot have all of it, or nothing.

        Args:
            layer: a float Linear or convolution.
        """
        left = [name for name in self.method if name not in self.for_layer(layer).method]
        return f"without {' and '.join(left)}, which only Linear layers can have" if left else ""


def checked_options(
    method: str | Sequence[str], optimize: str, act_order: str, damping: float, alpha: float | None
) -> Options:
    """The options, if they make sense together.

    Args:
        method: see `quantize_calibrated_`, as are the others.
        optimize: how scales are chosen.
        act_order: of GPTQ.
        damping: of GPTQ.
        alpha: of SmoothQuant and AWQ.

    Raises:
        ValueError: they do not.
    """
    several = isinstance(method, Iterable) and not isinstance(method, str)
    names: tuple[Any, ...] = tuple(method) if several else (method,)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            f"{OP}: method is {method!r}; expected one or more of {', '.join(map(repr, METHODS))}"
        )
    if set(SCALING) <= set(names):
        raise ValueError(
            f"{OP}: method is {method!r}; awq and smoothquant both choose x_premul, so use one"
        )
    check_optimizer(OP, optimize)
    if act_order not in ACT_ORDERS:
        raise ValueError(
            f"{OP}: act_order is {act_order!r}; expected one of {', '.join(map(repr, ACT_ORDERS))}"
        )
    if not 0 <= damping < 1e3:
        raise ValueError(f"{OP}: damping is {damping!r}; expected a number from 0, such as 0.01")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: alpha is {alpha!r}; expected a number from 0 to 1, or None")
    return Options(names, optimize, act_order, float(damping), alpha)


def check_layers(options: Options, layers: Mapping[Step, nn.Module]) -> None:
    """Refuse methods that no layer can have anything of, or that spoil a static input's scale.

    Args:
        options: what was asked for.
        layers: the float layers that are calibrated, by what was decided about them.

    Raises:
        ValueError: there are only convolutions, and only AWQ or SmoothQuant for them, or a Linear
            layer for these has a static scheme.
    """
    asked = " and ".join(map(repr, options.method))
    if layers and not any(options.for_layer(layer).method for layer in layers.values()):
        raise ValueError(
            f"{OP}: method is {asked}, but all layers to calibrate are convolutions, whose kernels "
            "take no factors for x; use 'gptq' or 'bias_correction'"
        )
    for step, layer in layers.items():
        scales = set(options.for_layer(layer).method) & set(SCALING)
        if scales and step.scheme is not None and step.scheme.static:
            raise ValueError(
                f"{OP}: method is {asked}, which changes the input of {step.names[0]}, but its "
                f"scheme {step.scheme} has the range that was measured before; use a scheme that "
                "is not static, or 'gptq'"
            )
