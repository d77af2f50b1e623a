"""Observers: each watches the values of one tensor and then says which range int8 should cover."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from qkernels.calibration.histogram import Histogram
from qkernels.calibration.search import entropy_range, mse_range, percentile_range


class Observer(Protocol):
    """What `calibrate` needs of an observer; write your own by these two methods."""

    def observe(self, x: Tensor) -> None:
        """Look at the values of one call. Empty tensors and NaN or Inf leave no trace."""

    def range(self, symmetric: bool = True) -> tuple[float, float]:
        """The range to cover, by a symmetric or by an asymmetric int8 quantizer.

        Raises:
            ValueError: no value was seen.
        """


def finite_values(x: Tensor) -> tuple[Tensor, int]:
    """The finite values of a tensor in float32, and how many were NaN or Inf.

    Args:
        x: floating, of any shape. What leaves float32 counts as Inf.
    """
    values = x.detach().float().reshape(-1)
    if not values.numel() or torch.stack(torch.aminmax(values)).isfinite().all():
        return values, 0
    kept = values[values.isfinite()]
    return kept, values.numel() - kept.numel()


class _Observer(ABC):
    """Takes care of what every observer has to do."""

    def observe(self, x: Tensor) -> None:
        """Look at the values of a tensor; NaN and Inf among them are passed over.

        Args:
            x: floating, of any shape.
        """
        values, _ = finite_values(x)
        if values.numel():
            self._add(values)

    def range(self, symmetric: bool = True) -> tuple[float, float]:
        """The range to cover, which holds zero as that of every int8 quantizer does.

        Args:
            symmetric: whether the quantizer is symmetric; the best range depends on it.

        Raises:
            ValueError: no value was seen.
        """
        smallest, largest = self._seen()
        if smallest > largest:
            raise ValueError(f"{self!r} has seen no finite value; call observe first")
        low, high = min(smallest, 0.0), max(largest, 0.0)
        if smallest == largest:
            return low, high
        chosen_low, chosen_high = self._choose(symmetric)
        chosen = min(max(chosen_low, low), 0.0), max(min(chosen_high, high), 0.0)
        # Where nearly all values are zero, what is cut off may be all the others.
        return chosen if any(chosen) else (low, high)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def _add(self, values: Tensor) -> None:
        """Look at finite float32 values, one at least."""

    @abstractmethod
    def _seen(self) -> tuple[float, float]:
        """The smallest and the largest value, (inf, -inf) before the first."""

    @abstractmethod
    def _choose(self, symmetric: bool) -> tuple[float, float]:
        """The range to cover, where values differ. It may reach beyond what was seen."""


class MinMaxObserver(_Observer):
    """Covers everything that was seen. One outlier widens the range for all.

    Example:
        >>> observer = qk.calibration.MinMaxObserver()
        >>> observer.observe(torch.tensor([-1.0, 3.0]))
        >>> observer.range()
        (-1.0, 3.0)
    """

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def _add(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def _seen(self) -> tuple[float, float]:
        return self._low, self._high

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        return self._seen()


class MovingAverageObserver(MinMaxObserver):
    """Covers the average of what single calls covered, later calls counting more.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018). The first 1 / `averaging_constant` calls are averaged
    evenly, so that the first one does not outweigh the others.

    Args:
        averaging_constant: weight of a new call, above 0 and up to 1.

    Raises:
        ValueError: averaging_constant is out of range.

    Example:
        >>> observer = qk.calibration.MovingAverageObserver()
        >>> observer.observe(torch.tensor([-1.0, 3.0]))
        >>> observer.observe(torch.tensor([-3.0, 5.0]))
        >>> observer.range()
        (-2.0, 4.0)
    """

    def __init__(self, averaging_constant: float = 0.01) -> None:
        if not 0 < averaging_constant <= 1:
            raise ValueError(
                f"MovingAverageObserver: averaging_constant is {averaging_constant!r}; expected a "
                "number above 0 and up to 1"
            )
        super().__init__()
        self.averaging_constant = averaging_constant
        self._calls = 0
        self._mean_low = self._mean_high = 0.0

    def __repr__(self) -> str:
        return f"MovingAverageObserver({self.averaging_constant})"

    def _add(self, values: Tensor) -> None:
        super()._add(values)
        low, high = torch.aminmax(values)
        self._calls += 1
        weight = max(self.averaging_constant, 1 / self._calls)
        self._mean_low += weight * (float(low) - self._mean_low)
        self._mean_high += weight * (float(high) - self._mean_high)

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        return self._mean_low, self._mean_high


class _HistogramBased(_Observer):
    """Keeps a histogram, 64 KiB however much is seen."""

    def __init__(self) -> None:
        self._histogram = Histogram()

    def _add(self, values: Tensor) -> None:
        self._histogram.add(values)

    def _seen(self) -> tuple[float, float]:
        return self._histogram.min, self._histogram.max

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        low, high = self._search(symmetric)
        return low * self._histogram.width, high * self._histogram.width

    @abstractmethod
    def _search(self, symmetric: bool) -> tuple[float, float]:
        """The range in units of the histogram's bins."""


class PercentileObserver(_HistogramBased):
    """Covers a share of all values and cuts the rest off.

    Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation" (2020). Symmetrically it is the share of magnitudes; asymmetrically, half of the
    rest is cut off at each end. Found to one bin, less than 1/2000 of the largest magnitude.

    Args:
        percentile: the share in percent, above 50 and up to 100.

    Raises:
        ValueError: percentile is out of range.

    Example:
        >>> observer = qk.calibration.PercentileObserver(90)
        >>> observer.observe(torch.linspace(-1, 1, 10_001))
        >>> low, high = observer.range()
        >>> round(low, 3), round(high, 3)
        (-0.9, 0.9)
    """

    def __init__(self, percentile: float = 99.99) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(
                f"PercentileObserver: percentile is {percentile!r}; expected percent above 50 and "
                "up to 100, for example 99.99"
            )
        super().__init__()
        self.percentile = percentile

    def __repr__(self) -> str:
        return f"PercentileObserver({self.percentile})"

    def _search(self, symmetric: bool) -> tuple[float, float]:
        return percentile_range(self._histogram, symmetric, self.percentile)


class MSEObserver(_HistogramBased):
    """Covers the range with the smallest mean squared error of the int8 values.

    Sung, Shin and Hwang, "Resiliency of Deep Neural Networks under Quantization" (2015); see
    `qkernels.calibration.search.mse_range`.

    Example:
        >>> observer = qk.calibration.MSEObserver()
        >>> observer.observe(torch.randn(10_000))
        >>> low, high = observer.range()
        >>> low < -2.5 and high > 2.5
        True
    """

    def _search(self, symmetric: bool) -> tuple[float, float]:
        return mse_range(self._histogram, symmetric)


class HistogramObserver(_HistogramBased):
    """Covers the range that keeps most of the distribution's information: entropy calibration.

    Migacz, "8-bit Inference with TensorRT" (GTC 2017); see
    `qkernels.calibration.search.entropy_range`.

    Example:
        >>> observer = qk.calibration.HistogramObserver()
        >>> observer.observe(torch.randn(10_000))
        >>> low, high = observer.range()
        >>> low < -2 and high > 2
        True
    """

    def _search(self, symmetric: bool) -> tuple[float, float]:
        return entropy_range(self._histogram, symmetric)


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "histogram": HistogramObserver,
}
