"""A small ResNet (He et al., "Deep residual learning for image recognition", 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels as qk

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut around them.

    Args:
        inputs: channels of x.
        outputs: channels of the result.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A convolution, a block for each width, the mean over all pixels, and a linear head.

    Args:
        classes: of the head.
        widths: channels of the blocks; from the second one on, each halves the image's sides.

    Example:
        >>> ResNet(5)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(self, classes: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (i > 0)) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [n, classes] of images [n, 1, height, width]."""
        y = self.blocks(F.relu(self.norm(self.stem(x))))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


def build_model(classes: int, seed: int) -> ResNet:
    """A fresh ResNet in eval mode.

    Args:
        classes: of the head.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return ResNet(classes).eval()


def build_folded(classes: int, seed: int) -> ResNet:
    """The same without batch normalizations: what files of quantized models load into.

    Args:
        classes: of the head.
        seed: of the weights.
    """
    model = build_model(classes, seed)
    qk.fold_batchnorm_(model)
    return model
