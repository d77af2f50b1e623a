"""Which quantized module takes the place of which float one."""

from __future__ import annotations

from torch import nn

from qkernels.nn.conv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvNd,
    QConvTranspose1d,
    QConvTranspose2d,
    why_no_conv,
)
from qkernels.nn.embedding import QEmbedding
from qkernels.nn.int8 import Int8Conv
from qkernels.nn.linear import QLinear, why_too_long
from qkernels.nn.module import QModule
from qkernels.schemes import Scheme

QUANTIZED: dict[type[nn.Module], type[QLinear] | type[QEmbedding] | type[QConvNd]] = {
    nn.Linear: QLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QLinear,
    nn.Embedding: QEmbedding,
    **{
        kind.float_type: kind
        for kind in (QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d)
    },
}
# What a file may hold; layers of lowered models take no single module's place.
BY_NAME: dict[str, type[QModule]] = {
    kind.__name__: kind for kind in (*QUANTIZED.values(), Int8Conv)
}


def has_epilogue(kind: type[nn.Module]) -> bool:
    """Whether modules of a class can compute an activation function with their result."""
    return issubclass(kind, QLinear | QConvNd)


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's that a module is, or derives from, and that has a quantized form.

    Args:
        module: any module.
    """
    return next((kind for kind in QUANTIZED if isinstance(module, kind)), None)


def why_no_kernel(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a module of a known kind has no kernel for a scheme, or None.

    Args:
        module: a float module of a kind in `QUANTIZED`.
        scheme: that is asked for.
    """
    kind = base_of(module)
    assert kind is not None
    columns = QUANTIZED[kind].matrix_of(module).shape[1]
    if issubclass(QUANTIZED[kind], QConvNd):
        return why_no_conv(columns, scheme)
    return why_too_long(columns, scheme) if isinstance(module, nn.Linear) else None


def quantized_from_shell(module: nn.Module, scheme: Scheme) -> QModule:
    """The quantized module for a float one, without a weight.

    Args:
        module: a float module of a kind in `QUANTIZED`.
        scheme: how its weight is going to be quantized.
    """
    kind = base_of(module)
    assert kind is not None
    new: QModule = QUANTIZED[kind].shell(module, scheme)  # type: ignore[arg-type]
    return new
