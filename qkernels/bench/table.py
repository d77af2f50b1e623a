"""The results as Markdown: time, ratio to the best peer, share of the limit, targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qkernels.bench.analysis import (
    PRODUCTS,
    case_name,
    fastest,
    float_twin,
    named,
    operations,
    peers_of,
    seconds_of_one,
    share,
    traffic,
)
from qkernels.bench.limits import PEAKS
from qkernels.bench.measure import DISTURBED
from qkernels.bench.plan import Shape
from qkernels.bench.results import Record, Result, Results
from qkernels.bench.targets import TARGETS, Outcome, Target

_TITLES = {
    "linear": "Linear layers",
    "conv": "Convolutions with ReLU",
    "capped": "Linear layers with the instruction set capped",
    "int_mm": "int8 products with exact int32 results",
    "backward": "Backward to the input through frozen weights",
    "quantize": "Quantize and dequantize",
    "overhead": "Cost of a call",
    "models": "Models",
    "cnn": "Image classifiers",
    "memory": "Memory",
}


def markdown(results: Results) -> str:
    """The whole page.

    Args:
        results: of a run.
    """
    parts = ["# qkernels benchmark", _about(results), *_targets(results)]
    if results.limits:
        parts += ["## Limits of this machine", _limits(results)]
    for group, title in _TITLES.items():
        records = [r for r in results.records if r.group == group]
        if records:
            parts += [f"## {title}", _group(group, records)]
    if results.skipped:
        rows = [[name, reason] for name, reason in sorted(results.skipped.items())]
        parts += ["## Left out", table(["what", "why"], rows, left=2)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table.

    Args:
        header: of the columns.
        rows: cells, as many as there are columns.
        left: how many columns are aligned to the left; numbers go to the right.

    Example:
        >>> print(table(["a", "b"], [["x", "1"]]))
        | a | b |
        | --- | ---: |
        | x | 1 |
    """
    marks = ["---" if i < left else "---:" for i in range(len(header))]
    cells = [list(header), marks, *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def microseconds(seconds: float) -> str:
    """Three figures, at most one decimal.

    Example:
        >>> microseconds(12.345e-6), microseconds(0.25)
        ('12.3', '250000')
    """
    us = seconds * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _about(results: Results) -> str:
    about = results.about
    machine = about["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v != "not installed")
    environment = ", ".join(f"{k}={v}" for k, v in about["environment"].items()) or "none"
    return "\n".join(
        [
            f"- {machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, "
            f"last-level cache {machine['cache'] >> 20} MiB, instruction set {machine['isa']}",
            f"- qkernels {machine['qkernels']} {about['commit']}; {versions}",
            f"- variables: {environment}; measured {about['time']}",
            *_disturbed(results),
            "",
            "Times are medians; ± is the interquartile range. Contenders were timed in turns in "
            "one process. The limit of a product is the longer of reading its weights and of its "
            "multiplications, at rates sampled between the turns; that of a convolution is its "
            "multiplications, that of a codec a copy of as many bytes. A ratio above 1 (×) means "
            "that qkernels is faster.",
        ]
    )


def _disturbed(results: Results) -> list[str]:
    """A line when other work took the cores away from what was timed."""
    of_all = [(r, record) for record in results.records for r in record.results]
    disturbed = [(r, record) for r, record in of_all if r.waited > DISTURBED]
    if not disturbed:
        return []
    worst, record = max(disturbed, key=lambda found: found[0].waited)
    return [
        f"- {len(disturbed)} of {len(of_all)} results waited for a core for more than "
        f"{DISTURBED:.0%} of their time, {worst.name} in {record.group} {case_name(record)} for "
        f"{worst.waited:.0%}: other work on this machine, or more threads than cores"
    ]


def _limits(results: Results) -> str:
    counts = sorted({t for rates in results.limits.values() for t in rates}, key=int)
    header = ["", *(f"{t} thread{'s' if t != '1' else ''}" for t in counts), "unit"]
    rows = []
    for name, rates in results.limits.items():
        text = PEAKS.get(name, f"{name} memory")
        unit = "Gop/s" if name in PEAKS else "GB/s"
        rows.append([text, *(f"{rates[t] / 1e9:.1f}" if t in rates else "" for t in counts), unit])
    return table(header, rows)


# ---- Targets -------------------------------------------------------------------------------------


def _targets(results: Results) -> list[str]:
    rows = []
    for target in TARGETS:
        outcomes = list(target.find(results))
        if outcomes:
            rows.append(_target(target, outcomes))
    if not rows:
        return []
    header = ["target", "met", "worst", "where", "best"]
    return ["## Targets", table(header, rows)]


def _target(target: Target, outcomes: list[Outcome]) -> list[str]:
    met = sum(o.met for o in outcomes)
    worst = min(outcomes, key=lambda o: o.margin)
    best = max(outcomes, key=lambda o: o.margin)
    verdict = "**met**" if met == len(outcomes) else "**short**"

    def value(outcome: Outcome) -> str:
        figures = ".4f" if not target.unit else ".0f" if target.unit in "% Gop/s" else ".2f"
        return f"{outcome.value:{figures}} {target.unit}".strip()

    where = f"{worst.contender}, {worst.case}" + (f", {worst.versus}" if worst.versus else "")
    return [target.text, f"{verdict} {met}/{len(outcomes)}", value(worst), where, value(best)]


# ---- Groups --------------------------------------------------------------------------------------


def _group(group: str, records: list[Record]) -> str:
    if group == "memory":
        return _memory(records)
    if group in ("models", "cnn"):
        return _models(records)
    if group == "conv":
        return _convs(records)
    if group == "overhead":
        return table(
            ["call", "µs", "±", "samples"],
            (
                [r.name, microseconds(r.median), microseconds(r.iqr), str(r.samples)]
                for record in records
                for r in record.results
            ),
        )
    return _products(records) if group in PRODUCTS else _codecs(records)


def _products(records: list[Record]) -> str:
    """A table for each shape and ISA: contenders down, numbers of rows across."""
    shapes: dict[tuple[int, int, str], list[Record]] = {}
    for record in records:
        key = (record.case["k"], record.case["n"], record.isa)
        shapes.setdefault(key, []).append(record)
    parts = []
    for (k, n, isa), there in shapes.items():
        there.sort(key=lambda r: int(r.case["m"]))
        where = "weights from memory" if Shape(k, n).rotated else "weights in the cache"
        parts.append(f"### {k} → {n}, {where}, {isa}")
        parts.append(_by_rows(there))
    return "\n\n".join(parts)


def _by_rows(records: list[Record]) -> str:
    names = dict.fromkeys(r.name for record in records for r in _sorted(record))
    rows = []
    for name in names:
        found = [(record, named(record, name)) for record in records]
        own = any(r is not None and r.own for _, r in found)
        rows.append([f"**{name}**" if own else name, *(_time(r) for _, r in found)])
        if own:
            for title, value in (
                ("best peer", _rival),
                ("torch float", _twin),
                ("of the limit", _share),
                ("Gop/s", _gops),
            ):
                cells = [value(record, r) if r else "" for record, r in found]
                if any(cells):
                    rows.append([f"· {title}", *cells])
    faults = max((r for record in records for r in record.results), key=lambda r: r.faults)
    header = ["µs (± interquartile range)", *(f"M={r.case['m']}" for r in records)]
    note = f"At most {faults.faults:.0f} minor page faults in a call ({faults.name})."
    return f"{table(header, rows)}\n\n{note}"


def _sorted(record: Record) -> list[Result]:
    """Our own first, then the peers from the fastest."""
    return sorted(record.results, key=lambda r: (not r.own, 0.0 if r.own else r.median))


def _time(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{microseconds(result.median)} ±{microseconds(result.iqr)}"


def _rival(record: Record, result: Result) -> str:
    rival = fastest(peers_of(record, result))
    return f"{rival.median / result.median:.2f}× {rival.name}" if rival else ""


def _twin(record: Record, result: Result) -> str:
    twin = float_twin(record, result)
    return f"{twin.median / result.median:.2f}×" if twin else ""


def _share(record: Record, result: Result) -> str:
    reached = share(record, result)
    return f"{reached:.0%}" if reached is not None else ""


def _gops(record: Record, result: Result) -> str:
    return f"{operations(record) / result.median / 1e9:.0f}"


def _convs(records: list[Record]) -> str:
    """A table: convolutions down, contenders across; ours with ratio and share."""
    names = {r.name: r.own for record in records for r in _sorted(record)}
    header = ["µs (± interquartile range)"]
    for name, own in names.items():
        header += [f"**{name}**", "best peer", "of the limit"] if own else [name]
    rows = []
    for record in records:
        row = [case_name(record)]
        for name, own in names.items():
            result = named(record, name)
            row.append(_time(result))
            if own:
                row += [_rival(record, result), _share(record, result)] if result else ["", ""]
        rows.append(row)
    return table(header, rows)


def _codecs(records: list[Record]) -> str:
    header = ["task", "contender", "µs", "±", "GB/s", "of the limit", "best peer", "faults"]
    rows = [
        [
            case_name(record),
            f"**{r.name}**" if r.own else r.name,
            microseconds(r.median),
            microseconds(r.iqr),
            f"{traffic(record, r) / r.median / 1e9:.1f}",
            _share(record, r),
            _rival(record, r) if r.own else "",
            f"{r.faults:.0f}",
        ]
        for record in records
        for r in _sorted(record)
    ]
    return table(header, rows, left=2)


def _models(records: list[Record]) -> str:
    header = ["model", "contender", "ms", "±", "to torch fp32"]
    header += ["SQNR, dB", "cosine to fp32, mean", "lowest", "faults"]
    rows = []
    for record in records:
        reference = next((r for r in record.results if r.name == "torch fp32"), None)
        for r in sorted(record.results, key=lambda r: r.median):
            rows.append(
                [
                    case_name(record),
                    f"**{r.name}**" if r.own else r.name,
                    f"{seconds_of_one(record, r) * 1e3:.2f}",
                    f"{r.iqr / float(record.case.get('steps', 1)) * 1e3:.2f}",
                    f"{reference.median / r.median:.2f}×" if reference else "",
                    f"{r.sqnr:.1f}" if r.sqnr is not None else "",
                    f"{r.extra['cosine']:.5f}",
                    f"{r.extra['cosine_min']:.5f}",
                    f"{r.faults:.0f}",
                ]
            )
    return table(header, rows, left=2)


def _memory(records: list[Record]) -> str:
    mib = 2**20
    header = ["contender", "float MiB", "stored MiB", "resident MiB"]
    header += ["peak over the float model, MiB", "seconds"]
    rows = [
        [
            f"**{r.name}**" if r.own else r.name,
            *(f"{r.extra[key] / mib:.0f}" for key in ("float", "stored", "resident", "peak")),
            f"{r.median:.2f}",
        ]
        for record in records
        for r in record.results
    ]
    return table(header, rows)
