"""The demo from start to end, as the terminal shows it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

import qkernels as qk
from qkernels.demo import contenders, evaluate
from qkernels.demo.data import Dataset, csv_dataset, docstring_dataset
from qkernels.demo.model import Batch, SentenceClassifier, Tokenizer, build_model
from qkernels.demo.reload import save_and_reload
from qkernels.demo.train import fine_tune, labels, test_accuracy, train_head
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.summary import size_text
from qkernels.terminal import console as make_console

# The scheme that the HTML page is about.
REPORTED = contenders.label(qk.W8A8())


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Args:
        per_library: docstrings of each library at most.
        rows: texts of a CSV file at most.
        layers: last encoder layers that are fine-tuned.
        epochs: of fine-tuning.
        lr: learning rate of fine-tuning.
        latency_budget: seconds of timing for each shape.
        report_batches: batches of 32 test texts that the report and the reload check use.
    """

    per_library: int
    rows: int
    layers: int
    epochs: int
    lr: float
    latency_budget: float
    report_batches: int


FULL = Plan(
    per_library=600, rows=6000, layers=3, epochs=3, lr=1e-4, latency_budget=15, report_batches=8
)
FAST = Plan(
    per_library=150, rows=1500, layers=2, epochs=1, lr=2e-4, latency_budget=3, report_batches=2
)


def run_demo(
    *,
    fast: bool = False,
    text: str | None = None,
    out: str = "qkernels-demo",
    seed: int = 0,
    threads: int | None = None,
    plan: Plan | None = None,
) -> int:
    """Fine-tune, quantize, measure, save, reload and report.

    Args:
        fast: use the small plan.
        text: a CSV file with the columns text and label, or None for docstrings.
        out: folder for everything that is written; it is made if need be.
        seed: of the data and the training.
        threads: threads to compute with, None for torch's choice.
        plan: how much of everything, instead of the plan that `fast` picks.

    Returns:
        0, or 1 if a reloaded model answers differently.

    Raises:
        ValueError: the CSV file cannot be used.
        OSError: the folder cannot be written.
    """
    start = time.perf_counter()
    plan = plan or (FAST if fast else FULL)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is on the disk; nothing is to be looked up
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        torch.set_num_threads(threads)
    console = make_console()
    folder = folder_for_results(out)

    heading(console, 1, "The data")
    data = (
        csv_dataset(Path(text), seed, plan.rows)
        if text
        else docstring_dataset(plan.per_library, seed)
    )
    _show_data(console, data)
    tokenizer = Tokenizer()
    model = build_model(len(data.classes), seed)
    training = _train(console, plan, seed, data, tokenizer, model)
    by_scheme = _quantize(console, model, folder / "modules.txt")
    rows, missing = _measure(console, plan, data, tokenizer, model, by_scheme)

    heading(console, 6, "Save, and reload in a fresh process")
    batches = _first_batches(tokenizer, data, plan.report_batches)
    files = {name: folder / f"{name.lower().replace(' ', '-')}.safetensors" for name in by_scheme}
    identical = save_and_reload(
        by_scheme,
        files,
        [batch for batch, _ in batches],
        {"classes": data.classes},
        build_model,
        len(data.classes),
    )
    show_reloaded(console, files, identical)

    heading(console, 7, "Report")
    page = folder / "report.html"
    _report(model, by_scheme[REPORTED], batches).save_html(page)
    machine = machine_facts()
    facts = {
        "task": data.title,
        "texts": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "classes": data.classes,
        "majority": data.majority(),
        "training": training,
        "seed": seed,
        "models": [row.to_dict() for row in rows],
        "missing": missing,
        "files": {
            name: {"name": path.name, "bytes": path.stat().st_size, "identical": identical[name]}
            for name, path in files.items()
        },
        "machine": machine,
        "seconds": time.perf_counter() - start,
    }
    write_atomically(folder / "table.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "table.md", _markdown(data, rows, missing, machine))
    console.print(
        f"{escape(str(folder))} holds the models, the table above as table.md and table.json, and "
        "modules.txt, which says what became of every layer."
    )
    console.print(f"Done in {time.perf_counter() - start:.0f} s. {REPORTED} layer by layer:")
    console.print(f"[bold]{escape(str(page.resolve()))}[/bold]", soft_wrap=True)
    return 0 if all(identical.values()) else 1


def folder_for_results(out: str) -> Path:
    """The folder that --out names, made if need be.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be made.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder to write the results into")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _train(
    console: Console,
    plan: Plan,
    seed: int,
    data: Dataset,
    tokenizer: Tokenizer,
    model: SentenceClassifier,
) -> dict[str, dict[str, float]]:
    heading(console, 2, "Train a head on the frozen encoder")
    train_head(model, tokenizer, data, console)
    head = _show_accuracy(console, model, tokenizer, data)
    layers = "layer" if plan.layers == 1 else f"{plan.layers} layers"
    heading(console, 3, f"Fine-tune the last {layers} of the encoder with it")
    fine_tune(model, tokenizer, data, console, seed, plan.layers, plan.epochs, lr=plan.lr)
    return {"head": head, "fine-tuned": _show_accuracy(console, model, tokenizer, data)}


def _quantize(
    console: Console, model: SentenceClassifier, listing: Path
) -> dict[str, SentenceClassifier]:
    heading(console, 4, "Quantize")
    found: dict[str, SentenceClassifier] = {}
    summaries = []
    for scheme in contenders.SCHEMES:
        start = time.perf_counter()
        name = contenders.label(scheme)
        found[name], summary = contenders.quantized(model, scheme)
        summaries.append(f"{scheme}\n{summary}\n")
        console.print(
            f"{name:10} {len(summary.converted)} layers in {time.perf_counter() - start:.1f} s: "
            f"{size_text(summary.bytes_before)} → {size_text(summary.bytes_after)}"
        )
    write_atomically(listing, "\n".join(summaries))
    console.print("The head stays float32. The embedding tables have 8 bits in every scheme.")
    return found


def _measure(
    console: Console,
    plan: Plan,
    data: Dataset,
    tokenizer: Tokenizer,
    model: SentenceClassifier,
    by_scheme: dict[str, SentenceClassifier],
) -> tuple[list[evaluate.Row], list[str]]:
    heading(console, 5, "Measure answers, size and speed")
    models, missing = contenders.contenders(model, by_scheme)
    quality = evaluate.measure_quality(models, tokenizer, data.test, console)
    inputs = evaluate.token_inputs(model.vocabulary)
    latency = evaluate.measure_latency(models, inputs, plan.latency_budget, console)
    rows = evaluate.make_rows(models, quality, latency)
    console.print()
    console.print(evaluate.as_table(rows))
    console.print()
    for line in [*_explanation(data, rows[0].quality), *missing]:
        console.print(line)
    return rows, missing


def show_reloaded(
    console: Console, files: Mapping[str, Path], identical: Mapping[str, bool]
) -> None:
    """Print each file's size, and whether it gave the same outputs again."""
    for name, path in files.items():
        verdict = "same outputs to the bit" if identical[name] else "[red]OUTPUTS DIFFER[/red]"
        console.print(f"{name:12} {size_text(path.stat().st_size):>8} {path.name:26} {verdict}")


def heading(console: Console, number: int, text: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {text}[/bold]", align="left")


def _show_data(console: Console, data: Dataset) -> None:
    console.print(f"[bold]{escape(data.title)}[/bold]")
    console.print(f"{len(data.classes)} classes: {escape(', '.join(data.classes))}.")
    console.print(
        f"{len(data.train)} texts to train on, {len(data.val)} to validate, {len(data.test)} to "
        f"test. Always giving the commonest answer would be right for {data.majority():.1%}."
    )
    example = data.test[0]
    console.print(
        f"For example, from {escape(data.classes[example.label])}: “{escape(example.text)}”"
    )


def _show_accuracy(
    console: Console, model: SentenceClassifier, tokenizer: Tokenizer, data: Dataset
) -> dict[str, float]:
    found = {
        "val": test_accuracy(model, tokenizer, data.val),
        "test": test_accuracy(model, tokenizer, data.test),
    }
    console.print(
        f"Accuracy: {found['val']:.1%} validation, [bold]{found['test']:.1%} test[/bold]."
    )
    return found


def _explanation(data: Dataset, reference: evaluate.Quality) -> list[str]:
    count, chance = len(data.test), data.majority()
    share = (reference.accuracy * count + 1) / (count + 2)  # Laplace's, so that 100% has an error
    error = math.sqrt(share * (1 - share) / count)
    return [
        f"accuracy: right answers on {count} test texts (± {error:.1%}); always giving the "
        f"commonest one makes {chance:.1%}.",
        "agrees: same answer as float32. cosine, lowest: of sentence embeddings with float32's.",
        "MB: parameters in memory. ms: median latency for sentences × tokens, the models taking "
        "turns in one process. speed: relative to float32.",
    ]


def _markdown(
    data: Dataset, rows: list[evaluate.Row], missing: list[str], machine: dict[str, str]
) -> str:
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    notes = "\n".join(
        f"- {line}" for line in [*_explanation(data, rows[0].quality), *missing, where]
    )
    return f"# {data.title}\n\n{evaluate.as_markdown(rows)}\n{notes}\n"


def _first_batches(tokenizer: Tokenizer, data: Dataset, count: int) -> list[tuple[Batch, Tensor]]:
    chosen = data.test[: 32 * count]
    target = labels(chosen)
    found = tokenizer.batches([e.text for e in chosen], 32)
    return [(batch, target[positions]) for positions, batch in found]


def accuracy(scores: Tensor, batch: Mapping[str, Tensor]) -> float:
    """Share of right answers in a batch: what the report calls accuracy."""
    return (scores.argmax(1) == batch["labels"]).float().mean().item()


def _report(
    model: SentenceClassifier,
    quantized: SentenceClassifier,
    batches: list[tuple[Batch, Tensor]],
) -> qk.Report:
    return qk.compare(
        quantized,
        model,
        [{**batch, "labels": target} for batch, target in batches],
        metric=accuracy,
        names=(REPORTED, contenders.REFERENCE),
    )
