"""search: the best scheme for every layer of a model, under a budget."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.attention import attention_split
from qkernels.calibration import Calibration
from qkernels.mixed.assign import check_solver
from qkernels.mixed.budget import (
    budget_text,
    check_budget,
    choose,
    cost_text,
    is_kept,
    limits_of,
)
from qkernels.mixed.measure import (
    Answers,
    Metric,
    Pairs,
    Stopwatch,
    by_shape,
    time_layers,
    uniform_pairs,
    watching_inputs,
)
from qkernels.mixed.memory import Memory, identity
from qkernels.mixed.plan import Cost, LayerPlan, Option, PrecisionPlan
from qkernels.mixed.quality import SQNR
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
# Measured latency may exceed a limit by this much: that is how well it can be measured.
LATENCY_SLACK = 0.02
_MAX_TRIES = 6


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
    call: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> PrecisionPlan:
    """Choose a scheme for every layer: least latency or size, or most accuracy, within a budget.

    Every layer is tried with every scheme while all others stay float, on all batches: that gives
    the damage it does to the model's output. Every layer is timed with every scheme inside the
    model, so on this machine, with inputs of the shapes that the batches have. Its size is known.
    Damages are taken to add up; the best choice is then an integer program, solved exactly (scipy).
    The chosen model is run: where it differs from what was predicted, the prediction is corrected
    and the choice made again, until it keeps the budget as measured. The model is not changed.

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
        latency_seconds: seconds to spend on timing, first for all schemes and then for the plan.
        checkpoint: a file to keep what was measured in. After an interruption the same call goes
            on from there.
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
        total = sum(len(unit.forms) - 1 for unit in units)
        advance = stack.enter_context(_progress(progress, total))
        damages = _damages(units, answers, memory, advance)
        advance("timing", 0)
        watch = Stopwatch(caller, *by_shape(timed), latency_seconds)
        job = _Search(model, units, answers, watch, damages, keep_float, offered)
        plan = job.measured_options(optimize, notes)
        return job.choose(plan, budget, objective)


@dataclass
class _Search:
    """What is needed to try choices."""

    model: nn.Module
    units: list[Unit]
    answers: Answers
    watch: Stopwatch
    damages: list[list[float]]
    keep_float: bool
    schemes: tuple[Scheme, ...]

    def measured_options(self, optimize: str, notes: list[str]) -> PrecisionPlan:
        """Everything but a choice: the plan that takes the first option everywhere."""
        units, measure = self.units, self.answers.measure
        times = time_layers(self.watch, units, self.schemes)
        layers = []
        for unit, seconds, damages in zip(units, times.layers, self.damages, strict=True):
            options = [
                Option(form.scheme, s, form.bytes, d)
                for form, s, d in zip(unit.forms, seconds, damages, strict=True)
            ]
            if not self.keep_float:
                options = options[1:]
            layers.append(LayerPlan(unit.names, unit.kind, unit.dtype, tuple(options), 0))
        size = model_bytes(self.model)
        rest = size - sum(unit.forms[0].bytes for unit in units)
        reference = Cost(times.models["float"], size, measure.reference)
        uniform = []
        for scheme in self.schemes:
            size = rest + sum(unit.form_of(scheme).bytes for unit in units)
            quality = self.answers.quality(uniform_pairs(units, scheme))
            uniform.append((repr(scheme), Cost(times.models[repr(scheme)], size, quality)))
        return PrecisionPlan(
            model=type(self.model).__name__,
            objective="",
            budget={},
            optimize=optimize,
            measure=measure,
            layers=tuple(layers),
            rest_seconds=times.rest,
            rest_bytes=rest,
            reference=reference,
            uniform=tuple(uniform),
            predicted=reference,
            measured=None,
            correction=1.0,
            batch="; ".join(map(shape_text, self.watch.batches[:3])),
            machine=machine_facts(),
            notes=tuple(notes),
        )

    def choose(
        self, plan: PrecisionPlan, budget: Mapping[str, float], objective: str
    ) -> PrecisionPlan:
        """Choose, run what was chosen, and choose again with what that taught."""
        limits = limits_of(budget, plan.reference, plan.measure)
        scale = {"latency": 1.0, "accuracy": 1.0}
        kept: list[PrecisionPlan] = []
        tried: list[PrecisionPlan] = []
        impossible: ValueError | None = None
        for _ in range(_MAX_TRIES):
            now = {q: limit / scale.get(q, 1.0) for q, limit in limits.items()}
            corrected = replace(plan, correction=scale["accuracy"])
            try:
                choice = choose(corrected, objective, budget, now)
            except ValueError as error:
                impossible = error
                break
            if any(choice == [x.chosen for x in t.layers] for t in tried):
                break
            found = self._run(plan, corrected.choosing(choice, objective, budget))
            if "latency" in limits:
                found = self._timed(found)
            tried.append(found)
            assert found.measured is not None
            if self._keeps(found, limits):
                kept.append(found)
            elif "latency" in limits:
                over = found.measured.seconds / limits["latency"]
                scale["latency"] *= max(over, 1.0)
            scale["accuracy"] = found.correction
        uniform = self._uniform(plan, objective, budget, limits, tried)
        kept += [found for found in uniform if self._keeps(found, limits)]
        if impossible is not None and not (kept or tried):
            raise impossible
        best = min(kept or tried, key=lambda p: _measured_objective(p, objective))
        if "latency" not in limits:
            best = self._timed(best)
        notes = list(plan.notes)
        assert best.measured is not None
        if not kept:
            says = cost_text(best.measured, plan.reference, plan.measure)
            wanted = budget_text(budget, plan.measure)
            notes.append(
                f"Measured, the plan misses its budget of {wanted}: it has {says}. No other "
                f"choice was found that is predicted to keep it."
            )
        return replace(best, notes=(*notes, *best.notes))

    def _uniform(
        self,
        plan: PrecisionPlan,
        objective: str,
        budget: Mapping[str, float],
        limits: Mapping[str, float],
        tried: Sequence[PrecisionPlan],
    ) -> Iterator[PrecisionPlan]:
        """One scheme for all layers, where that was measured to be within the limits.

        Sums over layers miss a model's time by some percent, so a scheme that just keeps a limit
        may be predicted to exceed it.
        """
        slack = 1 + 2 * LATENCY_SLACK  # it is timed again
        for scheme, (_, cost) in zip(self.schemes, plan.uniform, strict=True):
            if cost.seconds > slack * limits.get("latency", math.inf):
                continue
            if cost.bytes > limits.get("size", math.inf):
                continue
            wanted = [unit.form_of(scheme).scheme for unit in self.units]
            offered = [[o.scheme for o in layer.options] for layer in plan.layers]
            if not all(w in some for w, some in zip(wanted, offered, strict=True)):
                continue  # a layer that has no such form must not stay float
            choice = [some.index(w) for w, some in zip(wanted, offered, strict=True)]
            if all(choice != [x.chosen for x in t.layers] for t in tried):
                found = self._run(plan, plan.choosing(choice, objective, budget))
                yield self._timed(found) if "latency" in limits else found

    def _pairs(self, plan: PrecisionPlan) -> Pairs:
        return [
            pair
            for unit, layer in zip(self.units, plan.layers, strict=True)
            for pair in unit.pairs(unit.form_of(layer.choice.scheme))
        ]

    def _run(self, plan: PrecisionPlan, chosen: PrecisionPlan) -> PrecisionPlan:
        """A choice with its accuracy as a whole, beside what its layers add up to."""
        predicted = plan.cost_of([layer.chosen for layer in chosen.layers])
        quality = self.answers.quality(self._pairs(chosen))
        summed, damage = map(plan.measure.damage, (predicted.quality, quality))
        known = summed > 0 and 0 < damage < math.inf
        return replace(
            chosen,
            predicted=predicted,
            measured=replace(predicted, quality=quality),
            correction=damage / summed if known else chosen.correction,
        )

    def _timed(self, plan: PrecisionPlan) -> PrecisionPlan:
        assert plan.measured is not None
        times = self.watch.models({"float": [], "plan": self._pairs(plan)})
        # The machine may have become slower or faster since the float model was timed.
        seconds = plan.reference.seconds * times["plan"] / times["float"]
        return replace(plan, measured=replace(plan.measured, seconds=seconds))

    def _keeps(self, plan: PrecisionPlan, limits: Mapping[str, float]) -> bool:
        assert plan.measured is not None
        if math.isnan(plan.measured.quality):
            return False
        costs = {
            "latency": (plan.measured.seconds, LATENCY_SLACK),
            "size": (plan.measured.bytes, 0.0),
            "accuracy": (plan.measure.damage(plan.measured.quality), 1e-6),
        }
        return all(is_kept(limit, *costs[quantity]) for quantity, limit in limits.items())


def _measured_objective(plan: PrecisionPlan, objective: str) -> float:
    assert plan.measured is not None
    if objective == "size":
        return plan.measured.bytes
    if objective == "accuracy":
        return plan.measure.damage(plan.measured.quality)
    return plan.predicted.seconds  # a sum of many medians is steadier than one


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
