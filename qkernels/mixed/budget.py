"""What a budget means, and the choice that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qkernels.mixed.assign import TOLERANCE
from qkernels.mixed.quality import SQNR, Quality

if TYPE_CHECKING:
    from qkernels.mixed.plan import Cost, PrecisionPlan

OBJECTIVES = ("latency", "size", "accuracy")
# Which quantity a limit is about.
_ABOUT = {
    "latency": "latency",
    "seconds": "latency",
    "size": "size",
    "bytes": "size",
    SQNR: "accuracy",
    "metric": "accuracy",
}


def check_budget(budget: object, objective: str, measure: str) -> None:
    """Refuse a budget or an objective that means nothing.

    Args:
        budget: what the user gave.
        objective: what is to be best.
        measure: "sqnr", or the name of the user's metric.

    Raises:
        TypeError: not a mapping to numbers.
        ValueError: an unknown key, value or objective, or no limit on what may be given up.
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"search: objective is {objective!r}; expected one of "
            f"{', '.join(map(repr, OBJECTIVES))}: what is to be as good as possible"
        )
    if not isinstance(budget, Mapping):
        raise TypeError(
            f"search: budget is {budget!r}; expected a dict of limits such as "
            '{"latency": 0.6}, {"size": 0.3} (shares of the float model) or {"sqnr": 30} (dB)'
        )
    for key, value in budget.items():
        if key not in _ABOUT:
            raise ValueError(
                f"search: budget names {key!r}; expected {', '.join(map(repr, _ABOUT))}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise TypeError(f"search: budget[{key!r}] is {value!r}; expected a number")
        if value <= 0 and _ABOUT[key] != "accuracy":
            raise ValueError(f"search: budget[{key!r}] is {value!r}; expected more than 0")
    wrong = "metric" if measure == SQNR else SQNR
    if wrong in budget:
        way = "pass metric=" if measure == SQNR else 'use "metric" or leave metric= out'
        raise ValueError(f"search: budget limits {wrong!r}, which is not measured here; {way}")
    if all(_ABOUT[key] == objective for key in budget):
        others = {
            "latency": '{"sqnr": 30} or {"size": 0.3}',
            "size": '{"sqnr": 30} or {"latency": 0.6}',
            "accuracy": '{"latency": 0.6} or {"size": 0.3}',
        }
        raise ValueError(
            f"search: budget is {dict(budget)!r}, which limits nothing but the objective, "
            f"{objective!r}; say what it may cost, such as {others[objective]}"
        )


def limits_of(budget: Mapping[str, float], reference: Cost, measure: Quality) -> dict[str, float]:
    """The largest total of each quantity.

    Args:
        budget: limits as the user gave them.
        reference: the float model.
        measure: what quality is.
    """
    limits: dict[str, float] = {}
    for key, value in budget.items():
        if key == "latency":
            value *= reference.seconds
        elif key == "size":
            value *= reference.bytes
        elif _ABOUT[key] == "accuracy":
            value = measure.damage(value)
        quantity = _ABOUT[key]
        limits[quantity] = min(value, limits.get(quantity, math.inf))
    return limits


def is_kept(limit: float, value: float, slack: float = TOLERANCE) -> bool:
    """Whether a total is within its limit.

    Args:
        limit: the largest total.
        value: the total.
        slack: relative to the limit.
    """
    return value <= limit + slack * abs(limit)


def choose(
    plan: PrecisionPlan, objective: str, budget: Mapping[str, float], limits: Mapping[str, float]
) -> list[int]:
    """The best choice within limits.

    Args:
        plan: holds what every option costs.
        objective: what is to be best.
        budget: the limits as the user gave them, for the message.
        limits: the largest total of each quantity.

    Raises:
        ValueError: nothing keeps the limits; says what comes nearest.
    """
    problem = plan.problem()
    second = "latency" if objective == "accuracy" else "accuracy"
    choice = problem.solve(objective, limits, tie_break=second)
    if choice is not None:
        return choice
    nearest = plan.cost_of(problem.nearest(limits))
    wanted = " and ".join(_limit_text(key, value, plan.measure) for key, value in budget.items())
    raise ValueError(
        f"search: no choice of schemes has {wanted}; the nearest has "
        f"{cost_text(nearest, plan.reference, plan.measure)}. Raise the budget, or offer other "
        "schemes"
    )


def _limit_text(key: str, value: float, measure: Quality) -> str:
    if key in ("latency", "size"):
        return f"{key} ≤ {value:.3g} of the float model's"
    if key in ("seconds", "bytes"):
        return f"at most {value:.6g} {key}"
    return f"{measure.title} {'≤' if measure.lower_is_better else '≥'} {measure.text(value)}"


def cost_text(cost: Cost, reference: Cost, measure: Quality) -> str:
    """What a model costs, in the units of budgets.

    Args:
        cost: the model.
        reference: the float model.
        measure: what quality is.
    """
    return (
        f"latency {cost.seconds / reference.seconds:.3g}, size {cost.bytes / reference.bytes:.3g}, "
        f"{measure.title} {measure.text(cost.quality)}"
    )


def budget_text(budget: Mapping[str, float], measure: Quality) -> str:
    """A budget for people.

    Args:
        budget: limits as the user gave them.
        measure: what quality is.
    """
    return " and ".join(_limit_text(key, value, measure) for key, value in budget.items())
