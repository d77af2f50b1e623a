"""Quantized modules with the constructors of torch's own."""

from qkernels.nn.embedding import QEmbedding
from qkernels.nn.linear import QLinear
from qkernels.nn.module import QModule

__all__ = ["QEmbedding", "QLinear", "QModule"]
