"""Scikit-learn's handwritten digits: 0 to 4 to pretrain on, 5 to 9 to transfer to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE, TARGET = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
# Pixels per side that the 8 × 8 images are scaled up to.
SIZE = 16
VAL_PER_CLASS, VAL_COPIES, TEST_COPIES = 20, 3, 3


@dataclass(frozen=True)
class Distortion:
    """How far images are turned, moved, scaled and covered with noise.

    Args:
        degrees: largest angle, either way.
        shift: largest move as a share of half the image, either way.
        zoom: largest change of size, either way.
        noise: standard deviation, where 1 is the difference between black and white.
    """

    degrees: float
    shift: float
    zoom: float
    noise: float


MILD = Distortion(degrees=20, shift=0.15, zoom=0.15, noise=0.2)
# Harder than what is trained on, so that differences between models show.
HARD = Distortion(degrees=30, shift=0.15, zoom=0.15, noise=0.3)


@dataclass(frozen=True)
class Images:
    """Images, float32 [n, 1, height, width] from 0 to 1 before noise, and their classes, int64."""

    x: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """Training images as they are, 8 × 8, and distorted ones of SIZE × SIZE to validate and test.

    No image is in two of them, in whatever distortion.
    """

    classes: tuple[int, ...]
    train: Images
    val: Images
    test: Images


def distort(images: Tensor, how: Distortion, generator: torch.Generator) -> Tensor:
    """Scale images up to SIZE × SIZE, each turned, moved, scaled and made noisy at random.

    Args:
        images: float32 [n, 1, height, width].
        how: the ranges to draw from.
        generator: draws.

    Example:
        >>> distort(torch.zeros(2, 1, 8, 8), MILD, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 16, 16])
    """

    def draw(most: float) -> Tensor:
        return most * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, size = draw(how.degrees * math.pi / 180), 1 / (1 + draw(how.zoom))
    cos, sin = size * angle.cos(), size * angle.sin()
    rows = (cos, -sin, draw(how.shift), sin, cos, draw(how.shift))
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, SIZE, SIZE], align_corners=False
    )
    scaled = F.grid_sample(images, grid, align_corners=False)
    return scaled + how.noise * torch.randn(scaled.shape, generator=generator)


def load(which: Sequence[int], per_class: int, seed: int) -> Digits:
    """Some of the ten digits, split.

    Args:
        which: the digits; the first one is class 0.
        per_class: images of each to train on. VAL_PER_CLASS others validate, all the rest test.
        seed: chooses the split and the distortions.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> data = load((5, 6), per_class=10, seed=0)
        >>> data.train.x.shape, data.val.x.shape
        (torch.Size([20, 1, 8, 8]), torch.Size([120, 1, 16, 16]))
    """
    from sklearn.datasets import load_digits

    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    labels: tuple[list[Tensor], ...] = ([], [], [])
    for label, number in enumerate(which):
        mine = images[torch.tensor(numbers == number)]
        mine = mine[torch.randperm(len(mine), generator=generator)]
        rest = len(mine) - per_class - VAL_PER_CLASS
        for i, part in enumerate(mine.split([per_class, VAL_PER_CLASS, rest])):
            parts[i].append(part)
            labels[i].append(torch.full((len(part),), label))
    train, val, test = (
        Images(torch.cat(x), torch.cat(y)) for x, y in zip(parts, labels, strict=True)
    )
    val, test = (
        Images(distort(part.x.repeat(n, 1, 1, 1), HARD, generator), part.labels.repeat(n))
        for part, n in ((val, VAL_COPIES), (test, TEST_COPIES))
    )
    return Digits(tuple(which), train, val, test)


def example_batches(data: Digits, count: int, seed: int, size: int = 32) -> list[Tensor]:
    """Batches of distorted training images: to calibrate with.

    Args:
        data: whose training images are drawn from.
        count: of batches.
        seed: draws.
        size: images per batch.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        chosen = torch.randint(len(data.train.x), (size,), generator=generator)
        found.append(distort(data.train.x[chosen], HARD, generator))
    return found
