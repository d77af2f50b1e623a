"""Whole models that stay in int8 between their layers: `lower`, and the files of what it makes."""

from qkernels.lowering.lower import lower
from qkernels.lowering.model import LoweredModel, load_lowered

__all__ = ["LoweredModel", "load_lowered", "lower"]
