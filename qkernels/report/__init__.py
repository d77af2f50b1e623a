"""Measuring what quantization gained and what it cost."""

from qkernels.report.comparison import compare
from qkernels.report.report import Latency, Layer, Metric, Report
from qkernels.report.size import model_bytes

__all__ = ["Latency", "Layer", "Metric", "Report", "compare", "model_bytes"]
