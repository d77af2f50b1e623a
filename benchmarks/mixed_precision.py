"""Mixed precision on a real model: does a searched plan beat every uniform scheme of its latency?

    python benchmarks/mixed_precision.py                     # prints; some minutes on two cores
    python benchmarks/mixed_precision.py --output FOLDER     # also writes mixed_precision.json, .md
    python benchmarks/mixed_precision.py --plot FILE         # also draws the Pareto fronts
    python benchmarks/mixed_precision.py --checkpoint FILE   # keeps what layers cost in accuracy

The model is all-MiniLM-L6-v2 as `qkernels demo` loads it; what counts are its sentence embeddings.
`qk.search` sees 64 docstrings; every number in the tables is measured on 64 others, and times
are of models taking turns in one process. Timings need a quiet machine: run it with `--checkpoint`
first and then again while nothing else runs, when only timing is left to do.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.report.accumulate import Noise
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.timing import interleave

SEARCH_TEXTS, TEST_TEXTS, BATCH = 64, 64, 32
SHAPES = {"1×32": (1, 32), "8×64": (8, 64)}
# Sizes in percent of float32 for which the best plan is sought, and dB for which the fastest is.
SIZES, SQNRS = (22, 25, 30), (20, 25)


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
    """A uniform scheme and the most accurate plan that is predicted to take its time."""

    batch: str
    uniform: Row
    plan: Row

    @property
    def won(self) -> bool:
        """More accurate, and within what can be told apart no slower."""
        return self.plan.sqnr_db > self.uniform.sqnr_db and (
            self.plan.latency <= self.uniform.latency * 1.02
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


def measured(
    models: dict[str, SentenceClassifier],
    predicted: dict[str, float],
    reference: SentenceClassifier,
    batch: dict[str, Tensor],
    test: list[Any],
    seconds: float,
) -> dict[str, Row]:
    """Every model beside float32, all taking turns."""
    contenders = {"float32": reference, **models}
    calls = {name: (lambda m=m: embed(m, batch)) for name, m in contenders.items()}
    with torch.inference_mode():
        times = interleave(calls, min_rounds=5, max_rounds=200, budget=seconds)
    size, expected = qk.report.model_bytes(reference), embeddings(reference, test)
    return {
        name: Row(
            name,
            times[name].median / times["float32"].median,
            qk.report.model_bytes(m) / size,
            predicted.get(name),
            sqnr(embeddings(m, test), expected),
        )
        for name, m in models.items()
    }


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
        models, predicted = {}, {}
        for name, _ in plan.uniform:
            models[name] = quantized(model, eval(f"qk.{name}"))
            cost = plan.cost_of(uniform_choice(plan, name))
            rival = plan.replan({"seconds": cost.seconds}, "accuracy")
            models[f"plan as fast as {name}"] = quantized(model, rival)
            predicted[f"plan as fast as {name}"] = rival.predicted.quality
        found = measured(models, predicted, model, batch, test, arguments.seconds)
        duels += [
            Duel(shape, found[name], found[f"plan as fast as {name}"]) for name, _ in plan.uniform
        ]
        if shape != "8×64":
            continue
        if arguments.plot is not None:
            plan.plot(arguments.plot)
        wanted = {f"size ≤ {s} %": ({"size": s / 100}, "accuracy") for s in SIZES}
        wanted |= {f"SQNR ≥ {s} dB, fastest": ({"sqnr": s}, "latency") for s in SQNRS}
        wanted |= {f"SQNR ≥ {s} dB, smallest": ({"sqnr": s}, "size") for s in SQNRS}
        plans = {name: plan.replan(*how) for name, how in wanted.items()}
        models = {name: quantized(model, p) for name, p in plans.items()}
        predicted = {name: p.predicted.quality for name, p in plans.items()}
        budgets = list(measured(models, predicted, model, batch, test, arguments.seconds).values())
    facts = machine_facts()
    page = markdown(duels, budgets, facts)
    print(page)
    if arguments.output is not None:
        values = {
            "duels": [{**asdict(duel), "won": duel.won} for duel in duels],
            "budgets": [asdict(row) for row in budgets],
            "machine": facts,
        }
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_atomically(arguments.output / "mixed_precision.json", text)
        write_atomically(arguments.output / "mixed_precision.md", page)


def markdown(duels: list[Duel], budgets: list[Row], facts: dict[str, str]) -> str:
    def cells(row: Row) -> str:
        return f"{100 * row.latency:.1f} % | {100 * row.size:.1f} % | {row.sqnr_db:.1f}"

    lines = ["# Mixed precision on all-MiniLM-L6-v2", ""]
    lines += ["Shares are of float32's, SQNR in dB of sentence embeddings that the search has not"]
    lines += [
        "seen. A plan is the most accurate one that is predicted to take the scheme's time.",
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
