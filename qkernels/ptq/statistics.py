"""What the methods need to know of a layer's input, summed over batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels.ptq.patches import patches

# Rows of held-out input that a layer's error is measured on; images, if it is a convolution.
HELD_OUT_ROWS, HELD_OUT_IMAGES = 2048, 32
# Rows that are multiplied at a time, so that a long batch needs no second copy of itself.
_CHUNK = 4096


class InputStatistics:
    """Sums over all rows of x that a layer, or layers with one input, get.

    Args:
        features: size of the last dimension of x.
        moments: whether to sum x xᵀ, which needs features² doubles.
    """

    def __init__(self, features: int, moments: bool) -> None:
        self.rows = 0
        self.sum = torch.zeros(features, dtype=torch.float64)
        self.abs_sum = torch.zeros(features, dtype=torch.float64)
        self.squares = torch.zeros(features, dtype=torch.float64)
        self.amax = torch.zeros(features)
        self._moments = torch.zeros(features, features, dtype=torch.float64) if moments else None

    def add(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: float [..., features]; rows with NaN or infinity are left out.
        """
        for rows in x.detach().reshape(-1, x.shape[-1]).split(_CHUNK):
            rows = rows.float()
            good = rows.isfinite().all(1)
            rows = rows if bool(good.all()) else rows[good]
            if len(rows) == 0:
                continue
            self.rows += len(rows)
            magnitude = rows.abs()
            self.sum += rows.sum(0)
            self.abs_sum += magnitude.sum(0)
            self.squares += rows.square().sum(0)
            self.amax = torch.maximum(self.amax, magnitude.amax(0))
            if self._moments is not None:
                self._moments += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Mean of x, float64 [features]."""
        return self.sum / self.rows

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean of |x|, float64 [features]."""
        return self.abs_sum / self.rows

    @property
    def mean_square(self) -> Tensor:
        """Mean of x², float64 [features]."""
        return self.squares / self.rows

    @property
    def second_moments(self) -> Tensor:
        """Mean of x xᵀ, float64 [features, features]: half of GPTQ's Hessian."""
        assert self._moments is not None
        return self._moments / self.rows


class LayerStatistics:
    """The statistics of what a layer's weight meets, and some inputs to measure its error on.

    Args:
        layer: a float Linear or convolution, which has statistics for each group of channels.
        moments: see `InputStatistics`.
    """

    def __init__(self, layer: nn.Linear | nn.modules.conv._ConvNd, moments: bool) -> None:
        if isinstance(layer, nn.Linear):
            count, columns = 1, layer.in_features
        else:
            count, columns = layer.groups, layer.weight.numel() // layer.out_channels
        self.groups = [InputStatistics(columns, moments) for _ in range(count)]
        self.held_out: list[Tensor] = []

    def add(self, layer: nn.Linear | nn.modules.conv._ConvNd, x: Tensor) -> None:
        """Add an input.

        Args:
            layer: the layer that gets it: of several that share a weight, any.
            x: what it is called with.
        """
        x = x.detach()
        if isinstance(layer, nn.Linear):
            self.groups[0].add(x)
            return
        for image in patches(layer, x):
            for group, rows in zip(self.groups, image, strict=True):
                group.add(rows)

    def hold_out(self, layer: nn.Linear | nn.modules.conv._ConvNd, x: Tensor, batches: int) -> None:
        """Keep some of an input to measure errors on.

        Args:
            layer: the layer that gets it.
            x: what it is called with.
            batches: in how many calls inputs will come.
        """
        x, limit = x.detach(), HELD_OUT_ROWS
        if isinstance(layer, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
        else:
            x = x if x.dim() == len(layer.kernel_size) + 2 else x.unsqueeze(0)
            limit = HELD_OUT_IMAGES
        if len(x):
            self.held_out.append(x[:: max(1, len(x) * batches // limit)].float())
