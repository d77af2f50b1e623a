"""The layers that a search chooses for, each with its quantized forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qkernels.calibration import Calibration
from qkernels.nn import QModule
from qkernels.nn.kinds import base_of, why_no_kernel
from qkernels.plan import Step, make_plan, own_bytes
from qkernels.quantize import input_range, quantized_like_float
from qkernels.schemes import Scheme

OP = "search"


@dataclass(frozen=True)
class Form:
    """One way to compute the layers of a unit.

    Args:
        scheme: how they are quantized, None if they stay as they are.
        modules: what stands in for them; none if they stay.
        bytes: of their parameters and buffers, what they share counted once.
    """

    scheme: Scheme | None
    modules: tuple[nn.Module, ...]
    bytes: int


@dataclass(frozen=True)
class Unit:
    """A layer, or several that share a weight.

    Args:
        names: first qualified name of each.
        modules: the float layers.
        forms: as they are first, then with each scheme that they take.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    forms: tuple[Form, ...]

    @property
    def kind(self) -> str:
        """Class of the float layer."""
        return type(self.modules[0]).__name__

    @property
    def dtype(self) -> str:
        """Of the float weight."""
        weight: Any = self.modules[0].weight
        return str(weight.dtype).removeprefix("torch.")

    def form_of(self, scheme: Scheme | None) -> Form:
        """How a model that has one scheme for all layers computes these."""
        for form in self.forms:
            if form.scheme == scheme:
                return form
        # An Embedding has one form for all schemes that store its weight alike.
        alike = (f for f in self.forms[1:] if scheme is not None and f.scheme is not None)
        return next(
            (f for f in alike if self.only_embeddings and _alike(f.scheme, scheme)), self.forms[0]
        )

    @property
    def only_embeddings(self) -> bool:
        """Whether nothing in it multiplies, so that only the weight of a scheme counts."""
        return all(isinstance(module, nn.Embedding) for module in self.modules)

    def pairs(self, form: Form) -> list[tuple[nn.Module, nn.Module]]:
        """The float layers with what stands in for them."""
        return list(zip(self.modules, form.modules, strict=True)) if form.modules else []


def find_units(
    model: nn.Module,
    schemes: Sequence[Scheme],
    ignore: tuple[str, ...],
    optimize: str,
    calibration: Calibration | None,
) -> tuple[list[Unit], list[str]]:
    """Quantize every layer in every way, beside the model.

    A weight that several schemes store alike is packed once, so what is held is about half of the
    float model for int8 and 4-bit schemes together.

    Args:
        model: nothing in it is changed.
        schemes: to choose from.
        ignore: patterns of modules that stay float.
        optimize: how scales are chosen.
        calibration: ranges for static schemes.

    Returns:
        The units, and sentences about schemes that fit nothing.

    Raises:
        ValueError: a layer cannot be quantized, or no scheme fits any.
    """
    found: dict[tuple[str, ...], list[Form]] = {}
    notes: list[str] = []
    for scheme in schemes:
        kinds = [m for m in model.modules() if base_of(m) is not None]
        if kinds and all(why_no_kernel(m, scheme) for m in kinds):
            notes.append(f"{scheme} fits no layer: {why_no_kernel(kinds[0], scheme)}.")
            continue
        for steps in _tied(make_plan(model, {"*": scheme}, ignore, OP, calibration)):
            names = tuple(step.names[0] for step in steps)
            forms = found.setdefault(names, [_as_it_is(model, names)])
            form = _quantized(model, steps, scheme, forms, optimize, calibration)
            if form is not None:
                forms.append(form)
    if not found:
        raise ValueError(f"{OP}: {' '.join(notes)} Offer other schemes")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    units = [
        Unit(names, tuple(map(model.get_submodule, names)), tuple(forms))
        for names, forms in sorted(found.items(), key=lambda item: order[item[0][0]])
    ]
    return units, notes


def _tied(steps: Sequence[Step]) -> list[list[Step]]:
    """The layers to quantize, those that share a weight together."""
    units: dict[str, list[Step]] = {}
    for step in steps:
        if step.scheme is not None:
            units.setdefault(step.twin or step.names[0], []).append(step)
    return list(units.values())


def _as_it_is(model: nn.Module, names: Sequence[str]) -> Form:
    seen: set[object] = set()
    return Form(None, (), sum(own_bytes(model.get_submodule(name), seen) for name in names))


def _quantized(
    model: nn.Module,
    steps: Sequence[Step],
    scheme: Scheme,
    others: Sequence[Form],
    optimize: str,
    calibration: Calibration | None,
) -> Form | None:
    """The layers with one scheme; None if another form is the same."""
    olds = [model.get_submodule(step.names[0]) for step in steps]
    alike = [form for form in others if form.scheme is not None and _alike(form.scheme, scheme)]
    if alike and all(isinstance(old, nn.Embedding) for old in olds):
        return None
    twin = alike[0].modules[0] if alike else None
    modules: list[QModule] = []
    for step, old in zip(steps, olds, strict=True):
        x_range = input_range(step, old, calibration)
        assert twin is None or isinstance(twin, QModule)
        module = quantized_like_float(old, scheme, twin, x_range, optimize)
        modules.append(module.eval())
        twin = module
    seen: set[object] = set()
    return Form(scheme, tuple(modules), sum(own_bytes(module, seen) for module in modules))


def _alike(a: Scheme | None, b: Scheme | None) -> bool:
    return a is not None and b is not None and a.shares_weight_with(b)
