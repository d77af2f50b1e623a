"""Training the ResNet on digits, whatever of it trains, in float or prepared for quantization."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from qkernels.demo import loop
from qkernels.demo.vision.data import MILD, Digits, Images, distort

QUIET = Console(quiet=True)


@torch.inference_mode()
def scores_of(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """Class scores of all images, [n, classes].

    Args:
        model: any of the demo's.
        x: images [n, 1, height, width].
        batch_size: images at a time.
    """
    return torch.cat([model(part) for part in x.split(batch_size)])


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images whose highest score is at their class."""
    return (scores_of(model, images.x).argmax(1) == images.labels).float().mean().item()


def fit(
    model: nn.Module,
    data: Digits,
    seed: int,
    epochs: int,
    lr: float,
    *,
    teacher: nn.Module | None = None,
    moving_norms: bool = True,
    groups: Sequence[dict[str, Any]] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    batch_size: int = 32,
    console: Console = QUIET,
) -> None:
    """Train whatever of a model requires a gradient, keeping the epoch that validates best.

    Only modules with such parameters are in train mode meanwhile, so that the running statistics
    of frozen batch normalizations stand still.

    Args:
        model: trained in place; in eval mode afterwards.
        data: training images, distorted anew each time they are seen, and those that validate.
        seed: of order and distortions.
        epochs: passes over the training images.
        lr: highest learning rate.
        teacher: a model whose answers are the target instead of the labels (distillation: Hinton
            et al., 2015).
        moving_norms: whether batch normalizations go by the batch, and their running statistics
            follow. Off, they compute as in eval mode.
        groups: the optimizer's parameter groups with rates of their own, instead of one for all.
        penalty: what to add to the loss.
        batch_size: images per step.
        console: for the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        and (moving_norms or not isinstance(module, nn.BatchNorm2d))
    ]

    def batches(rng: random.Random) -> list[Tensor]:
        order = rng.sample(range(len(data.train.x)), len(data.train.x))
        return list(torch.tensor(order).split(batch_size))

    def loss_of(chosen: Tensor) -> Tensor:
        x = distort(data.train.x[chosen], MILD, generator)
        target = data.train.labels[chosen]
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x).softmax(1)
        loss = F.cross_entropy(model(x), target)
        return loss if penalty is None else loss + penalty()

    def score() -> float:
        return accuracy(model, data.val)

    loop.train(model, trained, batches, loss_of, score, console, seed, epochs, lr, groups)
