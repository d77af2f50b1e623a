"""Text: fine-tune a sentence encoder, quantize it to int4, and win back what that lost.

The model and the task are those of `qkernels demo`: all-MiniLM-L6-v2 tells which library a
docstring comes from. Compared are the float model, the same after post-training quantization (PTQ)
to coarse groups of 4 bits, and after quantization-aware training (QAT). Training is the demo's own
loop, which knows nothing of quantization. For fairness the float model trains on for as long as
QAT does.

    python examples/qat_text.py            # tens of minutes on two cores
    python examples/qat_text.py --fast     # a few minutes
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import qkernels as qk
from qkernels.demo.contenders import EMBEDDINGS, IGNORE
from qkernels.demo.data import Dataset, csv_dataset, docstring_dataset
from qkernels.demo.model import SentenceClassifier, Tokenizer, build_model
from qkernels.demo.train import embed_all, fine_tune, test_accuracy, train_head

# One scale and zero point for 384 or 1536 weights: 4.1 bits for each, and harsh.
SCHEME = qk.W4A8(group_size=-1)


@dataclass(frozen=True)
class Plan:
    """How much of everything: docstrings of each library, layers and epochs of training."""

    per_library: int
    layers: int
    epochs: int
    lr: float


FULL = Plan(per_library=600, layers=6, epochs=3, lr=1e-4)
FAST = Plan(per_library=150, layers=6, epochs=1, lr=2e-4)


def run(plan: Plan, data: Dataset, seed: int = 0, learn_scale: bool = False) -> dict[str, float]:
    """Train and compare.

    Args:
        plan: how much of everything.
        data: texts with labels.
        seed: of the head and of the order of batches.
        learn_scale: train the scales of the weights with them.

    Returns:
        Test accuracy by model.
    """
    console, tokenizer = Console(), Tokenizer()
    model = build_model(len(data.classes), seed)
    train_head(model, tokenizer, data, console)
    train(model, plan, tokenizer, data, console, seed)
    schemes = {"*": SCHEME, "*.embeddings": EMBEDDINGS}

    longer = copy.deepcopy(model)
    train(longer, plan, tokenizer, data, console, seed + 1)

    ptq = copy.deepcopy(model)
    qk.quantize_(ptq, schemes, ignore=IGNORE)

    qat = copy.deepcopy(model)
    qk.prepare_qat_(qat, schemes, ignore=IGNORE, learn_scale=learn_scale)
    train(qat, plan, tokenizer, data, console, seed + 1)
    qk.convert_(qat)

    found = {}
    models = {"float": model, "float, trained on": longer, "int4 PTQ": ptq, "int4 QAT": qat}
    reference = embed_all(model, tokenizer, data.test)
    for name, each in models.items():
        cosine = nn.functional.cosine_similarity(embed_all(each, tokenizer, data.test), reference)
        found[name] = test_accuracy(each, tokenizer, data.test)
        console.print(f"{name:18} accuracy {found[name]:.1%}, cosine {cosine.mean():.4f}")
    return found


def train(
    model: SentenceClassifier,
    plan: Plan,
    tokenizer: Tokenizer,
    data: Dataset,
    console: Console,
    seed: int,
) -> None:
    """The demo's fine-tuning, float or prepared for quantization alike."""
    fine_tune(model, tokenizer, data, console, seed, plan.layers, plan.epochs, lr=plan.lr)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="less data and training")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a CSV file instead of docstrings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn-scale", action="store_true", help="train the scales too (LSQ)")
    options = parser.parse_args()
    plan = FAST if options.fast else FULL
    torch.manual_seed(options.seed)
    data = (
        csv_dataset(options.text, options.seed)
        if options.text
        else docstring_dataset(plan.per_library, options.seed)
    )
    run(plan, data, options.seed, options.learn_scale)


if __name__ == "__main__":
    main()
