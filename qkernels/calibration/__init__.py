"""Calibration results, and the observers that choose ranges; `qkernels.calibrate` runs them."""

from qkernels.calibration.observers import (
    OBSERVERS,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
from qkernels.calibration.result import Calibration, Int8Range, LayerRanges, TensorRange

__all__ = [
    "OBSERVERS",
    "Calibration",
    "HistogramObserver",
    "Int8Range",
    "LayerRanges",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "TensorRange",
]
