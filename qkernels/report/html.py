"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from string import Template

from qkernels.mixed.text import rows_of
from qkernels.report import plots, words
from qkernels.report.advice import error_start_text
from qkernels.report.report import Layer, Report
from qkernels.report.text import LAYER_WORDS, explanation, summary_rows
from qkernels.summary import size_text

_WORST = 3  # that many of the lowest own SQNRs are marked


def render(report: Report) -> str:
    """The whole page: verdict, key numbers as tiles, plots, tables.

    Args:
        report: what `compare` returned.
    """
    page = Template(resources.files("qkernels.report").joinpath("page.html").read_text("utf-8"))
    return page.substitute(
        title=escape(f"{report.model} against {report.reference}"),
        verdict=escape(report.verdict),
        tone="bad" if report.nonfinite > report.nonfinite_reference else "good",
        tiles="\n".join(_tiles(report)),
        plots=_plots(report),
        summary=_summary(report),
        layers=_layers(report),
        notes=_list("Notes", report.notes),
        advice=_list("What to do", report.advice),
        search=_search(report),
        machine=escape(" · ".join(f"{key} {value}" for key, value in report.machine.items())),
    )


def _tiles(report: Report) -> list[str]:
    tiles = [
        _tile(
            words.times(report.compression),
            "smaller" if report.compression >= 1 else "the size, as a fraction",
            f"{size_text(report.reference_bytes)} → {size_text(report.bytes)}",
        )
    ]
    if report.latency is not None:
        latency = report.latency
        tiles.append(
            _tile(
                words.times(latency.speedup),
                "the speed",
                f"{words.seconds(latency.reference.median)} → "
                f"{words.seconds(latency.model.median)}",
            )
        )
    if report.metric is not None:
        tiles.append(
            _tile(
                words.number(report.metric.model),
                report.metric.name,
                f"{report.reference}: {words.number(report.metric.reference)}",
            )
        )
    if report.agreement is not None:
        tiles.append(
            _tile(
                words.percent(report.agreement),
                "same prediction",
                f"{report.predictions} predictions",
            )
        )
    tiles.append(
        _tile(
            words.cosine(report.cosine_mean),
            "cosine",
            f"lowest {words.cosine(report.cosine_min)}",
        )
    )
    tiles.append(
        _tile(
            words.decibel(report.sqnr_db),
            "SQNR",
            f"largest error {words.number(report.max_abs_error)}",
        )
    )
    return tiles


def _tile(value: str, label: str, remark: str) -> str:
    return (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f"<small>{escape(remark)}</small></div>"
    )


def _plots(report: Report) -> str:
    if not plots.available():
        return (
            '<p class="hint">This page has no plots, because matplotlib is not installed: '
            "<code>pip install qkernels[plot]</code> and save it again.</p>"
        )
    drawings = [
        ("Size", plots.sizes(report)),
        ("Latency", plots.latency(report)),
        ("Where the error starts", plots.layer_sqnr(report)),
        ("Where the error comes from", plots.error_shares(report)),
        ("Time of each layer", plots.layer_times(report)),
        ("What a search found", plots.front(report)),
    ]
    return "\n".join(
        f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
        for caption, svg in drawings
        if svg is not None
    )


def _summary(report: Report) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("", report.model, report.reference, ""))
    body = "\n".join(
        f"<tr><th>{escape(measure)}</th><td>{escape(model)}</td><td>{escape(reference)}</td>"
        f'<td class="remark">{escape(remark)}</td></tr>'
        for measure, model, reference, remark in summary_rows(report)
    )
    return (
        f'<p class="hint">{escape(explanation(report))}</p>\n<div class="scroll">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    own = sorted(x.own_sqnr_db for x in report.layers if x.own_sqnr_db is not None)
    limit = own[_WORST - 1] if len(own) > _WORST else -math.inf
    body = "\n".join(
        _layer_row(position, layer, limit) for position, layer in enumerate(report.layers, start=1)
    )
    return (
        "<h2>Layers</h2>\n"
        f'<p class="hint">In the order they run. {escape(LAYER_WORDS)} The lowest own SQNRs are '
        f"marked. {escape(error_start_text(report))}</p>\n"
        '<div class="scroll"><table><thead><tr><th>#</th><th class=name>layer</th>'
        "<th class=kind>kind</th><th>SQNR</th><th>own SQNR</th><th>largest error</th>"
        "<th>of error</th><th>time</th><th>before</th><th>bytes</th><th>outliers</th>"
        "</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _layer_row(position: int, layer: Layer, limit: float) -> str:
    mark = ' class="worst"' if layer.own_sqnr_db is not None and layer.own_sqnr_db <= limit else ""
    sqnr = words.decibel(layer.sqnr_db) + (" (NaN/Inf)" if layer.nonfinite else "")
    return (
        f"<tr{'' if layer.quantized else ' class=float'}><td>{position}</td>"
        f"<td class=name>{escape(layer.name).replace('.', '.<wbr>')}</td>"
        f"<td class=kind>{escape(layer.kind)}</td>"
        f"<td>{sqnr}</td><td{mark}>{words.decibel(layer.own_sqnr_db)}</td>"
        f"<td>{words.number(layer.max_abs_error)}</td><td>{words.percent(layer.share)}</td>"
        f"<td>{words.change(layer.reference_seconds, layer.seconds)}</td>"
        f"<td>{size_text(layer.reference_bytes)}</td><td>{size_text(layer.bytes)}</td>"
        f"<td>{words.outliers(layer)}</td></tr>"
    )


def _list(heading: str, sentences: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{heading}</h2>\n<ul>\n{items}\n</ul>" if items else ""


def _search(report: Report) -> str:
    """The totals of the plan: as it is, with one scheme, as predicted and measured."""
    if report.plan is None:
        return ""
    reference, measure = report.plan.reference, report.plan.measure
    body = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{words.seconds(cost.seconds)}</td>"
        f"<td>{words.percent(cost.seconds / reference.seconds)}</td>"
        f"<td>{size_text(cost.bytes)}</td><td>{words.percent(cost.bytes / reference.bytes)}</td>"
        f"<td>{escape(measure.text(cost.quality))}</td></tr>"
        for name, cost in rows_of(report.plan)
    )
    return (
        "<h2>The search that the model comes from</h2>\n"
        '<div class="scroll"><table><thead><tr><th></th><th>latency</th><th></th><th>size</th>'
        f"<th></th><th>{escape(measure.title)}</th></tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
