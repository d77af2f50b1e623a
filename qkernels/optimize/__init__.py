"""Scales and zero points by search, without data."""

from qkernels.optimize.search import OPTIMIZERS, check_optimizer, search_scales

__all__ = ["OPTIMIZERS", "check_optimizer", "search_scales"]
