"""The fused inference paths of torch's transformer layers, which read float weights directly."""

from __future__ import annotations

from typing import Any

from torch import nn

# Module → the attribute that its forward asks before it takes the fused path, and its "no".
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_REMEMBERED = "_qkernels_fast_path"


def settle_fast_paths(model: nn.Module) -> None:
    """Turn torch's fused transformer paths off above layers of ours, and on again elsewhere.

    The fused kernels take `linear1.weight` and `linear2.weight` as float tensors. Both switches
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
