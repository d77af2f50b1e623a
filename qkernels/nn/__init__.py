"""Quantized modules with the constructors of torch's own."""

from qkernels.nn.conv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
)
from qkernels.nn.embedding import QEmbedding
from qkernels.nn.linear import QLinear
from qkernels.nn.module import QModule

__all__ = [
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QEmbedding",
    "QLinear",
    "QModule",
]
