"""Draw the results of three examples: `python benchmarks/example_plots.py docs/images`.

What is drawn is in benchmarks/results/: demo.json (`qkernels demo`), vision.json (`qkernels demo
--vision`, its table.json), and ddp_qat_1.json and ddp_qat_2.json (`examples/ddp_qat.py
--history`, in one process and in two).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
BLUE, RED, GREY = "#0072B2", "#D55E00", "#999999"


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def bars(axes: Axes, names: list[str], values: list[float], spread: list[float] | None) -> None:
    """Accuracies in percent, from below the lowest."""
    axes.bar(range(len(names)), values, yerr=spread, color=BLUE, ecolor=GREY, capsize=3)
    low = min(v - (spread[i] if spread else 0) for i, v in enumerate(values))
    axes.set_ylim(max(0, low - 3), min(100, max(values) + 3))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("test accuracy, %")
    for i, value in enumerate(values):
        axes.text(i, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)


def draw_text(path: Path) -> None:
    """The models of the text demo: accuracy, and bytes in memory."""
    rows = read("demo.json")["models"]
    figure, axes = pyplot.subplots(figsize=(7, 3.4))
    names = [f"{row['name']}\n{row['bytes'] / 2**20:.1f} MB" for row in rows]
    bars(axes, names, [100 * row["accuracy"] for row in rows], None)
    axes.set_title("MiniLM, ten classes of docstrings, quantized after training", fontsize=10)
    save(figure, path)


def draw_vision(path: Path) -> None:
    """What is trained, then what is quantized: mean and standard deviation over the seeds."""
    found = read("vision.json")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    ways = {n: e["test"] for n, e in found["transfer"].items() if n != "digits 0 to 4"}
    several = len(found["seeds"]) > 1
    spread = [100 * statistics.stdev(tests) for tests in ways.values()] if several else None
    bars(left, list(ways), [100 * statistics.fmean(tests) for tests in ways.values()], spread)
    left.set_title("What is trained, float32", fontsize=10)
    models = found["models"]
    names = [f"{m['name']}\n{m['bytes'] / 2**20:.2f} MB" for m in models]
    spread = [100 * m["spread"] for m in models] if several else None
    bars(right, names, [100 * m["accuracy"] for m in models], spread)
    right.set_title("Everything trained, then quantized", fontsize=10)
    save(figure, path)


def draw_ddp(path: Path) -> None:
    """The loss of the same global batches in one process and in two, and how far they are apart."""
    one, two = (read(f"ddp_qat_{count}.json") for count in (1, 2))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2))
    steps = range(1, len(one["loss"]) + 1)
    left.plot(steps, one["loss"], color=BLUE, linewidth=3, label="one process")
    left.plot(steps, two["loss"], color=RED, linestyle="--", label="two processes")
    left.set_xlabel("step")
    left.set_ylabel("loss of the global batch")
    left.legend(fontsize=8)
    apart = [max(abs(a - b), 1e-9) for a, b in zip(one["loss"], two["loss"], strict=True)]
    right.semilogy(steps, apart, color=GREY)
    right.set_xlabel("step")
    right.set_ylabel("difference of the losses")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_text(folder / "text.png")
    draw_vision(folder / "vision.png")
    draw_ddp(folder / "ddp.png")
