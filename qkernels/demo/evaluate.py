"""What each model answers, how fast, and in how many bytes: the rows of the demo's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qkernels.demo.contenders import REFERENCE
from qkernels.demo.data import Example
from qkernels.demo.loop import progress_bar
from qkernels.demo.model import Batch, SentenceClassifier, Tokenizer
from qkernels.demo.train import accuracy, embed_all
from qkernels.report.size import model_bytes
from qkernels.timing import interleave

# Shapes that latency is measured on, sentences × tokens: one request, and a batch job.
SHAPES = ((1, 32), (32, 128))
# Small requests run this often in a row, as in a server, so that caches hold what they would there.
_CALLS_IN_A_ROW = 5


@dataclass(frozen=True)
class Quality:
    """Answers of one model on the test texts, beside those of the float32 model.

    Args:
        accuracy: share of right answers.
        agreement: share of answers that are float32's.
        cosine_mean, cosine_min: of the sentence embeddings to float32's.
        spread: standard deviation of the accuracy over several seeds, if there were several; the
            other numbers are then means.
    """

    accuracy: float
    agreement: float
    cosine_mean: float
    cosine_min: float
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """One model's line in the table.

    Args:
        name: of the model.
        quality: its answers.
        bytes: its parameters and buffers in memory.
        milliseconds: median latency by shape ("1×32").
        speedup: by shape, how many times faster than float32 in the same run.
    """

    name: str
    quality: Quality
    bytes: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types, the quality's fields beside the others."""
        plain = asdict(self)
        return {"name": plain.pop("name"), **plain.pop("quality"), **plain}


def measure_quality(
    models: Mapping[str, SentenceClassifier],
    tokenizer: Tokenizer,
    examples: list[Example],
    console: Console,
) -> dict[str, Quality]:
    """Let every model answer all examples.

    Args:
        models: by name, the reference among them and first.
        tokenizer: makes their batches, the same for all.
        examples: the test texts.
        console: for a progress bar.
    """
    found: dict[str, Quality] = {}
    expected: Tensor | None = None
    answers: Tensor | None = None
    with torch.inference_mode(), progress_bar(console) as bar:
        task = bar.add_task("answering", total=len(models) * len(examples))
        for name, model in models.items():
            bar.update(task, description=f"answering: {name}")
            embeddings = embed_all(
                model, tokenizer, examples, lambda count: bar.advance(task, count)
            )
            scores = model.head(embeddings).float()
            if expected is None or answers is None:
                expected, answers = embeddings, scores.argmax(1)
            cosine = F.cosine_similarity(embeddings.float(), expected, dim=1)
            found[name] = Quality(
                accuracy(scores, examples),
                (scores.argmax(1) == answers).float().mean().item(),
                cosine.mean().item(),
                cosine.min().item(),
            )
    return found


def token_inputs(vocabulary: int) -> dict[str, Batch]:
    """Batches of random tokens by the name of their shape, to measure latency with.

    Args:
        vocabulary: number of token ids.
    """
    return {shape_name(shape): _tokens(shape, vocabulary) for shape in SHAPES}


def measure_latency(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Batch],
    budget: float,
    console: Console,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of every model on every input, interleaved in this process.

    Args:
        models: by name.
        inputs: keyword arguments by the name of their shape.
        budget: seconds for each shape, after a round of warm-up and three timed rounds.
        console: for a progress bar.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    with torch.inference_mode(), progress_bar(console) as bar:
        task = bar.add_task("timing", total=len(inputs))
        for shape, batch in inputs.items():
            calls = _CALLS_IN_A_ROW if len(next(iter(batch.values()))) == 1 else 1
            timings = interleave(
                {name: _calls(model, batch, calls) for name, model in models.items()},
                warmup=1,
                min_rounds=3,
                budget=budget,
            )
            for name, timing in timings.items():
                found[name][shape] = timing.median * 1e3 / calls
            bar.advance(task)
    return found


def shape_name(shape: tuple[int, int]) -> str:
    """Sentences × tokens as text."""
    return f"{shape[0]}×{shape[1]}"


def _tokens(shape: tuple[int, int], vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _calls(model: nn.Module, batch: Batch, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            model(**batch)

    return run


def make_rows(
    models: Mapping[str, nn.Module],
    quality: Mapping[str, Quality],
    latency: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """The lines of the table, from what was measured by model name."""
    base = latency[REFERENCE]
    return [
        Row(
            name,
            quality[name],
            model_bytes(model),
            dict(latency[name]),
            {shape: base[shape] / ms for shape, ms in latency[name].items()},
        )
        for name, model in models.items()
    ]


_HEADINGS = ("model", "accuracy", "agrees", "cosine", "lowest", "MB")


def _cells(row: Row) -> list[str]:
    q = row.quality
    cells = [
        row.name,
        f"{q.accuracy:.1%}" + ("" if q.spread is None else f" ± {q.spread:.1%}"),
        f"{q.agreement:.1%}",
        f"{q.cosine_mean:.4f}",
        f"{q.cosine_min:.4f}",
        _megabytes(row.bytes),
    ]
    for shape, ms in row.milliseconds.items():
        cells += [_three_digits(ms), _three_digits(row.speedup[shape]) + "×"]
    return cells


def _megabytes(count: int) -> str:
    size = count / (1 << 20)
    return f"{size:.{1 if size >= 10 else 3}f}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _headings(rows: list[Row]) -> list[str]:
    return [*_HEADINGS, *(h for shape in rows[0].milliseconds for h in (f"{shape} ms", "speed"))]


def as_table(rows: list[Row]) -> Table:
    """The rows for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    for i, heading in enumerate(_headings(rows)):
        # The unit goes below the shape, so that the table fits 80 columns.
        heading = heading.removesuffix(" ms") + "\nms" if heading.endswith(" ms") else heading
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def as_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    headings = _headings(rows)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
