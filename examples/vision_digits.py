"""Transfer learning on images: the head, the last block, everything; then int8, int4 and QAT.

A small ResNet is pretrained on scikit-learn's handwritten digits 0 to 4. From forty images each it
then learns 5 to 9, in three strategies from the same start. What was trained whole is quantized:
dynamic int8, static int8 with calibration, both int8 and int4 in one model, and int4 alone, which
quantization-aware training (QAT) repairs. Test images are turned further and noisier than those
that are trained on. Needs `pip install 'qkernels[demo]'`; takes a few minutes on two cores.
`qkernels demo --vision` goes on from there and measures latency, saves and reloads.

    python examples/vision_digits.py            # --fast for one seed and half a minute
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo.vision.data import Digits, example_batches
from qkernels.demo.vision.model import ResNet
from qkernels.demo.vision.train import accuracy, fit
from qkernels.demo.vision.transfer import pretrained, source_digits, target_digits
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.terminal import console as make_console

INT4 = qk.W4A16(group_size=-1)
# Static int8, but for the last block, which has three quarters of the weights.
MIXED = {"*": qk.W8A8(static=True), "blocks.2.conv*": qk.W4A16(group_size=32)}


@dataclass(frozen=True)
class Plan:
    """How often all is done, and the epochs of pretraining and of each training after it."""

    seeds: int = 3
    source_epochs: int = 20
    epochs: int = 40


FAST = Plan(seeds=1, source_epochs=12, epochs=15)


def transfer(source: ResNet, data: Digits, kind: str, plan: Plan, seed: int) -> ResNet:
    """A copy of the pretrained model with a fresh head, trained by one strategy."""
    model = copy.deepcopy(source)
    torch.manual_seed(seed)
    qk.transfer.replace_head_(model, len(data.classes))
    qk.transfer.strategy(model, kind, layers=1 if kind == "partial" else None)
    fit(model, data, seed, plan.epochs, lr=1e-2 if kind == "head" else 2e-3)
    return model


def quantized(
    model: ResNet, scheme: qk.Scheme | dict[str, qk.Scheme], calibration: list[Tensor] | None = None
) -> ResNet:
    """A quantized copy; example images give the scales of static layers."""
    model = copy.deepcopy(model)
    qk.fold_batchnorm_(model)
    ranges = qk.calibrate(model, calibration, "mse") if calibration else None
    qk.quantize_(model, scheme, ignore="head", calibration=ranges)
    return model


def trained_for_int4(model: ResNet, data: Digits, plan: Plan, seed: int) -> ResNet:
    """A copy that trained with the rounding in place: the same loop, a lower learning rate."""
    model = copy.deepcopy(model)
    qk.prepare_qat_(model, INT4, ignore="head")
    fit(model, data, seed, plan.epochs, lr=1e-3)
    qk.convert_(model)
    return model


def run(plan: Plan, first_seed: int = 0) -> dict[str, list[float]]:
    """Climb the ladder with each seed.

    Args:
        plan: how much of everything.
        first_seed: of data, weights and training.

    Returns:
        Test accuracies by model, one for each seed.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(first_seed, first_seed + plan.seeds):
        data, source_data = target_digits(seed), source_digits(seed)
        source = pretrained(source_data, seed, plan.source_epochs)
        found["digits 0 to 4"].append(accuracy(source, source_data.test))

        models: dict[str, nn.Module] = {
            "the head": transfer(source, data, "head", plan, seed),
            "the last block": transfer(source, data, "partial", plan, seed),
        }
        full = models["everything"] = transfer(source, data, "full", plan, seed)
        batches = example_batches(data, 8, seed)
        models["int8 dynamic"] = quantized(full, qk.W8A8())
        models["int8 static"] = quantized(full, qk.W8A8(static=True), batches)
        models["int8 and int4"] = quantized(full, MIXED, batches)
        models["int4"] = quantized(full, INT4)
        models["int4 QAT"] = trained_for_int4(full, data, plan, seed + 100)
        for name, model in models.items():
            found[name].append(accuracy(model, data.test))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one seed and less training")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--out", metavar="FILE", help="write the numbers to this JSON file")
    options = parser.parse_args()
    plan = FAST if options.fast else Plan()
    found = run(plan, options.seed)
    table = Table("model", "test accuracy", "lowest", "highest")
    for name, values in found.items():
        numbers = (statistics.fmean(values), min(values), max(values))
        table.add_row(name, *(f"{value:.1%}" for value in numbers))
    make_console().print(table)
    if options.out:
        facts = {"first_seed": options.seed, "test": found, "machine": machine_facts()}
        write_atomically(options.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
