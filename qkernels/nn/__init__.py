"""Quantized modules with the constructors of torch's own, and those that train for them."""

from qkernels.nn.attention import QMultiheadAttention
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
from qkernels.nn.qat import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATEmbedding,
    QATLinear,
    QATModule,
)

__all__ = [
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATEmbedding",
    "QATLinear",
    "QATModule",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QEmbedding",
    "QLinear",
    "QModule",
    "QMultiheadAttention",
]
