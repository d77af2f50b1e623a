"""Draw SQNR over bits per weight: `python benchmarks/accuracy_plot.py docs/images/four_bits.png`.

What is drawn is in benchmarks/results/accuracy.json, which `accuracy.py` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
OURS = {
    "qkernels int4 mse": ("#0072B2", "o"),
    "qkernels int4 asymmetric mse": ("#009E73", "s"),
    "qkernels nf4 mse": ("#D55E00", "^"),
}
PEERS = {
    "HQQ": ("#000000", "o"),
    "HQQ, zero points in 8 bits": ("#000000", "s"),
    "bitsandbytes nf4": ("#999999", "^"),
    "bitsandbytes nf4, double": ("#999999", "v"),
    "GGUF Q4_0": ("#CC79A7", "o"),
    "GGUF Q4_1": ("#CC79A7", "s"),
    "GGUF Q4_K": ("#CC79A7", "D"),
}


def main() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["weights"]["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    for names, style in ((OURS, "-"), (PEERS, ":")):
        for name, (colour, marker) in names.items():
            points = sorted((r["bits"], r["sqnr_db"]) for r in rows if r["what"] == name)
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colour, marker=marker, markersize=5, label=name)
    axes.set_xlabel("bits per weight as stored")
    axes.set_ylabel("SQNR of MiniLM's encoder weights, dB")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(sys.argv[1], dpi=130)


if __name__ == "__main__":
    main()
