"""Mixed precision on a real model: does a searched plan beat every uniform scheme of its latency?

    python benchmarks/mixed_precision.py                     # prints; some minutes on two cores
    python benchmarks/mixed_precision.py --output FOLDER     # also writes mixed_precision.json, .md
    python benchmarks/mixed_precision.py --plot FILE         # also draws the Pareto fronts
    python benchmarks/mixed_precision.py --checkpoint FILE   # keeps what layers cost in accuracy

The model is all-MiniLM-L6-v2 as `qkernels demo` loads it; what counts are its sentence embeddings.
`qk.search` sees 64 docstrings; every number in the tables is measured on 64 others, and times are
the shortest of models taking turns in one process. Timings need a quiet machine: run it with
`--checkpoint` first and then again while nothing else runs, when only timing is left to do.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.mixed.search import LATENCY_SLACK
from qkernels.report.accumulate import Noise
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.timing import interleave

SEARCH_TEXTS, TEST_TEXTS, BATCH = 64, 64, 32
SHAPES = {"1×32": (1, 32), "8×64": (8, 64)}
# Sizes in percent of float32 for which the best plan is sought, and dB for which the fastest is.
SIZES, SQNRS = (22, 30), (20, 25)
# Times that cannot be told apart, as search has it.
ALIKE = 1 + LATENCY_SLACK


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
    """A uniform scheme and the most accurate plan that takes no more time."""

    batch: str
    uniform: Row
    plan: Row

    @property
    def won(self) -> bool:
        """More accurate, and within what can be told apart no slower."""
        return self.plan.sqnr_db > self.uniform.sqnr_db and (
            self.plan.latency <= self.uniform.latency * ALIKE
        )


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


def shares_of_time(
    models: dict[str, SentenceClassifier],
    reference: SentenceClassifier,
    batch: dict[str, Tensor],
    seconds: float,
) -> dict[str, float]:
    """Times over float32's, all models taking turns; of each the fastest run."""
    contenders = {"float32": reference, **models}
    calls = {name: (lambda m=m: embed(m, batch)) for name, m in contenders.items()}
    with torch.inference_mode():
        times = interleave(calls, min_rounds=9, max_rounds=300, budget=seconds)
    return {name: times[name].min / times["float32"].min for name in models}


@dataclass
class Contest:
    """What models are measured with."""

    reference: SentenceClassifier
    batch: dict[str, Tensor]
    test: list[Any]
    seconds: float

    def __post_init__(self) -> None:
        self.size = qk.report.model_bytes(self.reference)
        self.expected = embeddings(self.reference, self.test)

    def rows(self, models: dict[str, SentenceClassifier], predicted: dict[str, float]) -> list[Row]:
        latency = shares_of_time(models, self.reference, self.batch, self.seconds)
        return [
            Row(
                name,
                latency[name],
                qk.report.model_bytes(m) / self.size,
                predicted.get(name),
                sqnr(embeddings(m, self.test), self.expected),
            )
            for name, m in models.items()
        ]

    def duel(self, shape: str, plan: qk.PrecisionPlan, scheme: str) -> Duel:
        """The most accurate plan that is, measured beside the scheme, no slower than it."""
        uniform = quantized(self.reference, eval(f"qk.{scheme}"))
        choice = uniform_choice(plan, scheme)
        allowed, fastest = plan.cost_of(choice).seconds, plan.replan({"sqnr": -99}, "latency")
        for _ in range(4):
            rival = plan.replan({"seconds": allowed}, "accuracy")
            models = {"uniform": uniform, "plan": quantized(self.reference, rival)}
            found = shares_of_time(models, self.reference, self.batch, self.seconds / 2)
            over = found["plan"] / found["uniform"]
            if over <= ALIKE or allowed <= fastest.predicted.seconds:
                break
            allowed = max(allowed / over * 0.99, fastest.predicted.seconds * 1.0001)
        rows = self.rows(models, {"plan": rival.predicted.quality})
        return Duel(shape, replace(rows[0], what=scheme), rows[1])


def uniform_choice(plan: qk.PrecisionPlan, scheme: str) -> list[int]:
    """The options of a model with one scheme for all layers; an Embedding takes any like it."""
    wanted = next(o.scheme for x in plan.layers for o in x.options if repr(o.scheme) == scheme)
    return [
        next(
            i
            for i, o in enumerate(layer.options)
            if o.scheme == wanted
            or (layer.kind == "Embedding" and o.scheme and o.scheme.shares_weight_with(wanted))
        )
        for layer in plan.layers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--plot", type=Path, help="file for the Pareto fronts of 8×64")
    parser.add_argument("--checkpoint", type=Path, help="file for what is measured of each layer")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each set of timings")
    arguments = parser.parse_args()
    model, tokenizer, data = build_model(10, 0), Tokenizer(), docstring_dataset(100, 0)
    calibration, test = (
        [batch for _, batch in tokenizer.batches([e.text for e in examples], BATCH)]
        for examples in (data.train[:SEARCH_TEXTS], data.test[:TEST_TEXTS])
    )
    duels: list[Duel] = []
    budgets: list[Row] = []
    for shape, size in SHAPES.items():
        batch = timed_batch(*size)
        plan = qk.search(
            model,
            calibration,
            {"sqnr": 25},
            ignore="head",
            latency_batches=[batch],
            latency_seconds=arguments.seconds,
            checkpoint=arguments.checkpoint,
            call=embed,
        )
        print(plan)
        contest = Contest(model, batch, test, arguments.seconds)
        duels += [contest.duel(shape, plan, name) for name, _ in plan.uniform]
        if shape != "8×64":
            continue
        if arguments.plot is not None:
            plan.plot(arguments.plot)
        wanted = {f"size ≤ {s} %, most accurate": ({"size": s / 100}, "accuracy") for s in SIZES}
        wanted |= {f"SQNR ≥ {s} dB, fastest": ({"sqnr": s}, "latency") for s in SQNRS}
        wanted |= {f"SQNR ≥ {s} dB, smallest": ({"sqnr": s}, "size") for s in SQNRS}
        plans = {name: plan.replan(*how) for name, how in wanted.items()}
        models = {name: quantized(model, p) for name, p in plans.items()}
        predicted = {name: p.predicted.quality for name, p in plans.items()}
        budgets = contest.rows(models, predicted)
    facts = machine_facts()
    page = markdown(duels, budgets, facts)
    print(page)
    if arguments.output is not None:
        values = {
            "duels": [{**asdict(duel), "won": duel.won} for duel in duels],
            "budgets": [asdict(row) for row in budgets],
            "machine": facts,
        }
        # JSON has no infinity, which identical answers have.
        text = json.dumps(values, indent=2, ensure_ascii=False).replace("Infinity", '"inf"') + "\n"
        write_atomically(arguments.output / "mixed_precision.json", text)
        write_atomically(arguments.output / "mixed_precision.md", page)


def markdown(duels: list[Duel], budgets: list[Row], facts: dict[str, str]) -> str:
    def cells(row: Row) -> str:
        return f"{100 * row.latency:.1f} % | {100 * row.size:.1f} % | {row.sqnr_db:.1f}"

    lines = ["# Mixed precision on all-MiniLM-L6-v2", ""]
    lines += ["Shares are of float32's, SQNR in dB of sentence embeddings that the search has not"]
    lines += [
        "seen. A plan is the most accurate one as fast as the scheme, timed beside it, within 2 %.",
        "",
    ]
    lines += [
        "| batch | scheme for all layers | latency | size | SQNR | plan: latency | size | SQNR |"
    ]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {d.batch} | {d.uniform.what} | {cells(d.uniform)} | {cells(d.plan)} |" for d in duels
    ]
    lines += ["", "Other budgets, for batches of 8×64 tokens:", ""]
    lines += [
        "| budget | latency | size | SQNR | predicted |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {r.what} | {cells(r)} | {r.predicted_db:.1f} |" for r in budgets]
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in facts.items()), ""])


if __name__ == "__main__":
    main()
