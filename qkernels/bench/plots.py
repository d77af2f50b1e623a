"""Two plots: how much faster than the best peer at each M, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from qkernels.bench.analysis import fastest, float_twin, operations, peers_of, traffic
from qkernels.bench.plan import Shape
from qkernels.bench.results import Record, Result, Results

RATIO, ROOFLINE = "ratio.png", "roofline.png"
# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_AGAINST_PEERS = ("W8A8", "W4A8 g128", "W4A8 g32")
_AGAINST_FLOAT = ("W8A16 bf16", "W4A16 g128 bf16", "NF4 g64 bf16")
_ROOFLINE = (*_AGAINST_PEERS, "W4A16 g128 bf16")
_GREY = "#666666"


def draw(results: Results, folder: Path) -> None:
    """Write the plots whose cases were measured.

    Args:
        results: of a run.
        folder: where to.
    """
    records = [r for r in results.records if r.group == "linear"]
    if not records:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}
    ):
        _ratios(pyplot, records, folder / RATIO)
        if all({"read", "int8", "bf16"} <= r.limits.keys() for r in records):
            _roofline(pyplot, records, folder / ROOFLINE)


def _lines(records: list[Record], name: str) -> dict[str, list[tuple[int, Record, Result]]]:
    """Shape → (m, record, result) of one contender, by m."""
    found: dict[str, list[tuple[int, Record, Result]]] = {}
    for record in records:
        for result in record.results:
            if result.name == name:
                shape = f"{record.case['k']}×{record.case['n']}"
                found.setdefault(shape, []).append((record.case["m"], record, result))
    return {shape: sorted(points, key=lambda p: p[0]) for shape, points in found.items()}


def _ratios(pyplot: Any, records: list[Record], path: Path) -> None:
    figure, rows = pyplot.subplots(2, 3, figsize=(10, 6), sharex=True, squeeze=False)
    shapes = list(dict.fromkeys(f"{r.case['k']}×{r.case['n']}" for r in records))
    for axes, name in zip(rows.flat, _AGAINST_PEERS + _AGAINST_FLOAT, strict=True):
        against_float = name in _AGAINST_FLOAT
        for shape, points in _lines(records, name).items():
            pairs = [
                (m, rival.median / result.median)
                for m, record, result in points
                if (rival := _rival(record, result, against_float)) is not None
            ]
            index = shapes.index(shape)
            style = ("o-", "s--", "^:")[index // len(_COLOURS) % 3]
            axes.plot(
                *zip(*pairs, strict=True) if pairs else ([], []),
                style,
                color=_COLOURS[index % len(_COLOURS)],
                label=shape,
                markersize=3,
                linewidth=1,
            )
        axes.axhline(1, color=_GREY, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        rival_name = "torch bf16" if against_float else f"the best {_bits(name)} peer"
        axes.set_title(f"{name} against {rival_name}", fontsize=9, loc="left")
        ticks = sorted({r.case["m"] for r in records})
        axes.set_xticks(ticks, [str(m) for m in ticks])
        axes.minorticks_off()
    for axes in rows[-1]:
        axes.set_xlabel("M (rows of x)")
    for axes in rows[:, 0]:
        axes.set_ylabel("times as fast")
    handles, labels = max(
        (a.get_legend_handles_labels() for a in rows.flat), key=lambda pair: len(pair[0])
    )
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=6, frameon=False, title="layer, K×N"
        )
    figure.set_layout_engine("constrained")
    figure.savefig(path)
    pyplot.close(figure)


def _bits(name: str) -> str:
    return "8-bit" if name.startswith("W8") else "4-bit"


def _rival(record: Record, result: Result, against_float: bool) -> Result | None:
    return float_twin(record, result) if against_float else fastest(peers_of(record, result))


def _roofline(pyplot: Any, records: list[Record], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    middle = sorted(records, key=lambda r: r.limits["read"])[len(records) // 2]
    read = middle.limits["read"]
    intensities = [2.0**i for i in range(1, 12)]
    for peak, style in (("int8", "-"), ("bf16", "--")):
        # With the knee, where reading takes as long as multiplying.
        at = sorted([*intensities, middle.limits[peak] / read])
        rates = [min(read * i, middle.limits[peak]) / 1e9 for i in at]
        axes.plot(at, rates, style, color=_GREY, linewidth=1)
        axes.annotate(
            f"{peak} peak {middle.limits[peak] / 1e9:.0f} Gop/s",
            (intensities[-1], rates[-1]),
            textcoords="offset points",
            xytext=(0, 3),
            ha="right",
            color=_GREY,
        )
    axes.annotate(
        f"memory {read / 1e9:.0f} GB/s",
        (8, read * 8 / 1e9),
        textcoords="offset points",
        xytext=(-4, 6),
        ha="right",
        color=_GREY,
    )
    for colour, name in zip(_COLOURS, _ROOFLINE, strict=False):
        points = [
            (operations(record) / traffic(record, result), operations(record) / result.median / 1e9)
            for shape in _lines(records, name).values()
            for _, record, result in shape
            # What stays in the cache is not bound by memory.
            if Shape(record.case["k"], record.case["n"]).rotated
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=name, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("Gop/s")
    axes.set_title("Roofline: language models' layers, M = 1 to 512", fontsize=9, loc="left")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)
