"""Where to clip: the int8 ranges that lose least, found on a histogram.

All numbers here are in units of a bin: bin b reaches from b to b + 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qkernels.calibration.histogram import Counts, Histogram

Floats = NDArray[np.float64]

# Clipping points to try, as parts of the largest magnitude: 16 to each halving, 10 halvings.
_PARTS: Floats = 2.0 ** (-np.arange(161) / 16)


# ---- Kullback-Leibler divergence -----------------------------------------------------------------


def entropy_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """The range whose quantized distribution diverges least from the one that was seen.

    Migacz, "8-bit Inference with TensorRT" (GTC 2017): of all ranges, take the one with the
    smallest KL divergence from the clipped distribution to the same quantized. Ranges go from -T to
    T. The symmetric search looks at magnitudes in 128 levels, as TensorRT does; the asymmetric
    one at signed values in 256 levels between the smallest and the largest that are not clipped.

    Args:
        histogram: with at least one value that is not zero.
        symmetric: which of the two int8 quantizers the range is for.
    """
    first, last = histogram.used()
    first, last = min(first, 0), max(last, 0)  # every range holds zero
    limit = max(-first, last)
    thresholds = np.arange(1, limit + 1)
    if symmetric:
        counts, levels = histogram.magnitudes(), 128
        begin, end = np.zeros_like(thresholds), thresholds
    else:
        counts, levels = histogram.counts, 256
        begin = np.maximum(first, -thresholds) + histogram.bins
        end = np.minimum(last, thresholds) + histogram.bins
    worth = (end - begin >= levels) | (thresholds == limit)
    divergence = kl_divergence(counts, begin[worth], end[worth], levels)
    # Of equals the widest: it clips least.
    best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    threshold = float(thresholds[worth][best])
    return max(float(first), -threshold), min(float(last), threshold)


def kl_divergence(counts: Counts, begin: Counts, end: Counts, levels: int) -> Floats:
    """KL divergence for clipping to bins begin … end - 1, for many such ranges at a time.

    What is clipped goes to the outermost bin that is left, on both sides. A quantization level
    spreads its count evenly over those of its bins that are not empty.

    Args:
        counts: of each bin.
        begin: first bin that is kept, by range.
        end: one past the last bin that is kept, by range.
        levels: of the quantizer.
    """
    total = _prefix(counts)
    filled = _prefix(counts > 0)
    informed = _prefix(_xlogx(counts.astype(np.float64)))
    # [ranges, levels + 1]: the bin where each level starts.
    steps = (np.arange(levels + 1)[None] * (end - begin)[:, None] + levels - 1) // levels
    edges = begin[:, None] + steps
    inside = np.diff(total[edges], axis=1)
    spread_over = np.diff(filled[edges], axis=1)
    below, above = total[begin], total[-1] - total[end]
    first, last = (counts[bins].astype(np.float64) for bins in (begin, end - 1))
    reference = inside.copy()
    reference[:, 0] += below
    reference[:, -1] += above
    plogp = informed[end] - informed[begin]
    plogp += _xlogx(first + below) - _xlogx(first) + _xlogx(last + above) - _xlogx(last)
    with np.errstate(divide="ignore", invalid="ignore"):
        even = np.log(inside / spread_over)
        plogq = np.where(reference > 0, reference * even, 0).sum(1)
        kept = inside.sum(1)
        divergence = (plogp - plogq) / total[-1] + np.log(kept / total[-1])
    # Clipped values in a bin that held none have no counterpart.
    impossible = ((below > 0) & (first == 0)) | ((above > 0) & (last == 0)) | (kept == 0)
    return np.where(impossible, np.inf, divergence)


def _xlogx(x: Floats) -> Floats:
    return np.where(x > 0, x * np.log(np.maximum(x, 1)), 0.0)


def _prefix(values: NDArray[np.generic]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


# ---- Mean squared error --------------------------------------------------------------------------


def mse_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """The range with the smallest mean squared error of int8 quantization.

    Values are taken to be spread evenly within a bin, for which the error is computed exactly. The
    symmetric search tries 161 ranges down to a thousandth of the largest value; the asymmetric one
    moves one end at a time over as many until neither helps.

    Args:
        histogram: with at least one value that is not zero.
        symmetric: which of the two int8 quantizers the range is for.
    """
    error = SquaredError(histogram)
    low, high = histogram.min / histogram.width, histogram.max / histogram.width
    if symmetric:
        amax = max(-low, high)
        threshold = float(amax * _PARTS[np.argmin(error.symmetric(amax * _PARTS))])
        return max(low, -threshold), min(high, threshold)
    low, high = min(low, 0.0), max(high, 0.0)
    lows = low * _PARTS if low < 0 else np.zeros(1)
    highs = high * _PARTS if high > 0 else np.zeros(1)
    best = np.inf
    while True:
        errors = error.asymmetric(np.full_like(highs, low), highs)
        high = float(highs[np.argmin(errors)])
        errors = error.asymmetric(lows, np.full_like(lows, high))
        low = float(lows[np.argmin(errors)])
        if not errors.min() < best:
            return low, high
        best = float(errors.min())


class SquaredError:
    """Σ (x − quantized x)² for many quantizers, from running sums of 1, x and x² over the bins.

    Args:
        histogram: what was seen.
    """

    def __init__(self, histogram: Histogram) -> None:
        self.bins = histogram.bins
        self.counts = histogram.counts.astype(np.float64)
        middle = np.arange(-self.bins, self.bins) + 0.5
        self.sums = (
            _prefix(self.counts),
            _prefix(self.counts * middle),
            _prefix(self.counts * (middle**2 + 1 / 12)),
        )

    def symmetric(self, threshold: Floats) -> Floats:
        """For ranges from -threshold to threshold [n]."""
        return self._of((threshold / 127)[:, None] * np.arange(-127, 128))

    def asymmetric(self, low: Floats, high: Floats) -> Floats:
        """For ranges from low [n] <= 0 to high [n] >= 0."""
        scale = (high - low)[:, None] / 255
        zero_point = np.rint(-128 - low[:, None] / scale)
        return self._of(scale * (np.arange(-128, 128) - zero_point))

    def _of(self, levels: Floats) -> Floats:
        inner = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = np.full((len(levels), 1), float(self.bins))
        n, x, xx = (
            np.diff(part, axis=1)
            for part in self._up_to(np.concatenate([-ends, inner, ends], axis=1))
        )
        return np.asarray((xx - 2 * levels * x + levels**2 * n).sum(1))

    def _up_to(self, t: Floats) -> tuple[Floats, Floats, Floats]:
        """The running sums at any point, not only between bins."""
        t = np.clip(t, -self.bins, self.bins)
        edge = np.minimum(np.floor(t), self.bins - 1)
        index = edge.astype(np.int64) + self.bins
        part = t - edge
        n = self.counts[index] * part
        zeroth, first, second = (total[index] for total in self.sums)
        return (
            zeroth + n,
            first + n * (edge + part / 2),
            second + n * (edge**2 + edge * part + part**2 / 3),
        )


# ---- Percentiles ---------------------------------------------------------------------------------


def percentile_range(
    histogram: Histogram, symmetric: bool, percentile: float
) -> tuple[float, float]:
    """The range that holds a share of all values.

    Args:
        histogram: with at least one value that is not zero.
        symmetric: take the share of magnitudes; otherwise cut half of the rest off at each end.
        percentile: the share in percent.
    """
    share = percentile / 100
    if symmetric:
        edges = np.arange(histogram.bins + 1)
        running = histogram.zeros + _prefix(histogram.magnitudes())
        threshold = float(np.interp(share * running[-1], running, edges))
        return -threshold, threshold
    # Zeros stand between the two halves.
    edges = np.arange(-histogram.bins, histogram.bins + 1)
    edges = np.insert(edges, histogram.bins, 0)
    running = _prefix(np.insert(histogram.counts, histogram.bins, histogram.zeros))
    tail = (1 - share) / 2 * running[-1]
    low, high = np.interp([tail, running[-1] - tail], running, edges)
    return float(low), float(high)
