"""Numbers as people read them, and the verdict on a report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkernels.report.report import Layer, Report


def seconds(value: float) -> str:
    """A time in the unit that fits: `65.2 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale * 0.9995:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value * 1e9)} ns" if value else "0"


def _three(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def decibel(value: float | None) -> str:
    """An SQNR: `34.1 dB`, `identical` for inf, `–` where there is none."""
    if value is None:
        return "–"
    return "identical" if value == math.inf else f"{value:.1f} dB"


def cosine(value: float | None) -> str:
    """A cosine with as many digits as its distance from 1 deserves: `0.99987`."""
    if value is None:
        return "–"
    text = f"{value:.4f}"
    return text if text != "1.0000" else f"{value:.6f}"


def percent(value: float | None) -> str:
    """A share: `99.2 %`; 100 % only if it is all of them."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return f"{'>99.9' if text == '100.0' and value < 1 else text} %"


def times(ratio: float) -> str:
    """A ratio: `3.6×`."""
    return f"{_three(ratio)}×"


def number(value: float) -> str:
    """A metric or an error, four significant digits."""
    return f"{value:.4g}"


def change(before: float | None, now: float | None) -> str:
    """A time before and now: `1.20 ms → 310 µs`."""
    if before is None or now is None:
        return "–"
    return f"{seconds(before)} → {seconds(now)}"


def outliers(layer: Layer) -> str:
    """How far the largest values stand out: `12.0×, 6.1×` of input and weight."""
    found = (layer.input_outlier, layer.weight_outlier)
    return (
        "–" if found == (None, None) else ", ".join("–" if x is None else times(x) for x in found)
    )


def verdict(report: Report) -> str:
    """One or two sentences: what was gained, what it cost, and what is wrong if something is."""
    broken = report.nonfinite > 0 and report.nonfinite > report.nonfinite_reference
    if broken:
        return (
            f"{report.model} returns NaN or Inf in {report.nonfinite} of {report.rows} output "
            f"vectors ({report.nonfinite_reference} for {report.reference}): do not use it before "
            f"you have found the layer that causes it in the table."
        )
    return f"{_gains(report)}; {_cost(report)}."


def _gains(report: Report) -> str:
    ratio = report.compression
    if ratio >= 1.005:
        text = f"{report.model} is {times(ratio)} smaller than {report.reference}"
    elif ratio <= 0.995:
        text = f"{report.model} is {times(1 / ratio)} larger than {report.reference}"
    else:
        text = f"{report.model} is as large as {report.reference}"
    if report.latency is None:
        return text
    speedup = report.latency.speedup
    if speedup >= 1.02:
        return f"{text} and {times(speedup)} as fast"
    if speedup <= 0.98:
        return f"{text} but slower ({times(speedup)} the speed)"
    return f"{text} and as fast"


def _cost(report: Report) -> str:
    if report.sqnr_db is None:
        return "there was no finite output to compare"
    if report.sqnr_db == math.inf:
        return f"its outputs are identical on {report.rows} vectors"
    parts = []
    if report.agreement is not None:
        parts.append(
            f"it makes the same prediction in {percent(report.agreement)} of {report.predictions} "
            f"cases"
        )
    parts.append(f"its outputs have cosine {cosine(report.cosine_mean)} to the reference")
    text = " and ".join(parts)
    if report.metric is not None:
        m = report.metric
        text += f"; {m.name} goes from {number(m.reference)} to {number(m.model)}"
    return text
