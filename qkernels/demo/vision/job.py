"""The vision demo from start to end, as the terminal shows it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo import evaluate
from qkernels.demo.contenders import REFERENCE
from qkernels.demo.job import accuracy as batch_accuracy
from qkernels.demo.job import folder_for_results, heading, show_reloaded
from qkernels.demo.loop import progress_bar
from qkernels.demo.reload import save_and_reload
from qkernels.demo.vision import transfer
from qkernels.demo.vision.contenders import SCHEMES, STATIC, contenders, images
from qkernels.demo.vision.data import SIZE, Digits, example_batches
from qkernels.demo.vision.model import ResNet, build_folded
from qkernels.demo.vision.train import accuracy, scores_of
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.terminal import console as make_console

TITLE = "Digits 5 to 9, by a ResNet that knew 0 to 4"
# Images per batch that latency is measured on: one request, and a batch job.
BATCHES = (1, 32)


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Args:
        seeds: how many times all is done, each time with other data, weights and noise.
        source_epochs: of pretraining.
        epochs: of fine-tuning.
        latency_budget: seconds of timing for each batch size.
        report_batches: batches of 32 test images that the report and the reload check use.
    """

    seeds: int
    source_epochs: int
    epochs: int
    latency_budget: float
    report_batches: int


FULL = Plan(seeds=3, source_epochs=20, epochs=40, latency_budget=10, report_batches=8)
FAST = Plan(seeds=1, source_epochs=12, epochs=15, latency_budget=2, report_batches=2)


def run_vision(
    *, fast: bool, out: str, seed: int, threads: int | None, plan: Plan | None = None
) -> int:
    """Pretrain, transfer, quantize, measure, save, reload and report.

    Args:
        fast: use the small plan.
        out: folder for everything that is written; it is made if need be.
        seed: the first one.
        threads: threads to compute with, None for torch's choice.
        plan: how much of everything, instead of the plan that `fast` picks.

    Returns:
        0, or 1 if a reloaded model answers differently.

    Raises:
        OSError: the folder cannot be written.
        ValueError: it is a file.
    """
    start = time.perf_counter()
    plan = plan or (FAST if fast else FULL)
    if threads is not None:
        torch.set_num_threads(threads)
    console, folder = make_console(), folder_for_results(out)
    seeds = range(seed, seed + plan.seeds)

    heading(console, 1, "The data")
    data = [transfer.target_digits(s) for s in seeds]
    _show_data(console, data[0], plan)
    heading(console, 2, "Pretrain on 0 to 4, and transfer to 5 to 9")
    models, ladder = _transfer(console, plan, seeds, data)
    console.print(_ladder_table(ladder))

    heading(console, 3, "Quantize what was trained whole")
    by_seed = []
    for model, digits, s in zip(models, data, seeds, strict=True):
        found, summaries = contenders(model, example_batches(digits, 8, s))
        by_seed.append(found)
    listing = "\n".join(f"{name}\n{summary}\n" for name, summary in summaries.items())
    write_atomically(folder / "modules.txt", listing)
    console.print("The head stays float32. modules.txt says what became of every layer.")

    heading(console, 4, "Measure answers, size and speed")
    quality = _mean_quality(by_seed, data)
    inputs = {f"{n}×{SIZE}×{SIZE}": images(n, SIZE) for n in BATCHES}
    latency = evaluate.measure_latency(by_seed[0], inputs, plan.latency_budget, console)
    rows = evaluate.make_rows(by_seed[0], quality, latency)
    console.print()
    console.print(evaluate.as_table(rows))
    console.print()
    notes = _notes(data[0], plan)
    for line in notes:
        console.print(line)

    heading(console, 5, "Save, and reload in a fresh process")
    first, digits = by_seed[0], data[0]
    batches = [{"x": x} for x in digits.test.x.split(32)[: plan.report_batches]]
    labels = digits.test.labels.split(32)
    files = {name: folder / f"{name.lower().replace(' ', '-')}.safetensors" for name in SCHEMES}
    identical = save_and_reload(
        {name: first[name] for name in SCHEMES},
        files,
        batches,
        {"classes": list(digits.classes)},
        build_folded,
        len(digits.classes),
    )
    show_reloaded(console, files, identical)

    heading(console, 6, "Report")
    page = folder / "report.html"
    labelled = [{**b, "labels": y} for b, y in zip(batches, labels, strict=False)]
    qk.compare(
        first[STATIC],
        first[REFERENCE],
        labelled,
        metric=batch_accuracy,
        names=(STATIC, REFERENCE),
    ).save_html(page)
    machine = machine_facts()
    facts = {
        "task": TITLE,
        "seeds": list(seeds),
        "images": {"train": len(digits.train.x), "val": len(digits.val.x)}
        | {"test": len(digits.test.x)},
        "transfer": ladder,
        "models": [row.to_dict() for row in rows],
        "files": {
            name: {"name": path.name, "bytes": path.stat().st_size, "identical": identical[name]}
            for name, path in files.items()
        },
        "machine": machine,
        "seconds": time.perf_counter() - start,
    }
    write_atomically(folder / "table.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "table.md", _markdown(ladder, rows, notes, machine))
    console.print(f"{escape(str(folder))} holds the models, and the tables as table.md and .json.")
    console.print(f"Done in {time.perf_counter() - start:.0f} s. {STATIC} layer by layer:")
    console.print(f"[bold]{escape(str(page.resolve()))}[/bold]", soft_wrap=True)
    return 0 if all(identical.values()) else 1


Ladder = dict[str, dict[str, list[float] | int]]


def _transfer(
    console: Console, plan: Plan, seeds: range, data: list[Digits]
) -> tuple[list[ResNet], Ladder]:
    """The model of each seed that was trained whole; numbers trained and test accuracies by way."""
    ladder: Ladder = {}
    models = []

    def note(name: str, trained: int, model: nn.Module, digits: Digits) -> None:
        entry = ladder.setdefault(name, {"trained": trained, "test": []})
        tests = entry["test"]
        assert isinstance(tests, list)
        tests.append(accuracy(model, digits.test))

    with progress_bar(console) as bar:
        task = bar.add_task("training", total=plan.seeds * (len(transfer.WAYS) + 2))
        for seed, digits in zip(seeds, data, strict=True):
            source_data = transfer.source_digits(seed)
            source = transfer.pretrained(source_data, seed, plan.source_epochs)
            weights = sum(p.numel() for p in source.parameters())
            note("digits 0 to 4", weights, source, source_data)
            bar.advance(task)
            scratch = transfer.from_scratch(digits, seed, plan.epochs)
            note(transfer.SCRATCH, weights, scratch, digits)
            bar.advance(task)
            for name, way in transfer.WAYS.items():
                model, trains = transfer.transferred(source, digits, way, seed, plan.epochs)
                note(name, trains.trainable, model, digits)
                bar.advance(task)
            models.append(model)  # the last way trains everything
    return models, ladder


def _mean_quality(
    by_seed: list[dict[str, nn.Module]], data: list[Digits]
) -> dict[str, evaluate.Quality]:
    found = {}
    expected = [
        scores_of(models[REFERENCE], d.test.x) for models, d in zip(by_seed, data, strict=True)
    ]
    for name in by_seed[0]:
        each = [
            _quality(scores_of(models[name], d.test.x).float(), exact, d.test.labels)
            for models, d, exact in zip(by_seed, data, expected, strict=True)
        ]
        right, agrees, cosine = (statistics.fmean(q[i] for q in each) for i in range(3))
        spread = statistics.stdev(q[0] for q in each) if len(each) > 1 else None
        found[name] = evaluate.Quality(right, agrees, cosine, min(q[3] for q in each), spread)
    return found


def _quality(scores: Tensor, exact: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    answers = scores.argmax(1)
    cosine = F.cosine_similarity(scores, exact, dim=1)
    return (
        (answers == labels).float().mean().item(),
        (answers == exact.argmax(1)).float().mean().item(),
        cosine.mean().item(),
        cosine.min().item(),
    )


def _show_data(console: Console, data: Digits, plan: Plan) -> None:
    console.print(f"[bold]{TITLE}[/bold]")
    console.print(
        f"{len(data.train.x)} images to train on, {len(data.val.x)} to validate and "
        f"{len(data.test.x)} to test, from scikit-learn's digits, scaled up to {SIZE}×{SIZE}. They "
        "are turned, moved and made noisy at random, those to test more than those to train on. "
        f"Everything is done {plan.seeds} times, with other images, weights and noise."
    )


def _notes(data: Digits, plan: Plan) -> list[str]:
    return [
        f"accuracy: right answers on {len(data.test.x)} distorted test images, mean ± standard "
        f"deviation over {plan.seeds} seeds. agrees: same answer as float32.",
        "cosine, lowest: of the class scores with float32's.",
        "MB: parameters in memory. ms: median latency for images × pixels × pixels, the models "
        "taking turns in one process. speed: relative to float32.",
    ]


def _ladder_cells(ladder: Ladder) -> list[list[str]]:
    cells = []
    for name, entry in ladder.items():
        tests = entry["test"]
        assert isinstance(tests, list)
        text = f"{statistics.fmean(tests):.1%}"
        if len(tests) > 1:
            text += f" ± {statistics.stdev(tests):.1%}"
        cells.append([name, f"{entry['trained']:,}", text])
    return cells


def _ladder_table(ladder: Ladder) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("what trains", "parameters", "test accuracy"):
        table.add_column(column, justify="left" if column == "what trains" else "right")
    for cells in _ladder_cells(ladder):
        table.add_row(*cells)
    return table


def _markdown(
    ladder: Ladder, rows: list[evaluate.Row], notes: list[str], machine: dict[str, str]
) -> str:
    lines = [f"# {TITLE}", "", "| what trains | parameters | test accuracy |"]
    lines += [
        "| --- | ---: | ---: |",
        *("| " + " | ".join(c) + " |" for c in _ladder_cells(ladder)),
    ]
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    ends = "\n".join(f"- {line}" for line in [*notes, where])
    return "\n".join(lines) + f"\n\n{evaluate.as_markdown(rows)}\n{ends}\n"
