"""Choose by what layers cost, run what was chosen, and choose again with what that taught."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qkernels.mixed.assign import TOLERANCE
from qkernels.mixed.budget import budget_text, choose, cost_text, is_kept, limits_of
from qkernels.mixed.measure import Answers, Pairs, Stopwatch, uniform_pairs
from qkernels.mixed.plan import Cost, PrecisionPlan
from qkernels.mixed.units import Unit
from qkernels.schemes import Scheme

# Measured latency may exceed a limit by this much: that is how well it can be measured.
LATENCY_SLACK = 0.02
# A model that `quantize_` makes lies elsewhere in memory than what was timed. That alone makes so
# much of a difference.
_PLACE = 0.01
_MAX_TRIES = 6


@dataclass(frozen=True)
class Tried:
    """A choice that was run.

    Args:
        plan: with what it costs as measured.
        slowest: seconds that it may take, for all that was measured; inf if it was not timed.
    """

    plan: PrecisionPlan
    slowest: float


@dataclass(frozen=True)
class Known:
    """A model that was timed with the layers.

    Args:
        scheme: of all layers, None for the float model.
        seconds: for a batch.
    """

    scheme: Scheme | None
    seconds: float


@dataclass
class Chooser:
    """What is needed to try choices.

    Args:
        units: the layers, as those of every plan it is given.
        schemes: every scheme that some unit takes, as those of the plans.
        answers: says how good a choice is.
        watch: says how long it takes.
    """

    units: Sequence[Unit]
    schemes: Sequence[Scheme]
    answers: Answers
    watch: Stopwatch

    def choose(
        self, plan: PrecisionPlan, budget: Mapping[str, float], objective: str
    ) -> PrecisionPlan:
        """The best choice that keeps the budget as measured.

        No scheme for all layers that was measured to keep the limits (`plan.uniform`) is better:
        where one would be, it is what is chosen.

        Args:
            plan: has what all options and all schemes for all layers were measured to cost.
            budget: the limits as the user gave them.
            objective: what is to be best.

        Raises:
            ValueError: nothing keeps the limits.
        """
        plan = replace(plan, correction=1.0)  # what an earlier choice taught is not about this one
        limits = limits_of(budget, plan.reference, plan.measure)
        tried, impossible = self._try(plan, budget, objective, limits)
        uniform = list(self._uniform(plan, budget, objective, limits))
        if impossible is not None and not (tried or uniform):
            raise impossible
        kept = [t for t in tried if _keeps(t.plan, limits, t.slowest)]
        found = uniform
        if kept:
            best = min(kept, key=lambda t: _goal(t.plan, objective))
            found = [self._finished(best, limits), *uniform]
        if found:
            return replace(min(found, key=lambda p: _goal(p, objective)), notes=plan.notes)
        nearest = self._finished(min(tried, key=lambda t: _excess(t.plan, limits)), limits)
        note = (
            f"Measured, the plan misses its budget of {budget_text(budget, plan.measure)}: it has "
            f"{cost_text(nearest.cost, plan.reference, plan.measure)}. No other choice was found "
            "that is predicted to keep it."
        )
        return replace(nearest, notes=(*plan.notes, note))

    def _try(
        self,
        plan: PrecisionPlan,
        budget: Mapping[str, float],
        objective: str,
        limits: Mapping[str, float],
    ) -> tuple[list[Tried], ValueError | None]:
        """Choices by layer, each nearer to the limits than the last; why there are no more.

        Measured, a choice differs from the sum over its layers, and that teaches what to aim at.
        """
        tried: list[Tried] = []
        aim, correction = dict(limits), 1.0
        if "latency" in limits:
            aim["latency"] *= self._sum_over_time(plan, limits["latency"])
        ceiling = math.inf
        for _ in range(_MAX_TRIES):
            if "accuracy" in limits:
                aim["accuracy"] = limits["accuracy"] / correction
            try:
                choice = choose(plan, objective, budget, aim)
            except ValueError as error:
                # Too much at once, perhaps.
                if ceiling == math.inf or (fastest := self._fastest(plan, aim)) >= ceiling:
                    return tried, error
                aim["latency"] = (fastest + ceiling) / 2
                continue
            if any(choice == [layer.chosen for layer in t.plan.layers] for t in tried):
                break
            now = Tried(self._run(plan, choice, budget, objective), math.inf)
            if "latency" in limits:
                now = self._timed(now.plan, limits["latency"])
                limit = limits["latency"]
                missed = not is_kept(limit, now.slowest, LATENCY_SLACK)
                if missed:
                    # Not the same choice again, however little is missing.
                    ceiling = now.plan.predicted.seconds * (1 - 10 * TOLERANCE)
                if missed or now.slowest < limit:
                    aim["latency"] *= limit / now.slowest
                aim["latency"] = min(aim["latency"], ceiling)
            tried.append(now)
            correction = now.plan.correction
        return tried, None

    def _fastest(self, plan: PrecisionPlan, limits: Mapping[str, float]) -> float:
        """The least time that layers add up to under all limits but that on latency."""
        others = {quantity: limit for quantity, limit in limits.items() if quantity != "latency"}
        choice = plan.problem().solve("latency", others)
        return math.inf if choice is None else plan.cost_of(choice).seconds

    def _sum_over_time(self, plan: PrecisionPlan, limit: float) -> float:
        """By how much the sum over layers exceeds the time of the model nearest to a limit."""
        near = self._nearest(plan, limit)
        choice = self._uniform_choice(plan, near.scheme)
        return 1.0 if choice is None else plan.cost_of(choice).seconds / near.seconds

    def _run(
        self,
        plan: PrecisionPlan,
        choice: Sequence[int],
        budget: Mapping[str, float],
        objective: str,
    ) -> PrecisionPlan:
        """A choice with its accuracy as a whole, beside what its layers add up to."""
        chosen = plan.choosing(choice, objective, budget)
        quality = self.answers.quality(self._pairs(chosen))
        return _measured(chosen, replace(chosen.predicted, quality=quality))

    def _finished(self, tried: Tried, limits: Mapping[str, float]) -> PrecisionPlan:
        """With its time, if that was not measured since nothing limits it."""
        return tried.plan if "latency" in limits else self._timed(tried.plan, math.inf).plan

    def _timed(self, plan: PrecisionPlan, limit: float) -> Tried:
        """A choice with its time, taking turns with a model that was timed before.

        With the one nearest to the limit: models of about the same time are told apart best.
        """
        assert plan.measured is not None
        near = self._nearest(plan, plan.predicted.seconds if math.isinf(limit) else limit)
        other = [] if near.scheme is None else uniform_pairs(self.units, near.scheme)
        ratio = self.watch.compare(self._pairs(plan), other)
        measured = replace(plan.measured, seconds=near.seconds * ratio.median)
        return Tried(replace(plan, measured=measured), near.seconds * ratio.high * (1 + _PLACE))

    def _nearest(self, plan: PrecisionPlan, seconds: float) -> Known:
        """The float model, or that with one scheme for all layers, which takes about that time."""
        known = [Known(None, plan.reference.seconds)]
        for scheme, (_, cost) in zip(self.schemes, plan.uniform, strict=True):
            known.append(Known(scheme, cost.seconds))
        return min(known, key=lambda k: abs(math.log(k.seconds / seconds)))

    def _uniform(
        self,
        plan: PrecisionPlan,
        budget: Mapping[str, float],
        objective: str,
        limits: Mapping[str, float],
    ) -> Iterator[PrecisionPlan]:
        """One scheme for all layers, where that was measured to be within the limits."""
        for scheme, (_, cost) in zip(self.schemes, plan.uniform, strict=True):
            choice = self._uniform_choice(plan, scheme)
            if choice is not None:
                found = _measured(plan.choosing(choice, objective, budget), cost)
                if _keeps(found, limits, cost.seconds):
                    yield found

    def _uniform_choice(self, plan: PrecisionPlan, scheme: Scheme | None) -> list[int] | None:
        """The options of a model with one scheme for all layers; None if one is not offered."""
        wanted = [unit.form_of(scheme).scheme for unit in self.units]
        offered = [[option.scheme for option in layer.options] for layer in plan.layers]
        # A layer that has no such form must not stay float if that is not offered.
        if not all(w in some for w, some in zip(wanted, offered, strict=True)):
            return None
        return [some.index(w) for w, some in zip(wanted, offered, strict=True)]

    def _pairs(self, plan: PrecisionPlan) -> Pairs:
        return [
            pair
            for unit, layer in zip(self.units, plan.layers, strict=True)
            for pair in unit.pairs(unit.form_of(layer.choice.scheme))
        ]


def _measured(plan: PrecisionPlan, cost: Cost) -> PrecisionPlan:
    """A plan with what it costs as measured, and how that differs from the sum of its layers."""
    summed, damage = (plan.measure.damage(c.quality) for c in (plan.predicted, cost))
    known = summed > 0 and 0 < damage < math.inf
    return replace(plan, measured=cost, correction=damage / summed if known else 1.0)


def _keeps(plan: PrecisionPlan, limits: Mapping[str, float], seconds: float) -> bool:
    """Whether a plan is within the limits as measured, if it takes so many seconds."""
    slack = {"latency": LATENCY_SLACK, "size": 0.0, "accuracy": TOLERANCE}
    costs = {**_costs(plan), "latency": seconds}
    return not math.isnan(plan.cost.quality) and all(
        is_kept(limit, costs[quantity], slack[quantity]) for quantity, limit in limits.items()
    )


def _excess(plan: PrecisionPlan, limits: Mapping[str, float]) -> float:
    """By how much the worst limit is missed, relative to it."""
    costs = _costs(plan)
    over = [(costs[q] - limit) / (abs(limit) or 1.0) for q, limit in limits.items()]
    return math.inf if math.isnan(plan.cost.quality) else max(over)


def _goal(plan: PrecisionPlan, objective: str) -> tuple[float, float]:
    """What is to be small, and what decides between plans that have as little of it."""
    costs = _costs(plan)
    return costs[objective], costs["latency" if objective == "accuracy" else "accuracy"]


def _costs(plan: PrecisionPlan) -> dict[str, float]:
    """As measured."""
    return {
        "latency": plan.cost.seconds,
        "size": plan.cost.bytes,
        "accuracy": plan.measure.damage(plan.cost.quality),
    }
