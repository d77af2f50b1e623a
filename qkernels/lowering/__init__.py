"""Whole models that stay in int8 between their layers: `lower`, and the files of what it makes."""

from qkernels.lowering.model import LoweredModel, load_lowered
from qkernels.lowering.run import lower

__all__ = ["LoweredModel", "load_lowered", "lower"]
