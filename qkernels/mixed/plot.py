"""The Pareto fronts of a precision plan."""

from __future__ import annotations

import math
import os
import secrets
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkernels.report.files import check_folder

if TYPE_CHECKING:
    from qkernels.mixed.plan import Cost, PrecisionPlan

FRONT, UNIFORM, PLAN = "#2f7ed8", "#98a2b3", "#e8833a"
_AXES = (
    ("latency", "latency, share of the float model's"),
    ("size", "size, share of the float model's"),
)


def save_front(plan: PrecisionPlan, path: str | PathLike[str]) -> None:
    """Draw the fronts into a file, which is replaced in one step or not at all.

    Args:
        plan: what `search` returned.
        path: its suffix says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot: matplotlib is not installed; `pip install qkernels[plot]` brings it"
        ) from None
    target = Path(path)
    check_folder(target)
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    draw_front(plan, figure)
    beside = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        figure.savefig(beside, dpi=130)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def draw_front(plan: PrecisionPlan, figure: Any) -> None:
    """Two plots side by side: quality over latency, and over size.

    Args:
        plan: what `search` returned.
        figure: a matplotlib figure.
    """
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (quantity, label) in zip((left, right), _AXES, strict=True):
        _draw(axes, plan, quantity)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    left.set_ylabel(f"{plan.measure.title}{' in dB' if plan.measure.title == 'SQNR' else ''}")
    if plan.measure.lower_is_better:
        left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def _draw(axes: Any, plan: PrecisionPlan, quantity: str) -> None:
    def x_of(cost: Cost) -> float:
        if quantity == "latency":
            return cost.seconds / plan.reference.seconds
        return cost.bytes / plan.reference.bytes

    front = [(x_of(cost), cost.quality) for cost in plan.front(quantity)]
    known = [point for point in front if math.isfinite(point[1])]
    axes.plot(
        *zip(*known, strict=True), "-o", color=FRONT, markersize=3, label="best choice by layer"
    )
    for i, (name, cost) in enumerate(plan.uniform):
        if math.isfinite(cost.quality):
            point = (x_of(cost), cost.quality)
            axes.plot(*point, "s", color=UNIFORM, label=None if i else "one scheme for all layers")
            axes.annotate(name.replace("$", r"\$"), point, (4, -9), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    cost = plan.cost
    if math.isfinite(cost.quality):
        label = "this plan, " + ("measured" if plan.measured else "predicted")
        axes.plot(x_of(cost), cost.quality, "*", color=PLAN, markersize=12, label=label)
