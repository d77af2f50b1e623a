"""Draw what recovery.py found: `python benchmarks/recovery_plot.py docs/images`.

Of benchmarks/results/ it draws recovery.json and recovery_fresh.json, each into an image of its
name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def draw(found: dict, path: Path) -> None:
    """A panel for each task: the difference from float of each seed, and its mean."""
    tasks = found["tasks"].values()
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 3.4), squeeze=False, sharey=True
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        rows = {name: row for name, row in task["rows"].items() if name != "float"}
        for place, row in enumerate(rows.values()):
            for seed, apart, colour in zip(found["seeds"], row["apart"], COLOURS, strict=False):
                label = f"seed {seed}" if place == 0 else None
                if apart is None:
                    continue
                axes.plot(place, apart, "o", color=colour, label=label)
            axes.hlines(row["apart_mean"], place - 0.25, place + 0.25, color="black")
        axes.axhline(0, color="#666666", linewidth=0.8)
        axes.axhline(-0.5, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(rows)), [name.replace(" ", "\n", 1) for name in rows], fontsize=8)
        axes.set_title(task["title"].split(";")[0], fontsize=10)
    panels[0][0].set_ylabel("points from float (dotted: -0.5)")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    for name in ("recovery", "recovery_fresh"):
        draw(json.loads((RESULTS / f"{name}.json").read_text()), Path(sys.argv[1]) / f"{name}.png")
