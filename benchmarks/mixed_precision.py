"""Mixed precision on a real model: does a searched plan beat every uniform scheme of its latency?

    python benchmarks/mixed_precision.py                     # prints; some minutes on two cores
    python benchmarks/mixed_precision.py --output FOLDER     # also writes mixed_precision.json, .md
    python benchmarks/mixed_precision.py --plot FILE         # also draws the Pareto fronts
    python benchmarks/mixed_precision.py --checkpoint FILE   # keeps what layers cost in accuracy
    python benchmarks/mixed_precision.py --part 1×32 --output FOLDER    # the others are left as is

The model is all-MiniLM-L6-v2 as `qkernels demo` loads it; what counts are its sentence embeddings.
`qk.search` sees 64 docstrings, and is given the time of each scheme for all layers, as it measured
it, as its budget. SQNR is measured on 64 other docstrings. Scheme and plan are then timed again, as
`quantize_` makes them, taking turns. Timings need a quiet machine: run it with `--checkpoint`
first and then again while nothing else runs, when only timing is left to do.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.mixed.choosing import LATENCY_SLACK
from qkernels.report.accumulate import Noise
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.timing import Ratio, clock, take_turns

SEARCH_TEXTS, TEST_TEXTS, BATCH = 64, 64, 32
SHAPES = {"1×32": (1, 32), "8×64": (8, 64)}
BUDGETS = "budgets at 8×64"
PARTS = (*SHAPES, BUDGETS)
# Sizes in percent of float32 for which the best plan is sought, and dB for which the fastest is.
SIZES, SQNRS = (22, 30), (20, 25)


@dataclass(frozen=True)
class Row:
    """One model: latency and size are shares of float32's, SQNR is in dB."""

    what: str
    latency: float
    size: float
    predicted_db: float | None
    sqnr_db: float


@dataclass(frozen=True)
class Duel:
    """A uniform scheme, the plan that search chose for its latency, and both timed again."""

    uniform: Row
    plan: Row
    same: bool
    ratio: Ratio

    @property
    def kept(self) -> bool:
        """Not shown to be slower than what can be told apart."""
        return self.ratio.low <= 1 + LATENCY_SLACK


def embed(model: SentenceClassifier, batch: dict[str, Tensor]) -> Tensor:
    return model.embed(**batch)


def timed_batch(rows: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def quantized(model: SentenceClassifier, scheme: Any) -> SentenceClassifier:
    made = copy.deepcopy(model)
    qk.quantize_(made, scheme, ignore="head")
    return made


def embeddings(model: SentenceClassifier, batches: list[Any]) -> list[Tensor]:
    with torch.inference_mode():
        return [embed(model, batch) for batch in batches]


def sqnr(outputs: list[Tensor], expected: list[Tensor]) -> float:
    noise = Noise()
    for output, reference in zip(outputs, expected, strict=True):
        noise.add(output, reference)
    assert noise.sqnr_db is not None
    return noise.sqnr_db


@dataclass
class Contest:
    """What models are searched with and measured by."""

    model: SentenceClassifier
    batch: dict[str, Tensor]
    calibration: list[Any]
    test: list[Any]
    seconds: float
    checkpoint: Path | None

    def __post_init__(self) -> None:
        self.size = qk.report.model_bytes(self.model)
        self.expected = embeddings(self.model, self.test)
        self.base: qk.PrecisionPlan | None = None
        # Five schemes and float32, twice each: this takes more time than two models.
        self.base = self.search({"sqnr": SQNRS[-1]}, "latency", 3 * self.seconds)

    def search(
        self, budget: dict[str, float], objective: str, seconds: float | None = None
    ) -> qk.PrecisionPlan:
        """What a user gets; layers are measured once."""
        return qk.search(
            self.model,
            self.calibration,
            budget,
            objective,
            ignore="head",
            latency_batches=[self.batch],
            latency_seconds=self.seconds if seconds is None else seconds,
            checkpoint=self.checkpoint,
            measured=self.base,
            call=embed,
        )

    def row(
        self, what: str, model: SentenceClassifier, seconds: float, predicted: float | None
    ) -> Row:
        assert self.base is not None
        return Row(
            what,
            seconds / self.base.reference.seconds,
            qk.report.model_bytes(model) / self.size,
            predicted,
            sqnr(embeddings(model, self.test), self.expected),
        )

    def planned(self, what: str, plan: qk.PrecisionPlan) -> Row:
        model = quantized(self.model, plan)
        return self.row(what, model, plan.cost.seconds, plan.predicted.quality)

    def duels(self) -> Iterator[Duel]:
        """Every scheme beside what search chooses if its latency is the budget."""
        assert self.base is not None
        for name, cost in self.base.uniform:
            plan = self.search({"seconds": cost.seconds}, "accuracy")
            print(plan)
            models = {
                "plan": quantized(self.model, plan),
                "scheme": quantized(self.model, eval(f"qk.{name}")),
            }
            yield Duel(
                self.row(name, models["scheme"], cost.seconds, None),
                self.planned("the plan", plan),
                plan.measured == cost,
                self.ratio(models),
            )

    def ratio(self, models: dict[str, SentenceClassifier]) -> Ratio:
        """The time of the first of two models over the other's, taking turns."""

        def run(model: SentenceClassifier) -> float:
            start = clock()
            embed(model, self.batch)
            return clock() - start

        with torch.inference_mode():
            for model in models.values():
                run(model)
            calls = {name: partial(run, model) for name, model in models.items()}
            rounds = list(take_turns(calls, self.seconds, 9, 1000))
        first, other = models
        return Ratio.of([r[first] / r[other] for r in rounds])

    def budgets(self) -> Iterator[Row]:
        for size in SIZES:
            plan = self.search({"size": size / 100}, "accuracy")
            yield self.planned(f"size ≤ {size} %, most accurate", plan)
        for objective, goal in (("latency", "fastest"), ("size", "smallest")):
            for least in SQNRS:
                plan = self.search({"sqnr": least}, objective)
                yield self.planned(f"SQNR ≥ {least} dB, {goal}", plan)


def commit() -> str:
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--plot", type=Path, help="file for the Pareto fronts of 8×64")
    parser.add_argument("--checkpoint", type=Path, help="file for what is measured of each layer")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each pair of models")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    arguments = parser.parse_args()
    model, tokenizer, data = build_model(10, 0), Tokenizer(), docstring_dataset(100, 0)
    calibration, test = (
        [batch for _, batch in tokenizer.batches([e.text for e in examples], BATCH)]
        for examples in (data.train[:SEARCH_TEXTS], data.test[:TEST_TEXTS])
    )
    found: dict[str, Any] = {}
    file = None if arguments.output is None else arguments.output / "mixed_precision.json"
    if file is not None and arguments.part and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))["parts"]
    contests: dict[str, Contest] = {}
    for part in arguments.part or PARTS:
        shape = "8×64" if part == BUDGETS else part
        if shape not in contests:
            contests[shape] = Contest(
                model,
                timed_batch(*SHAPES[shape]),
                calibration,
                test,
                arguments.seconds,
                arguments.checkpoint,
            )
        contest = contests[shape]
        rows = contest.budgets() if part == BUDGETS else contest.duels()
        values = [
            {**asdict(row), **({"kept": row.kept} if isinstance(row, Duel) else {})} for row in rows
        ]
        facts = {**machine_facts(), "commit": commit()}
        found[part] = {"rows": values, "machine": facts}
        if part == BUDGETS and arguments.plot is not None:
            assert contest.base is not None
            contest.base.plot(arguments.plot)
    page = markdown(found)
    print(page)
    if file is not None:
        # JSON has no infinity, which identical answers have.
        text = json.dumps({"parts": found}, indent=2, ensure_ascii=False)
        write_atomically(file, text.replace("Infinity", '"inf"') + "\n")
        write_atomically(file.with_suffix(".md"), page)


def markdown(found: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> str:
        db = float(row["sqnr_db"])  # JSON has no infinity: there it is a string
        quality = "identical" if math.isinf(db) else f"{db:.1f}"
        return f"{100 * row['latency']:.1f} % | {100 * row['size']:.1f} % | {quality}"

    tolerance = f"{100 * LATENCY_SLACK:.0f} %"
    lines = [
        "# Mixed precision on all-MiniLM-L6-v2",
        "",
        "What `qk.search` chooses for accuracy if its budget is the time of one scheme for all",
        "layers. Shares are of float32's, SQNR is in dB of sentence embeddings that the search has",
        "not seen. The last column is the time of the plan over that of the scheme, both as",
        "`quantize_` makes them and taking turns after the search: median, and its 95 % interval.",
        f"Up to {tolerance} more count as the same time.",
        "",
        "| batch | one scheme | latency | size | SQNR | plan: latency | size | SQNR | time |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in SHAPES:
        for duel in found.get(part, {"rows": []})["rows"]:
            ratio, scheme = duel["ratio"], duel["uniform"]
            time = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            plan = "the scheme itself | | " if duel["same"] else cells(duel["plan"])
            lines.append(f"| {part} | {scheme['what']} | {cells(scheme)} | {plan} | {time} |")
    lines += [
        "",
        "Other budgets, for batches of 8×64 tokens; predicted is what layers add up to:",
        "",
        "| budget | latency | size | SQNR | predicted |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found.get(BUDGETS, {"rows": []})["rows"]:
        lines.append(f"| {row['what']} | {cells(row)} | {float(row['predicted_db']):.1f} |")
    lines.append("")
    for part in PARTS:
        if part in found:
            facts = ", ".join(f"{key} {value}" for key, value in found[part]["machine"].items())
            lines.append(f"- {part}: {facts}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
