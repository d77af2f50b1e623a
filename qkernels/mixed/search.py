"""search: the best scheme for every layer of a model, under a budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.attention import attention_split
from qkernels.calibration import Calibration
from qkernels.mixed.assign import check_solver
from qkernels.mixed.budget import check_budget
from qkernels.mixed.choosing import Chooser
from qkernels.mixed.measure import (
    Answers,
    Metric,
    Stopwatch,
    by_shape,
    time_layers,
    uniform_pairs,
    watching_inputs,
)
from qkernels.mixed.memory import Memory, identity
from qkernels.mixed.plan import Cost, LayerPlan, Option, PrecisionPlan
from qkernels.mixed.quality import SQNR, Quality
from qkernels.mixed.units import Unit, find_units
from qkernels.nn.fastpath import plain_transformer_paths
from qkernels.optimize import check_optimizer
from qkernels.plan import check_model, check_patterns
from qkernels.quantize import DEFAULT_IGNORE, ignored_patterns
from qkernels.report.files import check_folder
from qkernels.report.machine import machine_facts
from qkernels.report.modules import is_compiled
from qkernels.report.outputs import Caller, evaluating, shape_text
from qkernels.report.size import model_bytes
from qkernels.schemes import W4A8, W4A16, W8A8, W8A16, Scheme

DEFAULT_SCHEMES: tuple[Scheme, ...] = (
    W8A8(),
    W8A8(activation="asymmetric"),
    W8A16(),
    W4A8(group_size=32),
    W4A16(group_size=32),
)


@torch.inference_mode(False)  # what is made must be usable outside of it
@torch.no_grad()
def search(
    model: nn.Module,
    batches: Iterable[Any],
    budget: Mapping[str, float],
    objective: str = "latency",
    schemes: Sequence[Scheme] = DEFAULT_SCHEMES,
    *,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    keep_float: bool = True,
    metric: Metric | None = None,
    lower_is_better: bool = False,
    optimize: str = "minmax",
    calibration: Calibration | None = None,
    latency_batches: Iterable[Any] | None = None,
    latency_seconds: float = 10.0,
    checkpoint: str | os.PathLike[str] | None = None,
    measured: PrecisionPlan | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> PrecisionPlan:
    """Choose a scheme for every layer: least latency or size, or most accuracy, within a budget.

    Every layer is tried with every scheme while all others stay float, on all batches: that gives
    the damage it does to the model's output. Every layer is timed with every scheme inside the
    model, so on this machine, with inputs of the shapes that the batches have. Its size is known.
    Damages are taken to add up; the best choice is then an integer program, solved exactly (scipy).
    The chosen model is run: where it differs from what was predicted, the prediction is corrected
    and the choice made again, until it keeps the budget as measured. What is returned is no worse
    than any one scheme for all layers that was measured to keep the budget. The model is not
    changed.

    Args:
        model: float model on the CPU, not compiled.
        batches: tensors, tuples or lists (positional arguments) or mappings (keyword arguments). A
            hundred typical inputs or so. They are kept, and the outputs that are compared, too.
        budget: limits on the whole model; at least one on something else than the objective.
            "latency" and "size": at most this share of the float model's; "seconds" for a batch and
            "bytes": at most; "sqnr": dB of the output at least (see `qk.compare`); "metric": at
            least, or at most if `lower_is_better`.
        objective: what is to be as good as possible: "latency", "size" or "accuracy".
        schemes: to choose from. What does not fit a layer is no choice for it.
        ignore: patterns of modules that stay float, as for `quantize_`.
        keep_float: whether a layer may also stay as it is, in bfloat16, float16 or float32.
        metric: `metric(output, batch) -> float`, as for `qk.compare`, to measure accuracy by
            instead of SQNR: something smooth, such as a loss, which shows single layers.
        lower_is_better: whether the metric is a loss.
        optimize: how scales are chosen, see `quantize_`, which takes it from the plan.
        calibration: what `qk.calibrate` returned; static schemes need it.
        latency_batches: what to time, by default `batches`; of each shape one is timed.
        latency_seconds: seconds to spend on timing, first for all schemes and then for every choice
            that is tried; six at most.
        checkpoint: a file to keep what was measured in. After an interruption the same call goes
            on from there.
        measured: what an earlier search of the same model, batches and schemes returned. Its layers
            are not measured again, only what is chosen: so another budget takes seconds.
        call: `call(model, batch)` for models that are called in another way.
        progress: show a progress bar; by default on a terminal.

    Returns:
        The plan: print it, `plot` it, `save_json` it, give it to `quantize_`.

    Raises:
        TypeError: an argument of another type, or a batch that the model cannot be called with.
        ValueError: an unknown objective or limit, nothing to choose, no batches, or a budget that
            no choice keeps; says what comes nearest.
        ImportError: scipy is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> plan = qk.search(model, batches, {"size": 0.3}, "accuracy", latency_seconds=0.1)
        >>> summary = qk.quantize_(model, plan)
        >>> summary.bytes_after <= 0.3 * summary.bytes_before
        True
    """
    name = SQNR if metric is None else getattr(metric, "__name__", "metric")
    check_budget(budget, objective, SQNR if metric is None else "metric")
    offered = _check(model, schemes, calibration, optimize)
    data = _listed(batches, "batches")
    timed = data if latency_batches is None else _listed(latency_batches, "latency_batches")
    patterns = ignored_patterns(ignore, "search")
    if checkpoint is not None:
        check_folder(checkpoint)
    check_solver()
    with ExitStack() as stack:
        stack.enter_context(attention_split(model))
        if patterns != DEFAULT_IGNORE:
            check_patterns(model, patterns, "ignore", op="search")
        stack.enter_context(evaluating(model))
        stack.enter_context(plain_transformer_paths())
        units, notes = find_units(model, offered, patterns, optimize, calibration)
        caller = Caller(model, call, op="search")
        units, unseen = _called(units, caller, data, timed)
        notes += unseen
        answers = Answers(caller, data, metric, lower_is_better, name)
        settings = [repr(offered), repr(patterns), optimize, name, repr(calibration)]
        memory = Memory(checkpoint, lambda: identity(model, settings, data))
        watch = Stopwatch(caller, *by_shape(timed), latency_seconds)
        if measured is None:
            total = sum(len(unit.forms) - 1 for unit in units)
            advance = stack.enter_context(_progress(progress, total))
            damages = _damages(units, answers, memory, advance)
            advance("timing", 0)
            measured = _measured_options(
                model, units, offered, answers, watch, damages,
                keep_float=keep_float, optimize=optimize,
            )  # fmt: skip
        else:
            _check_measured(measured, units, offered, answers.measure, keep_float, optimize)
        chooser = Chooser(units, offered, answers, watch)
        return chooser.choose(replace(measured, notes=tuple(notes)), budget, objective)


def _measured_options(
    model: nn.Module,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    answers: Answers,
    watch: Stopwatch,
    damages: Sequence[Sequence[float]],
    *,
    keep_float: bool,
    optimize: str,
) -> PrecisionPlan:
    """Everything but a choice: the plan that takes the first option everywhere."""
    times = time_layers(watch, units, schemes)
    layers = []
    for unit, seconds, row in zip(units, times.layers, damages, strict=True):
        options = [
            Option(form.scheme, s, form.bytes, d)
            for form, s, d in zip(unit.forms, seconds, row, strict=True)
        ]
        if not keep_float:
            options = options[1:]
        layers.append(LayerPlan(unit.names, unit.kind, unit.dtype, tuple(options), 0))
    size = model_bytes(model)
    rest = size - sum(unit.forms[0].bytes for unit in units)
    reference = Cost(times.models["float"], size, answers.measure.reference)
    uniform = []
    for scheme in schemes:
        size = rest + sum(unit.form_of(scheme).bytes for unit in units)
        quality = answers.quality(uniform_pairs(units, scheme))
        uniform.append((repr(scheme), Cost(times.models[repr(scheme)], size, quality)))
    return PrecisionPlan(
        model=type(model).__name__,
        objective="",
        budget={},
        optimize=optimize,
        measure=answers.measure,
        layers=tuple(layers),
        rest_seconds=times.rest,
        rest_bytes=rest,
        reference=reference,
        uniform=tuple(uniform),
        predicted=reference,
        measured=None,
        correction=1.0,
        batch="; ".join(map(shape_text, watch.batches[:3])),
        machine=machine_facts(),
        notes=(),
    )


def _damages(
    units: Sequence[Unit],
    answers: Answers,
    memory: Memory,
    advance: Callable[[str, int], None],
) -> list[list[float]]:
    """The damage of every form of every unit, all others being float."""
    found: list[list[float]] = []
    for unit in units:
        known = memory.damages.setdefault(unit.names[0], {})
        row = [0.0]
        for form in unit.forms[1:]:
            advance(unit.names[0], 0)
            key = repr(form.scheme)
            if key not in known:
                known[key] = answers.damage(unit.pairs(form))
                memory.save()
            row.append(known[key])
            advance(unit.names[0], 1)
        found.append(row)
    return found


def _called(
    units: list[Unit], caller: Caller, data: Sequence[Any], timed: Sequence[Any]
) -> tuple[list[Unit], list[str]]:
    """The units that a batch reaches, and a sentence about the others."""
    seen: set[str] = set()
    modules = {n: m for u in units for n, m in zip(u.names, u.modules, strict=True)}
    with watching_inputs(modules, lambda name, _: seen.add(name)):
        for batch in data:
            caller(batch)
    reached = [unit for unit in units if seen.intersection(unit.names)]
    lost = [unit.names[0] for unit in units if not seen.intersection(unit.names)]
    if not reached:
        raise ValueError(
            "search: no layer that could be quantized ran on the batches, so there is nothing to "
            "choose; pass batches that reach them, or call="
        )
    some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    return reached, [f"No batch reaches {some}: left as they are."] if lost else []


def _check(
    model: object, schemes: object, calibration: Calibration | None, optimize: str
) -> tuple[Scheme, ...]:
    check_model(model, "search")
    check_optimizer("search", optimize)
    assert isinstance(model, nn.Module)
    if is_compiled(model):
        raise ValueError(
            "search: the model is compiled, so its layers cannot be tried one by one; search the "
            "model that was given to torch.compile"
        )
    offered = tuple(schemes) if isinstance(schemes, Iterable) else (schemes,)
    if not offered or not all(isinstance(scheme, Scheme) for scheme in offered):
        raise TypeError(
            f"search: schemes is {schemes!r}; expected schemes such as [qk.W8A8(), qk.W4A8()]"
        )
    static = [scheme for scheme in offered if scheme.static]
    if static and calibration is None:
        raise ValueError(
            f"search: {static[0]} needs ranges of the layers' inputs; pass "
            "calibration=qk.calibrate(model, batches), or leave it out of schemes"
        )
    return tuple(dict.fromkeys(offered))


def _check_measured(
    plan: object,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    measure: Quality,
    keep_float: bool,
    optimize: str,
) -> None:
    """Refuse measurements of something else than is searched now."""
    if not isinstance(plan, PrecisionPlan):
        raise TypeError(
            f"search: measured is {type(plan).__name__}; expected the plan of an earlier search"
        )
    forms = [(u.names, [f.scheme for f in u.forms[0 if keep_float else 1 :]]) for u in units]
    had = [(layer.names, [option.scheme for option in layer.options]) for layer in plan.layers]
    uniform = [name for name, _ in plan.uniform]
    if (had, uniform, plan.measure, plan.optimize) != (
        forms, list(map(repr, schemes)), measure, optimize,
    ):  # fmt: skip
        raise ValueError(
            "search: measured is the plan of a search with another model or other schemes, metric "
            "or settings; search without measured="
        )


def _listed(batches: Iterable[Any], argument: str) -> list[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"search: {argument} must be an iterable of batches, got one "
            f"{type(batches).__name__}; pass [batch]"
        )
    data = list(batches)
    if not data:
        raise ValueError(f"search: {argument} is empty; pass at least one batch")
    return data


@contextmanager
def _progress(wanted: bool | None, total: int) -> Iterator[Callable[[str, int], None]]:
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda _what, _steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Searching", total=total)
        yield lambda what, steps: bar.update(task, advance=steps, description=f"Searching: {what}")
