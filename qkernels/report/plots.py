"""The plots of a report as SVG text that takes its ink colour from the page around it."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from typing import Any

from qkernels.report import words
from qkernels.report.report import Layer, Report
from qkernels.summary import size_text

MODEL, REFERENCE, OWN = "#2f7ed8", "#98a2b3", "#e8833a"
# Drawn as this colour, then renamed to currentColor, so that text and axes follow the page's theme.
_INK = "#010203"
_ROW_INCHES = 0.19
_MOST_BARS = 24  # more bars than this are no picture any more
_NAMED_ROWS = 80  # beyond this many layers only some get their name on the axis


def available() -> bool:
    """Whether matplotlib is installed (`pip install qkernels[plot]`)."""
    return importlib.util.find_spec("matplotlib") is not None


def layer_sqnr(report: Report) -> str | None:
    """SQNR of every layer that was measured, in the order of execution from top to bottom."""
    layers = [layer for layer in report.layers if layer.sqnr_db is not None]
    if not layers:
        return None
    with _style():
        figure, axes = _figure(height=0.9 + _ROW_INCHES * len(layers))
        measured = [v for layer in layers for v in (layer.sqnr_db, layer.own_sqnr_db)]
        finite = [v for v in measured if v is not None and math.isfinite(v)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
        # Identical outputs have an infinite SQNR; they get a place of their own at the right.
        edge = high + 0.08 * max(high - low, 5.0)
        rows = range(len(layers))
        inside = [_place(layer.sqnr_db, edge) for layer in layers]
        axes.plot(inside, rows, "-o", color=MODEL, markersize=4, label="in the model")
        own = [(_place(x.own_sqnr_db, edge), row) for row, x in zip(rows, layers, strict=True)]
        if any(x.own_sqnr_db is not None for x in layers):
            xs, ys = zip(*own, strict=True)
            axes.plot(xs, ys, "D", color=OWN, markersize=4, label="the layer alone")
        identical = [i for i, layer in enumerate(layers) if layer.sqnr_db == math.inf]
        if identical:
            axes.plot(
                [edge] * len(identical), identical, "o", color=MODEL, markerfacecolor="none",
                markersize=8, label="identical",
            )  # fmt: skip
        step = math.ceil(len(layers) / _NAMED_ROWS)
        axes.set_yticks(list(rows)[::step], [_short(x) for x in layers[::step]])
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlabel("SQNR in dB (higher is better)")
        axes.grid(axis="x", alpha=0.25)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
        return _svg(figure, "SQNR of each layer in the order of execution")


def sizes(report: Report) -> str:
    """Bytes before and after: layers that are quantized now, and everything else."""
    quantized = [layer for layer in report.layers if layer.quantized]
    parts = [
        (report.reference, report.reference_bytes, sum(x.reference_bytes for x in quantized)),
        (report.model, report.bytes, sum(x.bytes for x in quantized)),
    ]
    with _style():
        figure, axes = _figure(height=1.5)
        for row, (_, total, inside) in enumerate(parts):
            rest = total - inside
            labels = ("layers that are quantized", "everything else") if row == 0 else (None, None)
            axes.barh(row, inside, color=MODEL, height=0.6, label=labels[0])
            axes.barh(row, rest, left=inside, color=REFERENCE, height=0.6, label=labels[1])
            axes.annotate(size_text(total), (total, row), (4, 0), va="center",
                          textcoords="offset points")  # fmt: skip
        axes.set_xticks([])  # every bar says what it is
        _finish_bars(axes, [_literal(name) for name, _, _ in parts])
        if quantized:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        return _svg(figure, "Bytes of both models")


def latency(report: Report) -> str | None:
    """Median latency of both models with the middle half of the samples as a whisker."""
    if report.latency is None:
        return None
    bars = [
        (report.reference, report.latency.reference, REFERENCE),
        (report.model, report.latency.model, MODEL),
    ]
    with _style():
        figure, axes = _figure(height=1.3)
        for row, (_, timing, colour) in enumerate(bars):
            median, low, high = timing.median, timing.quantile(0.25), timing.quantile(0.75)
            axes.barh(row, median, color=colour, height=0.6)
            axes.errorbar(median, row, xerr=[[median - low], [high - median]], color=_INK,
                          capsize=3, linewidth=1)  # fmt: skip
            axes.annotate(words.seconds(timing.median), (high, row), (6, 0), va="center",
                          textcoords="offset points")  # fmt: skip
        axes.xaxis.set_major_formatter(lambda value, _: words.seconds(value))
        axes.set_xlabel("median, and the middle half of the samples")
        _finish_bars(axes, [_literal(name) for name, _, _ in bars])
        return _svg(figure, "Latency of both models")


def error_shares(report: Report) -> str | None:
    """The layers that add most to the error of the output."""
    measured = [layer for layer in report.layers if layer.share is not None]
    layers = sorted(measured, key=lambda layer: -(layer.share or 0))[:_MOST_BARS]
    if not layers:
        return None
    with _style():
        figure, axes = _figure(height=0.9 + _ROW_INCHES * len(layers))
        axes.barh(range(len(layers)), [100 * (x.share or 0) for x in layers], color=OWN)
        axes.set_xlabel("share of the output's error in %, every layer quantized alone")
        _finish_bars(axes, [_short(layer) for layer in layers])
        return _svg(figure, "What each layer adds to the error")


def layer_times(report: Report) -> str | None:
    """The layers that take most time, before and now."""
    timed = [
        (layer, layer.reference_seconds, layer.seconds)
        for layer in report.layers
        if layer.seconds is not None and layer.reference_seconds is not None
    ]
    timed = sorted(timed, key=lambda row: -row[1])[:_MOST_BARS]
    if not timed:
        return None
    with _style():
        figure, axes = _figure(height=1.0 + 1.6 * _ROW_INCHES * len(timed))
        rows = range(len(timed))
        for side, offset, label, colour in (
            (1, -0.2, report.reference, REFERENCE),
            (2, 0.2, report.model, MODEL),
        ):
            places, widths = [row + offset for row in rows], [row[side] for row in timed]
            axes.barh(places, widths, height=0.36, color=colour, label=_literal(label))
        axes.xaxis.set_major_formatter(lambda value, _: words.seconds(value))
        _finish_bars(axes, [_short(layer) for layer, _, _ in timed])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        return _svg(figure, "Time of each layer")


def front(report: Report) -> str | None:
    """Accuracy over latency and over size, as the plan's search found them."""
    if report.plan is None:
        return None
    from matplotlib.figure import Figure

    from qkernels.mixed.plot import draw_front

    with _style():
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        draw_front(report.plan, figure)
        return _svg(figure, "Pareto fronts")


def _finish_bars(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.25)


def _place(value: float | None, edge: float) -> float:
    """Where a value is drawn: inf at the edge; no value and -inf nowhere."""
    if value == math.inf:
        return edge
    return value if value is not None and math.isfinite(value) else math.nan


def _short(layer: Layer, limit: int = 46) -> str:
    name = layer.name
    return _literal(name if len(name) <= limit else f"…{name[-limit + 1 :]}")


def _literal(text: str) -> str:
    """Text in which matplotlib sees no math markup."""
    return text.replace("$", r"\$")


def _style() -> Any:
    import matplotlib

    settings: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    )
    return matplotlib.rc_context(
        settings
        | {
            "svg.fonttype": "none",
            "svg.hashsalt": "qkernels",
            "lines.linewidth": 1.2,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
        }
    )


def _figure(height: float) -> tuple[Any, Any]:
    # The object interface: pyplot would keep figures and choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, description: str) -> str:
    """The figure as an <svg> element that fits into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Nothing of matplotlib's RDF block is for readers, and it names its web site.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
