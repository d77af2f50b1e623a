"""What the methods need to know of a layer's input, summed over batches."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of held-out input that a layer's error is measured on.
HELD_OUT_ROWS = 2048
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
        self._held_out: list[Tensor] = []

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

    def hold_out(self, x: Tensor, batches: int) -> None:
        """Keep some rows to measure errors on.

        Args:
            x: float [..., features].
            batches: in how many calls the rows will come.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        step = max(1, len(rows) * batches // HELD_OUT_ROWS)
        self._held_out.append(rows[::step].float())

    @property
    def held_out(self) -> Tensor | None:
        """The rows that were kept, or None if there are none."""
        rows = sum(map(len, self._held_out))
        return torch.cat(self._held_out) if rows else None

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
