"""What to do about a report, in plain sentences; none where nothing is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkernels.report import words

if TYPE_CHECKING:
    from qkernels.report.report import Layer, Report

# From this SQNR of the output on, nobody has to do anything about the error.
GOOD_DB = 35.0
# Layers that make this share of the error are "where it comes from", if they are this few of all.
_MOST, _FEW = 0.8, 0.25
# From this ratio of the largest to the median channel on, int8 inputs lose much.
_OUTLIER = 20.0
# What is worth a sentence: share of the model's time that is lost, and of its bytes.
_TIME, _BYTES = 0.03, 0.25
_NAMES_SHOWN = 4


def advice(report: Report) -> tuple[str, ...]:
    """Sentences about what costs accuracy, time and memory, each with the call that changes it.

    Args:
        report: what `compare` measured.
    """
    return tuple((*_broken(report), *_error(report), *_slow(report), *_large(report)))


def error_start(report: Report) -> Layer | None:
    """The first layer whose noise inside the model is at least a tenth of the output's.

    Args:
        report: what `compare` measured.
    """
    if report.sqnr_db is None:
        return None
    near = (x for x in report.layers if x.sqnr_db is not None and x.sqnr_db <= report.sqnr_db + 10)
    return next(near, None)


def error_start_text(report: Report) -> str:
    """Where the error starts, as a sentence; empty if nothing is known.

    Args:
        report: what `compare` measured.
    """
    first = error_start(report)
    if first is None:
        return ""
    return (
        f"The error starts at {first.name}: it is the first layer whose SQNR inside the model, "
        f"{words.decibel(first.sqnr_db)}, is within 10 dB of the output's."
    )


def _broken(report: Report) -> Iterator[str]:
    if report.nonfinite <= report.nonfinite_reference:
        return
    first = next((layer.name for layer in report.layers if layer.nonfinite), None)
    if first is not None:
        yield f"NaN or Inf first come out of {first}: leave it float, ignore=[{first!r}]."


def _error(report: Report) -> Iterator[str]:
    if report.sqnr_db is None or report.sqnr_db >= GOOD_DB:
        return
    costly = _costliest(report)
    if costly:
        yield _keep_better(report, costly)
    elif any(_is_4_bit(layer) for layer in report.layers):
        yield (
            "The error comes from many layers: scales by search (optimize='mse'), rounding with "
            "data (qk.quantize_calibrated_) or a scheme for each layer (qk.search) make it less."
        )
    yield from _outliers(report, costly)


def _costliest(report: Report) -> list[Layer]:
    """The few layers that make most of the error; none if it is spread over many."""
    measured = [layer for layer in report.layers if layer.share is not None]
    chosen: list[Layer] = []
    for layer in sorted(measured, key=lambda x: -(x.share or 0)):
        if _share(chosen) >= _MOST:
            break
        chosen.append(layer)
    few = len(measured) > 2 and len(chosen) <= max(1, _FEW * len(measured))
    return chosen if few and _share(chosen) >= _MOST else []


def _keep_better(report: Report, costly: Sequence[Layer]) -> str:
    names = [layer.name for layer in costly]
    head = (
        f"{_listed(names)} {'costs' if len(names) == 1 else 'cost'} "
        f"{words.percent(_share(costly))} of the error: "
    )
    it = "it" if len(names) == 1 else "them"
    if not all(_is_4_bit(layer) for layer in costly):
        return f"{head}leave {it} float, qk.quantize_(model, scheme, ignore={names!r})."
    common = Counter(x.scheme for x in report.layers if x.quantized).most_common(1)[0][0]
    pairs = [f"'*': qk.{common}", *(f"'={x.name}': qk.{_at_8_bits(x)}" for x in costly)]
    return f"{head}keep {it} at 8 bits, qk.quantize_(model, {{{', '.join(pairs)}}})."


def _outliers(report: Report, costly: Sequence[Layer]) -> Iterator[str]:
    """Large channels in inputs that become int8, where these layers cost something."""
    found = [
        layer
        for layer in costly or report.layers
        if (layer.input_outlier or 0) >= _OUTLIER and "A8" in (layer.scheme or "")
    ]
    if found:
        worst = max(found, key=lambda layer: layer.input_outlier or 0)
        yield (
            f"The input of {_listed([x.name for x in found])} has channels up to "
            f"{words.times(worst.input_outlier or 0)} as large as the median one, which int8 "
            "codes have to reach: method='smoothquant' of qk.quantize_calibrated_ moves them into "
            "the weight, and qk.W8A16() leaves inputs float."
        )


def _slow(report: Report) -> Iterator[str]:
    if report.latency is None:
        return
    slower = [
        (layer, layer.seconds - layer.reference_seconds)
        for layer in report.layers
        if layer.quantized
        and layer.seconds is not None
        and layer.reference_seconds is not None
        and layer.seconds > 1.1 * layer.reference_seconds
    ]
    lost = sum(seconds for _, seconds in slower)
    if lost < _TIME * report.latency.model.median:
        return
    names = [layer.name for layer, _ in sorted(slower, key=lambda pair: -pair[1])]
    keeps_float = all("A8" not in (layer.scheme or "") for layer, _ in slower)
    way = (
        "schemes that keep activations float are for few rows at a time; qk.W8A8() and "
        "qk.W4A8() compute in integers"
        if keeps_float
        else "leave them float, or let qk.search choose by time"
    )
    yield (
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} slower than in float, by "
        f"{words.seconds(lost)} for this batch: {way}."
    )


def _large(report: Report) -> Iterator[str]:
    kinds = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
    for layer in report.layers:
        if layer.kind in kinds and report.bytes and layer.bytes >= _BYTES * report.bytes:
            yield (
                f"{layer.name} is still float and holds {words.percent(layer.bytes / report.bytes)}"
                f" of the bytes: give it a scheme too, {{'={layer.name}': qk.W8A16()}}."
            )


def _share(layers: Sequence[Layer]) -> float:
    return sum(layer.share or 0 for layer in layers)


def _is_4_bit(layer: Layer) -> bool:
    return (layer.scheme or "").startswith(("W4", "NF4"))


def _at_8_bits(layer: Layer) -> str:
    return "W8A8()" if (layer.scheme or "").startswith("W4A8") else "W8A16()"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c, d and 5 more`."""
    shown, more = list(names[:_NAMES_SHOWN]), len(names) - _NAMES_SHOWN
    last = f"{more} more" if more > 0 else shown.pop() if len(shown) > 1 else ""
    return " and ".join(part for part in (", ".join(shown), last) if part)
