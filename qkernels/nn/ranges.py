"""The measured range of a layer's input, which static schemes quantize it with."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.nn.module import QModule
from qkernels.schemes import Scheme


def add_range_buffers(module: QModule, scheme: Scheme, device: torch.device) -> None:
    """Give a module `x_scale` and `x_zero_point`, None where its scheme has no use for them.

    Args:
        module: the layer.
        scheme: says whether its input's range is measured, and how it is quantized.
        device: of the module.
    """
    # NaN until calibrated or loaded: the ops refuse it.
    unknown = torch.full((), torch.nan, dtype=torch.float32, device=device)
    module.register_buffer("x_scale", unknown if scheme.static else None)
    zero = torch.zeros((), dtype=torch.int8, device=device)
    has_zero = scheme.static and scheme.activation == "asymmetric"
    module.register_buffer("x_zero_point", zero if has_zero else None)


def set_range(
    module: QModule, x_scale: Tensor | float | None, x_zero_point: Tensor | int | None
) -> None:
    """Set what `add_range_buffers` made.

    Args:
        module: the layer.
        x_scale: scale of its input.
        x_zero_point: the int8 code of zero.

    Raises:
        ValueError: one is missing, or the layer's scheme does not take it.
    """
    for name, given in (("x_scale", x_scale), ("x_zero_point", x_zero_point)):
        buffer = module._buffers[name]
        if (buffer is None) != (given is None):
            must = "needs" if given is None else "does not take"
            raise ValueError(
                f"{type(module).__name__}.from_float: {module.scheme} {must} {name}, the measured "
                f"{'scale' if name == 'x_scale' else 'zero point'} of the layer's input"
            )
        if buffer is not None:
            buffer.copy_(torch.as_tensor(given).reshape(()))
