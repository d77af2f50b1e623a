"""How much of a model 4 bits keep: SQNR of its weights, and its answers after calibration.

    python benchmarks/accuracy.py                       # prints; about ten minutes on two cores
    python benchmarks/accuracy.py --output FOLDER       # also writes accuracy.json and accuracy.md
    python benchmarks/accuracy.py --part weights --output FOLDER     # the others are left as is

The model is all-MiniLM-L6-v2 as `qkernels demo` loads it. SQNR is 10·log10(Σ w² / Σ (w - ŵ)²) over
all weights of the linear layers of its encoder. Bits are per weight as stored, with scales and zero
points. Cosines are those of sentence embeddings with float32's, of 192 docstrings that calibration
has not seen. `accuracy_plot.py` draws SQNR over bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from four_bits import PEERS
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.optimize.groups import GroupFit
from qkernels.optimize.mse import fit_mse
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts

T = TypeVar("T")
CALIBRATION_TEXTS, TEST_TEXTS, BATCH = 256, 192, 32
SAMPLED = 16  # groups of each layer
PARTS = ("weights", "limits", "answers")
EMBEDDINGS = {"*.embeddings": qk.W8A16()}


@dataclass(frozen=True)
class WeightRow:
    """SQNR of one way to store the weights."""

    what: str
    group_size: int
    bits: float
    sqnr_db: float


@dataclass(frozen=True)
class AnswerRow:
    """Answers of one quantized model."""

    what: str
    scheme: str
    bits: float
    cosine_mean: float
    cosine_min: float


def weights_of(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def sqnr(weights: list[Tensor], approximate: Callable[[Tensor], Tensor]) -> float:
    signal = noise = 0.0
    for weight in weights:
        error = approximate(weight).double() - weight.double()
        noise += float(error.square().sum())
        signal += float(weight.double().square().sum())
    return 10 * math.log10(signal / noise)


def stored_bits(q: qk.Quantized) -> float:
    """Bits per weight in storage: codes, scales and zero points, which take a byte each."""
    return 8 * q.nbytes / q.shape.numel()


def weight_rows(weights: list[Tensor]) -> Iterable[WeightRow]:
    for peer in PEERS:
        for size in peer.sizes:
            found = sqnr(weights, lambda w, p=peer, s=size: p.store(w, s))
            yield WeightRow(peer.name, size, peer.bits(size), found)
    for size in (32, 64, 128):
        for scheme in schemes(size):
            yield from searched_rows(weights, scheme, qk.optimize.OPTIMIZERS)
    # With zero points these take the bits that HQQ takes in groups of 32, 64, 128 and 256.
    for size in (24, 48, 96, 192):
        for scheme in schemes(size):
            yield from searched_rows(weights, scheme, ("mse",))
    yield from searched_rows(weights, qk.W8A8(), qk.optimize.OPTIMIZERS)


def schemes(size: int) -> tuple[qk.Scheme, ...]:
    return (
        qk.W4A16(group_size=size, symmetric=True),
        qk.W4A16(group_size=size),
        qk.NF4(group_size=size),
    )


def kind_of(scheme: qk.Scheme) -> str:
    return scheme.format + ("" if scheme.symmetric else " asymmetric")


def searched_rows(
    weights: list[Tensor], scheme: qk.Scheme, optimizers: Iterable[str]
) -> Iterable[WeightRow]:
    for optimize in optimizers:

        def approximate(weight: Tensor, optimize: str = optimize) -> Tensor:
            return qk.optimize.search_scales(weight, scheme, optimize).dequantize()

        bits = stored_bits(qk.optimize.search_scales(weights[0], scheme, "minmax"))
        yield WeightRow(
            f"qkernels {kind_of(scheme)} {optimize}",
            scheme.group_size,
            bits,
            sqnr(weights, approximate),
        )


@dataclass(frozen=True)
class LimitRow:
    """What the search finds, and the best there is: every scale and zero point tried."""

    what: str
    group_size: int
    searched_db: float
    exhaustive_db: float


def limit_rows(weights: list[Tensor]) -> Iterable[LimitRow]:
    """Groups drawn from all layers alike; scales of 0.35 to 1.15 times what reaches the extremes.

    They are 0.3 % apart, which is less than a step of the bfloat16 that stores them.
    """
    generator = torch.Generator().manual_seed(0)
    for size in (32, 64, 128):
        groups = torch.cat([drawn(w.reshape(-1, size), generator) for w in weights])[None]
        power = float(groups.double().square().sum())
        for scheme in schemes(size):
            searched, every = (GroupFit(groups, None, scheme) for _ in range(2))
            fit_mse(searched)
            start, zero_points = every.scale.float(), [None]
            if every.zero_point is not None:
                form = every.form
                low, high = (c * form.zero_steps for c in (form.lowest_code, form.highest_code))
                zero_points = [torch.full_like(every.zero_point, z) for z in range(low, high + 1)]
            for share in torch.logspace(math.log10(0.35), math.log10(1.15), 400):
                for zero_point in zero_points:
                    every.offer(start * share, zero_point)
                    if zero_point is None:
                        every.offer(start * -share, None)
            found = [
                10 * math.log10(power / float(f.error.double().sum())) for f in (searched, every)
            ]
            yield LimitRow(kind_of(scheme), size, *found)


def drawn(groups: Tensor, generator: torch.Generator) -> Tensor:
    return groups[torch.randperm(len(groups), generator=generator)[:SAMPLED]]


# ---- Answers -------------------------------------------------------------------------------------


def embeddings(model: SentenceClassifier, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.embed(**batch) for batch in batches])


def linear_bits(model: SentenceClassifier) -> float:
    """Bits per weight of the quantized linear layers, as stored, factors of x included."""
    stored = weights = 0.0
    for module in model.modules():
        if isinstance(module, qk.nn.QLinear):
            q = module.quantized_weight()
            extra = sum(b.nbytes for b in module.buffers())
            stored += stored_bits(q) * q.shape.numel() + 8 * extra
            weights += q.shape.numel()
    return stored / weights


def answer_rows(model: SentenceClassifier) -> Iterable[AnswerRow]:
    data, tokenizer = docstring_dataset(600, 0), Tokenizer()
    calibration, test = (
        [batch for _, batch in tokenizer.batches([e.text for e in examples], BATCH)]
        for examples in (data.train[:CALIBRATION_TEXTS], data.test[:TEST_TEXTS])
    )
    expected = embeddings(model, test)
    for scheme, methods in METHODS.items():
        for what, convert in methods.items():
            quantized = copy.deepcopy(model)
            convert(quantized, calibration, {"*": scheme, **EMBEDDINGS})
            cosine = F.cosine_similarity(embeddings(quantized, test), expected, dim=1)
            yield AnswerRow(
                what,
                repr(scheme),
                linear_bits(quantized),
                float(cosine.mean()),
                float(cosine.min()),
            )


def without_data(optimize: str) -> Callable[..., qk.Summary]:
    return lambda model, batches, scheme: qk.quantize_(
        model, scheme, ignore="head", optimize=optimize
    )


def with_data(*method: str, **options: str) -> Callable[..., qk.Summary]:
    return lambda model, batches, scheme: qk.quantize_calibrated_(
        model,
        batches,
        scheme,
        method,
        ignore="head",
        call=lambda m, batch: m.embed(**batch),
        **options,
    )


FOR_4_BITS = {
    "to nearest": without_data("minmax"),
    "mse": without_data("mse"),
    "hqq": without_data("hqq"),
    "gptq": with_data("gptq"),
    "awq": with_data("awq"),
    "awq + gptq": with_data("awq", "gptq"),
    "gptq + bias correction": with_data("gptq", "bias_correction"),
}
METHODS: dict[qk.Scheme, dict[str, Callable[..., qk.Summary]]] = {
    qk.W4A16(group_size=64): {
        **FOR_4_BITS,
        "gptq, permuted": with_data("gptq", act_order="permute"),
    },
    qk.W4A16(group_size=32, symmetric=True): FOR_4_BITS,
    qk.W8A8(): {"to nearest": without_data("minmax"), "smoothquant": with_data("smoothquant")},
}


def markdown(found: dict[str, Any]) -> str:
    lines = ["# 4-bit accuracy on all-MiniLM-L6-v2"]
    for part, (title, heading, cells) in PAGE.items():
        if part in found:
            columns = ["---:" if name in NUMBERS else "---" for name in heading.split(" | ")]
            lines += ["", title, "", f"| {heading} |", f"| {' | '.join(columns)} |"]
            lines += [f"| {cells(**row)} |" for row in found[part]["rows"]]
    lines.append("")
    for part in PARTS:
        if part in found:
            facts = ", ".join(f"{key} {value}" for key, value in found[part]["machine"].items())
            lines.append(f"- {part}: {facts}")
    return "\n".join([*lines, ""])


NUMBERS = ("group", "bits", "dB", '"mse", dB', "exhaustive, dB", "mean", "lowest")
PAGE: dict[str, tuple[str, str, Callable[..., str]]] = {
    "weights": (
        "SQNR of the encoder's weights, and the bits that each weight takes as stored:",
        " | group | bits | dB",
        "{what} | {group_size} | {bits:.3f} | {sqnr_db:.2f}".format,
    ),
    "limits": (
        f"Every scale and zero point tried, for {SAMPLED} groups of each layer:",
        ' | group | "mse", dB | exhaustive, dB',
        "{what} | {group_size} | {searched_db:.3f} | {exhaustive_db:.3f}".format,
    ),
    "answers": (
        f"Cosine of {TEST_TEXTS} sentence embeddings with float32's:",
        "scheme | how | bits | mean | lowest",
        "{scheme} | {what} | {bits:.3f} | {cosine_mean:.4f} | {cosine_min:.4f}".format,
    ),
}


def said(rows: Iterable[T]) -> Iterable[T]:
    """The rows, each printed when it is there: all of them take a while."""
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for accuracy.json and accuracy.md")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    arguments = parser.parse_args()
    model = build_model(10, 0)
    weights = weights_of(model.encoder)
    rows: dict[str, Callable[[], Iterable[Any]]] = {
        "weights": lambda: weight_rows(weights),
        "limits": lambda: limit_rows(weights),
        "answers": lambda: answer_rows(model),
    }
    file = None if arguments.output is None else arguments.output / "accuracy.json"
    found: dict[str, Any] = {}
    if file is not None and arguments.part and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    for part in arguments.part or PARTS:
        values = [asdict(row) for row in said(rows[part]())]
        found[part] = {"rows": values, "machine": machine_facts()}
    page = markdown(found)
    print(page)
    if file is not None:
        write_atomically(file, json.dumps(found, indent=2) + "\n")
        write_atomically(file.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
