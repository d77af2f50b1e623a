"""The fused inference paths of torch's transformer layers, which read float weights directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Module → the attribute that its forward asks before it takes the fused path, and its "no".
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_REMEMBERED = "_qkernels_fast_path"


def settle_fast_paths(model: nn.Module) -> None:
    """Turn torch's fused transformer paths off above layers of ours, and on again elsewhere.

    The fused kernels take the weights of linears and attention as float tensors. Both switches
    only choose between the fused path and the plain one, which calls the layers.

    Args:
        model: any module; it and everything below is looked at.
    """
    for module in model.modules():
        for kind, (switch, off) in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            hidden = any(getattr(m, "hides_weight", False) for m in module.modules())
            if hidden and _REMEMBERED not in module.__dict__:
                module.__dict__[_REMEMBERED] = getattr(module, switch)
                setattr(module, switch, off)
            elif not hidden and _REMEMBERED in module.__dict__:
                setattr(module, switch, module.__dict__.pop(_REMEMBERED))


@contextmanager
def plain_transformer_paths() -> Iterator[None]:
    """Keep torch's transformer layers off the fused path, on which they do not call their linears.

    With padding, an encoder would pass nested tensors even to layers that are watched.

    The switch is torch's own and holds for the process.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
