"""From digits 0 to 4 to digits 5 to 9: a pretrained model, and what is trained of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

import qkernels as qk
from qkernels.demo.vision.data import SOURCE, TARGET, Digits, load
from qkernels.demo.vision.model import ResNet, build_model
from qkernels.demo.vision.train import fit

# Images of each digit: many to pretrain on, few to transfer with.
SOURCE_PER_CLASS, TARGET_PER_CLASS = 120, 40
SCRATCH, FULL = "from scratch", "everything"


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    Args:
        kind: as `qk.transfer.strategy` takes it.
        layers: parts before the head that train too, for "partial".
        lr: highest learning rate.
    """

    kind: str
    layers: int | None
    lr: float


WAYS = {
    "the head": Way("head", None, 1e-2),
    "the last block": Way("partial", 1, 2e-3),
    FULL: Way("full", None, 2e-3),
}


def source_digits(seed: int) -> Digits:
    """What is pretrained on."""
    return load(SOURCE, SOURCE_PER_CLASS, seed)


def target_digits(seed: int) -> Digits:
    """What is transferred to."""
    return load(TARGET, TARGET_PER_CLASS, seed)


def pretrained(data: Digits, seed: int, epochs: int) -> ResNet:
    """A ResNet that was trained on the source digits.

    Args:
        data: the source digits.
        seed: of weights and training.
        epochs: of training.
    """
    model = build_model(len(data.classes), seed)
    fit(model, data, seed, epochs, lr=3e-3)
    return model


def transferred(
    source: ResNet, data: Digits, way: Way, seed: int, epochs: int
) -> tuple[ResNet, qk.transfer.Strategy]:
    """A copy of a pretrained model, fine-tuned to other digits, and what of it was trained.

    Args:
        source: the pretrained model.
        data: the target digits.
        way: what trains.
        seed: of the head and the training.
        epochs: of training.
    """
    model = copy.deepcopy(source)
    torch.manual_seed(seed)
    qk.transfer.replace_head_(model, len(data.classes))
    trains = qk.transfer.strategy(model, way.kind, way.layers)
    fit(model, data, seed, epochs, way.lr)
    return model, trains


def from_scratch(data: Digits, seed: int, epochs: int) -> ResNet:
    """A ResNet that has seen nothing but the target digits: what transfer has to beat.

    Args:
        data: the target digits.
        seed: of weights and training.
        epochs: of training.
    """
    model = build_model(len(data.classes), seed)
    fit(model, data, seed, epochs, WAYS[FULL].lr)
    return model
