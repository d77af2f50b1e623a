"""A convolution's input as the rows that its weight matrix is multiplied by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patches(conv: nn.modules.conv._ConvNd, x: Tensor) -> Iterator[Tensor]:
    """What a convolution's weight matrix meets at each output position, one image at a time.

    The columns are in the order of `QConvNd.matrix_of`: the channels of a tap side by side.

    Args:
        conv: a float convolution, transposed or not.
        x: its input [batch, channels, *spatial], or the same without a batch.

    Yields:
        [groups, positions, taps * in_channels / groups], so that group g of the output channels is
        their product with the rows of the weight matrix that belong to it.

    Example:
        >>> conv, x = nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(1, 4, 5, 5)
        >>> (rows,) = patches(conv, x)
        >>> y = rows @ qk.nn.QConv2d.matrix_of(conv).unflatten(0, (2, 3)).mT
        >>> torch.allclose(y.mT.flatten(0, 1).view(1, 6, 3, 3), conv(x), atol=1e-5)
        True
    """
    batched = x if x.dim() == len(conv.kernel_size) + 2 else x.unsqueeze(0)
    for image in batched.split(1):
        yield _patches_of(conv, image)


def _patches_of(conv: nn.modules.conv._ConvNd, image: Tensor) -> Tensor:
    padded, strides = _padded(conv, image)
    axes = list(zip(padded.shape[2:], conv.kernel_size, conv.dilation, strides, strict=True))
    counts = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in axes]
    taps = []
    for tap in itertools.product(*(range(k) for k in conv.kernel_size)):
        where = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, n, (_, _, d, s) in zip(tap, counts, axes, strict=True)
        ]
        at: Any = (0, slice(None), *where)
        taps.append(padded[at].flatten(1))
    # [channels, positions, taps]
    grouped = torch.stack(taps, -1).unflatten(0, (conv.groups, -1))
    rows: Tensor = grouped.permute(0, 2, 3, 1).flatten(2)
    return rows


def _padded(conv: nn.modules.conv._ConvNd, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The image with what stands around it and, transposed, between its elements; and the step."""
    if not conv.transposed:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(image, conv._reversed_padding_repeated_twice, mode=mode), conv.stride
    sizes = [(n - 1) * s + 1 for n, s in zip(image.shape[2:], conv.stride, strict=True)]
    apart = image.new_zeros(*image.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, s) for s in conv.stride))
    apart[places] = image
    assert not isinstance(conv.padding, str)
    around: list[int] = []
    axes = zip(conv.kernel_size, conv.dilation, conv.padding, conv.output_padding, strict=True)
    for k, d, p, extra in reversed(list(axes)):
        around += [d * (k - 1) - p, d * (k - 1) - p + extra]
    return F.pad(apart, around), (1,) * len(sizes)
