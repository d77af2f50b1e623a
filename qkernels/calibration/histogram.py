"""A histogram that grows with what it sees, and loses nothing by growing."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]

# Temporary tensors stay in the cache.
_CHUNK = 1 << 18
_SMALLEST_EXPONENT = -126


class Histogram:
    """Counts of values in bins around zero, with a width that is a power of two.

    Bin b holds values from b * width up to, not including, (b + 1) * width; b runs from -bins to
    bins - 1. A wider range doubles the width until it fits, which merges whole bins: the result
    depends neither on how values are cut into batches nor on their order. Zeros are counted on
    their own, since every quantizer here represents them exactly.

    Args:
        bins: on each side of zero, a power of two. The range that was seen fills at least half
            of them on its longer side.

    Example:
        >>> histogram = Histogram(bins=4)
        >>> histogram.add(torch.tensor([0.0, 0.3, 0.9, -0.1]))
        >>> histogram.width, histogram.counts.tolist(), histogram.zeros
        (0.25, [0, 0, 0, 1, 0, 1, 0, 1], 1)
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.counts: Counts = np.zeros(2 * bins, np.int64)
        self.zeros = 0
        self.min = math.inf
        self.max = -math.inf
        self._exponent: int | None = None

    @property
    def width(self) -> float:
        """Width of a bin; 1 as long as nothing but zeros was seen."""
        return 1.0 if self._exponent is None else 2.0**self._exponent

    def add(self, x: Tensor) -> None:
        """Count values.

        Args:
            x: float32, all finite, at least one.
        """
        low, high = (float(v) for v in torch.aminmax(x))
        self.min, self.max = min(self.min, low), max(self.max, high)
        amax = max(-low, high)
        if amax > 0:
            self._make_room(amax)
        for chunk in x.reshape(-1).split(_CHUNK):
            zeros = chunk.numel() - int(torch.count_nonzero(chunk))
            self.zeros += zeros
            if zeros < chunk.numel():
                # Exact: the factor is a power of two.
                index = (chunk * (1 / self.width)).floor_().long().add_(self.bins)
                self.counts += torch.bincount(index, minlength=2 * self.bins).numpy()
                self.counts[self.bins] -= zeros

    def magnitudes(self) -> Counts:
        """Counts of |x| in bins 0 to bins - 1."""
        return self.counts[self.bins :] + self.counts[: self.bins][::-1]

    def used(self) -> tuple[int, int]:
        """First bin and one past the last bin that hold anything, numbered as above."""
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return 0, 0
        return int(filled[0]) - self.bins, int(filled[-1]) + 1 - self.bins

    def _make_room(self, amax: float) -> None:
        # amax < 2**exponent holds for the exponent that frexp gives.
        exponent = math.frexp(amax)[1] - int(math.log2(self.bins))
        exponent = max(exponent, _SMALLEST_EXPONENT)
        if self._exponent is None:
            self._exponent = exponent
        elif exponent > self._exponent:
            shift = min(exponent - self._exponent, 62)
            merged = (np.arange(-self.bins, self.bins) >> shift) + self.bins
            counts = np.zeros_like(self.counts)
            np.add.at(counts, merged, self.counts)
            self.counts, self._exponent = counts, exponent
