"""How much of a model 4 bits keep: SQNR of its weights, and its answers after calibration.

    python benchmarks/accuracy.py                       # prints; about ten minutes on two cores
    python benchmarks/accuracy.py --output FOLDER       # also writes accuracy.json and accuracy.md

The model is all-MiniLM-L6-v2 as `qkernels demo` loads it. SQNR is 10·log10(Σ w² / Σ (w - ŵ)²) over
all weights of the linear layers of its encoder. Cosines are those of sentence embeddings with
float32's, of 192 docstrings that calibration has not seen.
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
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts

T = TypeVar("T")
CALIBRATION_TEXTS, TEST_TEXTS, BATCH = 256, 192, 32
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


# ---- Other ways to store 4 bits, from their descriptions -----------------------------------------


def q4_0(groups: Tensor) -> Tensor:
    """GGUF's Q4_0: the element of the largest magnitude becomes code 0, 8 steps below zero."""
    at = groups.abs().argmax(-1, keepdim=True)
    scale = groups.gather(-1, at) / -8
    codes = (groups / scale + 8.5).floor().clamp(0, 15)
    return (codes - 8) * scale.half().float()


def q4_1(groups: Tensor) -> Tensor:
    """GGUF's Q4_1: an fp16 scale and an fp16 minimum."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale + 0.5).floor().clamp(0, 15)
    return codes * scale.half().float() + low.half().float()


def hqq(groups: Tensor) -> Tensor:
    """HQQ with the settings of its authors' code, an fp16 scale and an fp16 zero point."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (15 / (high - low)).clamp(max=2e4)
    zero = -low * scale
    best, beta = float("inf"), 10.0
    for _ in range(20):
        codes = (groups * scale + zero).round().clamp(0, 15)
        rest = groups - (codes - zero) / scale
        e = rest.sign() * (rest.abs() - rest.abs().pow(-0.3) / beta).relu()
        zero = (codes - (groups - e) * scale).mean(-1, keepdim=True)
        error, beta = float(rest.abs().mean()), beta * 1.01
        if error >= best:
            break
        best = error
    codes = (groups * scale + zero).round().clamp(0, 15)
    return (codes - zero.half().float()) * (1 / scale).half().float()


PEERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "GGUF Q4_0": (q4_0, 16),
    "GGUF Q4_1": (q4_1, 32),
    "HQQ, float zero points": (hqq, 32),
}


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
    for size in (32, 64, 128):
        for name, (peer, extra) in PEERS.items():
            found = sqnr(weights, lambda w, p=peer, s=size: p(w.reshape(-1, s)).reshape(w.shape))
            yield WeightRow(name, size, 4 + extra / size, found)
        for scheme in (
            qk.W4A16(group_size=size, symmetric=True),
            qk.W4A16(group_size=size),
            qk.NF4(group_size=size),
        ):
            yield from searched_rows(weights, scheme)
    yield from searched_rows(weights, qk.W8A8())


def searched_rows(weights: list[Tensor], scheme: qk.Scheme) -> Iterable[WeightRow]:
    kind = scheme.format + ("" if scheme.symmetric else " asymmetric")
    for optimize in qk.optimize.OPTIMIZERS:

        def approximate(weight: Tensor, optimize: str = optimize) -> Tensor:
            return qk.optimize.search_scales(weight, scheme, optimize).dequantize()

        bits = stored_bits(qk.optimize.search_scales(weights[0], scheme, "minmax"))
        yield WeightRow(
            f"qkernels {kind} {optimize}", scheme.group_size, bits, sqnr(weights, approximate)
        )


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


def markdown(weights: list[WeightRow], answers: list[AnswerRow], facts: dict[str, str]) -> str:
    lines = ["# 4-bit accuracy on all-MiniLM-L6-v2", "", "SQNR of the encoder's weights, dB:", ""]
    lines += ["| | group | bits | dB |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r.what} | {r.group_size} | {r.bits:.3f} | {r.sqnr_db:.2f} |" for r in weights]
    lines += ["", f"Cosine of {TEST_TEXTS} sentence embeddings with float32's:", ""]
    lines += ["| scheme | how | bits | mean | lowest |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {r.scheme} | {r.what} | {r.bits:.3f} | {r.cosine_mean:.4f} | {r.cosine_min:.4f} |"
        for r in answers
    ]
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in facts.items()), ""])


def said(rows: Iterable[T]) -> Iterable[T]:
    """The rows, each printed when it is there: all of them take a while."""
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for accuracy.json and accuracy.md")
    parser.add_argument("--weights-only", action="store_true")
    arguments = parser.parse_args()
    model = build_model(10, 0)
    weights = list(said(weight_rows(weights_of(model.encoder))))
    answers = [] if arguments.weights_only else list(said(answer_rows(model)))
    facts = machine_facts()
    page = markdown(weights, answers, facts)
    print(page)
    if arguments.output is not None:
        found = {
            "weights": [asdict(row) for row in weights],
            "answers": [asdict(row) for row in answers],
            "machine": facts,
        }
        write_atomically(arguments.output / "accuracy.json", json.dumps(found, indent=2) + "\n")
        write_atomically(arguments.output / "accuracy.md", page)


if __name__ == "__main__":
    main()
