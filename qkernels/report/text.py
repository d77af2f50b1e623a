"""A report in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qkernels.mixed.text import totals
from qkernels.report import words
from qkernels.report.advice import error_start_text
from qkernels.report.report import Layer, Report
from qkernels.summary import size_text

LAYER_WORDS = (
    "SQNR: inside the model. Own SQNR: the layer alone, on the reference's input. Of error: the "
    "noise of the output with this layer alone quantized, over the sum of all such. Outliers: the "
    "largest channel of the input over the median one, and the largest weight over their RMS."
)
# More layers than this would push the summary off the screen.
_LAYERS_SHOWN = 24


def summary_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(measure, model, reference, remark) of everything that is measured per model or per pair."""
    rows = [
        (
            "size",
            size_text(report.bytes),
            size_text(report.reference_bytes),
            f"{words.times(report.compression)} smaller"
            if report.compression >= 1
            else f"{words.times(1 / report.compression)} larger",
        )
    ]
    if report.latency is not None:
        latency = report.latency
        rows.append(
            (
                "latency, median",
                words.seconds(latency.model.median),
                words.seconds(latency.reference.median),
                f"{words.times(latency.speedup)} the speed",
            )
        )
        rows.append(
            (
                "latency, fastest / spread",
                f"{words.seconds(latency.model.min)} / {words.seconds(latency.model.iqr)}",
                f"{words.seconds(latency.reference.min)} / {words.seconds(latency.reference.iqr)}",
                "",
            )
        )
    if report.metric is not None:
        m = report.metric
        change = words.number(m.model - m.reference)
        sign = "" if change.startswith("-") else "+"
        rows.append(
            (m.name, words.number(m.model), words.number(m.reference), f"change {sign}{change}")
        )
    if report.nonfinite or report.nonfinite_reference:
        rows.append(
            (
                "vectors with NaN or Inf",
                str(report.nonfinite),
                str(report.nonfinite_reference),
                f"of {report.rows}",
            )
        )
    if report.agreement is not None:
        rows.append(
            (
                "same prediction",
                words.percent(report.agreement),
                "",
                f"of {report.predictions}",
            )
        )
    rows += [
        ("cosine, mean", words.cosine(report.cosine_mean), "", ""),
        ("cosine, lowest", words.cosine(report.cosine_min), "", ""),
        ("SQNR", words.decibel(report.sqnr_db), "", ""),
        ("largest error", words.number(report.max_abs_error), "", ""),
    ]
    return rows


def explanation(report: Report) -> str:
    """What the numbers of the summary were measured on, and what their names mean."""
    text = (
        f"Compared: {report.rows} vectors of {report.output} in {report.batches} batches. SQNR is "
        f"signal to quantization noise, the largest error that of a single value."
    )
    if report.latency is not None:
        text += (
            f" Latency: a batch of {report.latency.batch}, {len(report.latency.model.samples)} "
            f"interleaved rounds; the spread is the interquartile range."
        )
    return text


def layers_to_show(layers: tuple[Layer, ...], limit: int) -> list[tuple[int, Layer]]:
    """(position, layer) in execution order; of many layers the quantized with the lowest SQNR."""
    numbered = list(enumerate(layers, start=1))
    if len(numbered) <= limit:
        return numbered
    own = {position: layer.own_sqnr_db for position, layer in numbered}
    inside = {position: layer.sqnr_db for position, layer in numbered}
    values = own if any(value is not None for value in own.values()) else inside
    known = [(value, position) for position, value in values.items() if value is not None]
    lowest = sorted(position for _, position in sorted(known)[:limit])
    return [numbered[position - 1] for position in lowest]


def renderable(report: Report) -> RenderableType:
    """The report as something that a rich console prints."""
    summary = Table(header_style="bold", show_edge=False, pad_edge=False)
    for heading in ("", escape(report.model), escape(report.reference)):
        summary.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    summary.add_column("", style="dim")
    for row in summary_rows(report):
        summary.add_row(*map(escape, row))
    parts: list[RenderableType] = [Text(report.verdict, style="bold"), "", summary, ""]
    parts.append(Text(explanation(report), style="dim"))
    if report.layers:
        parts += ["", _layer_table(report), Text(error_start_text(report), style="dim")]
    if report.plan is not None:
        parts += ["", Text("The search that the model comes from", style="bold")]
        parts.append(totals(report.plan))
    if report.advice:
        parts += ["", Text("What to do", style="bold")]
        parts += [Text(f"· {sentence}") for sentence in report.advice]
    parts += ["", *(Text(f"· {note}") for note in report.notes)]
    parts.append(Text(", ".join(f"{k} {v}" for k, v in report.machine.items()), style="dim"))
    return Group(*parts)


def _layer_table(report: Report) -> Table:
    shown = layers_to_show(report.layers, _LAYERS_SHOWN)
    title = "Layers in the order they run"
    if len(shown) < len(report.layers):
        title += f": {len(shown)} of {len(report.layers)}, those with the lowest own SQNR"
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=LAYER_WORDS,
        caption_justify="left",
        header_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("#", justify="right")
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for heading in ("SQNR", "own SQNR", "of error", "time", "bytes", "outliers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for position, layer in shown:
        table.add_row(
            str(position),
            escape(layer.name),
            escape(layer.kind),
            words.decibel(layer.sqnr_db) + (" (NaN/Inf)" if layer.nonfinite else ""),
            words.decibel(layer.own_sqnr_db),
            words.percent(layer.share),
            words.change(layer.reference_seconds, layer.seconds),
            size_text(layer.bytes),
            words.outliers(layer),
            style=None if layer.quantized else "dim",
        )
    return table
