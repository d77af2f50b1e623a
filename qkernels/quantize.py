"""quantize_ and dequantize_: whole models, in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qkernels.attention import attention_split, whole_again
from qkernels.calibration import Calibration, Int8Range
from qkernels.calibration.use import ranges_of
from qkernels.fold import Fold, apply_folds, plan_folds
from qkernels.fuse import unfuse_
from qkernels.mixed.plan import PrecisionPlan
from qkernels.nn import QEmbedding, QLinear, QModule
from qkernels.nn.conv import QConvNd
from qkernels.nn.int8 import Int8Conv
from qkernels.nn.kinds import QUANTIZED, base_of, quantized_from_shell
from qkernels.nn.parents import replace_everywhere, settle_parents
from qkernels.nn.qat import QATModule
from qkernels.nn.ranges import set_range
from qkernels.optimize import check_optimizer, search_scales
from qkernels.plan import (
    Step,
    check_model,
    check_patterns,
    is_listed,
    make_plan,
    needs_range,
    own_bytes,
    tensor_key,
)
from qkernels.schemes import SCHEMES, Scheme
from qkernels.summary import ModuleRow, Summary

DEFAULT_IGNORE = ("lm_head",)
# Below this a model is done before a bar could be read.
_BYTES_WORTH_A_BAR = 256 << 20


@torch.inference_mode(False)  # what is made must be usable outside of it
def quantize_(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    *,
    calibration: Calibration | None = None,
    fold_batchnorm: bool = False,
    optimize: str | None = None,
    progress: bool | None = None,
) -> Summary:
    """Replace the Linear, Conv and Embedding layers of a model by quantized ones, in place.

    The projections of an `nn.MultiheadAttention` become layers, too: `q_proj`, `k_proj`, `v_proj`
    and `out_proj` of a `qk.nn.QMultiheadAttention`.

    Everything is checked before the first layer changes. Layers are then replaced one by one, so
    that memory never exceeds the float model and one layer. Modules that share a weight share one
    packed weight, or stay float together. Patterns, in `scheme` and `ignore`, are shell globs on
    qualified names (`encoder.layers.0.linear1`); `*` crosses dots, a pattern that names a container
    means everything in it, and one without a dot also matches the last part of a name; "=" before
    a name means that module alone.

    Args:
        model: float model on the CPU. It is changed.
        scheme: one scheme for all layers, a plan that `qk.search` made, or schemes by pattern.
            Where several patterns match, the last one counts, so put general ones first:
            `{"*": W4A16(), "*.linear2": W8A8()}`.
        ignore: patterns of modules that stay float, whatever `scheme` says. By default "lm_head",
            the output layer of language models, if there is one.
        calibration: what `qk.calibrate` returned for this model; static schemes need it.
        fold_batchnorm: fold BatchNorms into the layers before them first, see `fold_batchnorm_`.
            Not done unless asked for, because a model without its BatchNorms no longer fits the
            state_dicts and files of one that has them.
        optimize: how scales are chosen: "minmax" from the extremes of each group, at once, or by a
            search, "mse" or "hqq", which takes seconds and makes 4 bits more accurate; see
            `qk.optimize.search_scales`. By default as a plan says, or else "minmax".
        progress: show a progress bar; by default only for large models on a terminal.

    Returns:
        A summary of every module: what it became, or why it was left.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pattern that matches nothing, a layer that cannot be quantized, or an unknown
            optimize.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> summary = qk.quantize_(model, qk.W8A8(), ignore="2")
        >>> len(summary.converted)
        1
    """
    if optimize is None:
        optimize = scheme.optimize if isinstance(scheme, PrecisionPlan) else "minmax"
    check_optimizer("quantize_", optimize)
    with attention_split(model):
        return _quantize(model, scheme, ignore, calibration, fold_batchnorm, optimize, progress)


def _quantize(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str],
    calibration: Calibration | None,
    fold_batchnorm: bool,
    optimize: str,
    progress: bool | None,
) -> Summary:
    steps = plan_of("quantize_", model, scheme, ignore, calibration=calibration)
    folds = plan_folds(model, ignored_patterns(ignore)) if fold_batchnorm else []
    done: dict[str, QModule] = {}

    def convert(step: Step) -> None:
        assert step.scheme is not None
        old = model.get_submodule(step.names[0])
        x_range = input_range(step, old, calibration)
        twin = done.get(step.twin or "")
        new = quantized_like_float(old, step.scheme, twin, x_range, optimize)
        replace_everywhere(model, step.names, old, new)
        done[step.names[0]] = new

    apply_folds(model, folds)
    wanted = [step for step in steps if step.scheme is not None]
    with shown_progress("Quantizing", wanted, progress) as advance:
        for step in wanted:
            convert(step)
            advance(step)
    settle_parents(model)
    return summary_of(f"{type(model).__name__} quantized", model, *_told(steps, folds))


def dequantize_(model: nn.Module) -> Summary:
    """Replace the quantized layers of a model by the float layers they compute with, in place.

    Activation functions that `fuse_` took out are put back, and so is `nn.MultiheadAttention`.

    Args:
        model: a model that holds quantized layers. It is changed.

    Returns:
        A summary of every module.

    Raises:
        TypeError: not a module.
        ValueError: there is nothing to replace, or the model is itself a quantized layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> _ = qk.dequantize_(model)
        >>> model
        Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
        )
    """
    check_model(model, "dequantize_")
    if isinstance(model, QModule):
        raise ValueError(
            f"dequantize_: the model is itself a {type(model).__name__}, which cannot be replaced "
            "in place; use its dequantize()"
        )
    lowered = [name for name, m in model.named_modules() if isinstance(m, Int8Conv)]
    if lowered:
        raise ValueError(
            f"dequantize_: {lowered[0]!r} is a layer of a lowered model, whose graph has taken in "
            "what was around it; keep the float model that it was lowered from"
        )
    steps = steps_back(model)
    wanted = [step for step in steps if step.scheme is not None]
    if not wanted:
        raise ValueError(f"dequantize_: {type(model).__name__} holds no quantized layer")
    unfuse_(model)
    weights: dict[object, nn.Parameter] = {}
    became = {}
    for step in wanted:
        old = model.get_submodule(step.names[0])
        assert isinstance(old, QLinear | QEmbedding | QConvNd)
        # Layers that share a weight but not what is done to x compute with different float ones.
        names = old.input_transforms if isinstance(old, QLinear) else ()
        transforms = [tensor_key(old.get_buffer(name)) for name in names]
        key = (tensor_key(old.packed), old.dtype, old.conv, *transforms)
        new = old.dequantize()
        assert isinstance(new.weight, nn.Parameter)
        new.weight = weights.setdefault(key, new.weight)
        replace_everywhere(model, step.names, old, new)
        became[step.names] = type(new).__name__
    summary = summary_of(f"{type(model).__name__} dequantized", model, steps, became)
    whole_again(model, [step.names[0] for step in wanted])
    settle_parents(model)
    return summary


def quantized_like_float(
    module: nn.Module,
    scheme: Scheme,
    twin: QModule | None = None,
    x_range: Int8Range | None = None,
    optimize: str = "minmax",
) -> QModule:
    """The quantized module for a float one.

    Args:
        module: the float module.
        scheme: how to quantize it.
        twin: a quantized module of the same weight, whose packed weight is to be shared.
        x_range: range of the input, for a static scheme.
        optimize: how its scales are chosen.
    """
    new = quantized_from_shell(module, scheme)
    if twin is None:
        matrix = new.matrix_of(module)
        new.packed = new.packing.parameter(search_scales(matrix, scheme, optimize))
    else:
        new.packed = twin.packed
    give_range(new, x_range)
    return new


def give_range(module: QModule, x_range: Int8Range | None) -> None:
    """Set the scale and zero point of a static layer's input.

    Args:
        module: the quantized layer.
        x_range: what was calibrated, or None for a layer that is not static.
    """
    if x_range is not None:
        has_zero = module.scheme.activation == "asymmetric"
        set_range(module, x_range.scale, x_range.zero_point if has_zero else None)


def _quantized_kind(step: Step) -> str:
    return "QLinear" if step.kind.endswith("Linear") else f"Q{step.kind}"


def ignored_patterns(ignore: str | Sequence[str], op: str = "quantize_") -> tuple[str, ...]:
    """One pattern or several, as the latter.

    Args:
        ignore: what the user gave.
        op: the function that it was given to.

    Raises:
        TypeError: something else.
    """
    several = isinstance(ignore, Iterable) and not isinstance(ignore, str)
    patterns: tuple[Any, ...] = tuple(ignore) if several else (ignore,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{op}: ignore is {ignore!r}; expected patterns of module names, () to ignore none"
        )
    return patterns


def steps_back(
    model: nn.Module, kind: type[QModule | QATModule] = QModule, left: str = "was not quantized"
) -> list[Step]:
    """What becomes of each module when all of one kind are replaced.

    Args:
        model: the model.
        kind: the modules that are replaced.
        left: the note for all others.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_listed(module):
            names.setdefault(id(module), []).append(name)
    seen: set[object] = set()
    steps = []
    for found in names.values():
        module = model.get_submodule(found[0])
        scheme = module.scheme if isinstance(module, kind) else None
        steps.append(
            Step(
                names=tuple(found),
                kind=type(module).__name__,
                scheme=scheme,
                note="" if scheme else left,
                twin=None,
                nbytes=own_bytes(module, seen),
            )
        )
    return steps


def plan_of(
    op: str,
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str],
    *,
    calibration: Calibration | None = None,
) -> list[Step]:
    """Check the arguments that all conversions of a model take, and decide about every module.

    Args:
        op: the function that was called, for messages.
        model: the model to be converted; nothing is changed.
        scheme: one scheme, or schemes by pattern.
        ignore: patterns of modules to leave.
        calibration: ranges for the layers whose scheme is static.

    Raises:
        TypeError: an argument of another type.
        ValueError: what `quantize_` refuses.
    """
    check_model(model, op)
    schemes = schemes_by_pattern(scheme, op)
    patterns = ignored_patterns(ignore, op)
    if isinstance(scheme, Mapping):
        check_patterns(model, schemes, "scheme", op=op)
    if patterns != DEFAULT_IGNORE:
        check_patterns(model, patterns, "ignore", op=op)
    _check_calibration(op, calibration, schemes)
    if type(model) is nn.MultiheadAttention:
        raise ValueError(
            f"{op}: the model is itself a MultiheadAttention, which cannot be replaced in place; "
            "use qkernels.nn.QMultiheadAttention.from_float(model, scheme), or put it into an "
            "nn.ModuleList"
        )
    kind = base_of(model)
    if kind is not None:
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, which cannot be replaced in "
            f"place; use {QUANTIZED[kind].__name__}.from_float(model, scheme), or put it into an "
            "nn.Sequential"
        )
    return make_plan(model, schemes, patterns, op, calibration)


def _check_calibration(op: str, calibration: object, schemes: Mapping[str, Scheme]) -> None:
    if calibration is None:
        return
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"{op}: calibration is {type(calibration).__name__}; expected what "
            "qk.calibrate(model, batches) returns"
        )
    if not any(scheme.static for scheme in schemes.values()):
        raise ValueError(
            f"{op}: calibration is given but no scheme uses it; use a static scheme, "
            "qk.W8A8(static=True), or leave it out"
        )


def input_range(step: Step, old: nn.Module, calibration: Calibration | None) -> Int8Range | None:
    """The calibrated range of a static layer's input, in the scheme's kind.

    Args:
        step: the decision about the layer.
        old: the float layer.
        calibration: that the decision was made with.
    """
    assert step.scheme is not None
    if calibration is None or not needs_range(old, step.scheme):
        return None
    ranges = ranges_of(calibration, step.names)
    assert ranges is not None  # or the plan would have been refused
    kinds = {"symmetric": ranges.input.symmetric, "asymmetric": ranges.input.asymmetric}
    return kinds[step.scheme.activation]


def _told(steps: list[Step], folds: list[Fold]) -> tuple[list[Step], dict[tuple[str, ...], str]]:
    """The steps with what folding has to say about BatchNorms, and what modules became."""
    fold_of = {fold.name: fold for fold in folds}
    told, became = [], {}
    for step in steps:
        fold = fold_of.get(step.names[0])
        if step.scheme is not None:
            became[step.names] = f"{_quantized_kind(step)} {step.scheme}"
        elif fold is not None:
            step = replace(step, note=fold.note if fold.became else f"not folded: {fold.note}")
            if fold.became is not None:
                became[step.names] = fold.became
        told.append(step)
    return told, became


def schemes_by_pattern(
    scheme: Scheme | Mapping[str, Scheme], op: str = "quantize_"
) -> dict[str, Scheme]:
    """One scheme, or schemes by pattern, as the latter.

    Args:
        scheme: what the user gave.
        op: the function that it was given to.

    Raises:
        TypeError: something else.
        ValueError: an empty dict.
    """
    schemes = dict(scheme) if isinstance(scheme, Mapping) else {"*": scheme}
    for pattern, value in schemes.items():
        if not isinstance(pattern, str) or not isinstance(value, Scheme):
            raise TypeError(
                f"{op}: scheme is {scheme!r}; expected a scheme like {_nearest_scheme(value)}, or "
                "a dict from patterns of module names to schemes"
            )
    if not schemes and not isinstance(scheme, PrecisionPlan):  # which may leave all as it is
        raise ValueError(f"{op}: scheme is an empty dict; expected at least one pattern")
    return schemes


def _nearest_scheme(given: object) -> str:
    """What may have been meant by something that is no scheme: its class, or its name."""
    name = given.__name__ if isinstance(given, type) else str(given)
    near = get_close_matches(name.upper(), list(SCHEMES), n=1)
    return f"qk.{near[0] if near else 'W8A8'}()"


def summary_of(
    title: str,
    model: nn.Module,
    steps: list[Step],
    became: Mapping[tuple[str, ...], str],
    quality: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Summary:
    """What became of every module.

    Args:
        title: what was done.
        model: as it is now.
        steps: the decisions, in order.
        became: what modules are now, by their names.
        quality: by first name, SQNR in dB of a layer rounded to nearest and as it is.
        notes: by first name, what happened to a layer on the way.
    """
    seen: set[object] = set()
    rows = []
    for step in steps:
        name = step.names[0]
        module = model.get_submodule(name)
        nearest, now = quality.get(name, (None, None))
        others = ", ".join(step.names[1:])
        also = f"also known as {others}" if others else ""
        rows.append(
            ModuleRow(
                name=name,
                kind=step.kind,
                became=became.get(step.names),
                note="; ".join(part for part in (step.note, notes.get(name, ""), also) if part),
                bytes_before=step.nbytes,
                bytes_after=own_bytes(module, seen),
                sqnr_nearest=nearest,
                sqnr=now,
            )
        )
    return Summary(title, tuple(rows))


@contextmanager
def shown_progress(
    what: str, steps: list[Step], wanted: bool | None
) -> Iterator[Callable[[Step], None]]:
    total = sum(step.nbytes for step in steps)
    if wanted is None:
        wanted = total >= _BYTES_WORTH_A_BAR and sys.stderr.isatty()
    if not wanted:
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def advance(step: Step) -> None:
            bar.update(task, advance=step.nbytes, description=f"{what} {step.names[0]}")

        yield advance
