"""A precision plan in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qkernels.mixed.budget import budget_text
from qkernels.report import words
from qkernels.summary import size_text

if TYPE_CHECKING:
    from qkernels.mixed.plan import Cost, PrecisionPlan

_GOALS = {"latency": "least latency", "size": "least size", "accuracy": "most accuracy"}


def renderable(plan: PrecisionPlan) -> RenderableType:
    """Layers, totals and notes as something that rich prints.

    Args:
        plan: what `search` returned.
    """
    notes = [Text(f"· {note}") for note in plan.notes]
    machine = ", ".join(f"{key} {value}" for key, value in plan.machine.items())
    return Group(
        _layers(plan), "", totals(plan), *notes, Text(f"{plan.batch}; {machine}", style="dim")
    )


def _layers(plan: PrecisionPlan) -> Table:
    title = f"{plan.model}: {_GOALS[plan.objective]} with {budget_text(plan.budget, plan.measure)}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("scheme")
    for heading in ("time", "bytes", f"{plan.measure.title} alone", "of the damage"):
        table.add_column(heading, justify="right")
    damages = [layer.choice.damage for layer in plan.layers]
    for layer in plan.layers:
        option = layer.choice
        table.add_row(
            escape(" = ".join(layer.names)),
            escape(layer.kind),
            escape(layer.label(option)),
            words.seconds(option.seconds),
            size_text(option.bytes),
            plan.measure.text(plan.measure.value(option.damage)),
            words.percent(option.damage / sum(damages)) if sum(damages) else "–",
            style="dim" if option.scheme is None else None,
        )
    return table


def totals(plan: PrecisionPlan) -> Table:
    """The whole model as it is, with one scheme for all layers, and as planned.

    Args:
        plan: what `search` returned.
    """
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("whole model")
    for heading in ("latency", "", "size", "", plan.measure.title):
        table.add_column(heading, justify="right")
    for name, cost in rows_of(plan):
        table.add_row(
            escape(name),
            words.seconds(cost.seconds),
            words.percent(cost.seconds / plan.reference.seconds),
            size_text(cost.bytes),
            words.percent(cost.bytes / plan.reference.bytes),
            plan.measure.text(cost.quality),
            style="bold" if name.startswith("the plan") else None,
        )
    return table


def rows_of(plan: PrecisionPlan) -> list[tuple[str, Cost]]:
    """Whole models and what they cost: as it is, with one scheme for all layers, as planned.

    Args:
        plan: what `search` returned.
    """
    rows = [("as it is", plan.reference), *plan.uniform, ("the plan, predicted", plan.predicted)]
    return rows if plan.measured is None else [*rows, ("the plan, measured", plan.measured)]
