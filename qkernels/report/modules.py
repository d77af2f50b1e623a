"""What a module is called in a report."""

from __future__ import annotations

from torch import nn

from qkernels.nn.module import QModule


def is_quantized(module: nn.Module) -> bool:
    """True for qkernels' own modules."""
    return isinstance(module, QModule)


def is_compiled(model: nn.Module) -> bool:
    """True if torch.compile made the model, or was applied to it in place."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def kind_of(module: nn.Module) -> str:
    """Class and scheme of a layer: `QLinear W4A16`, or `LayerNorm`."""
    name = type(module).__name__
    return f"{name} {scheme_name(module)}" if isinstance(module, QModule) else name


def scheme_name(module: QModule) -> str:
    """The scheme's short name: `W8A8`."""
    return type(module.scheme).__name__


def label_of(model: nn.Module) -> str:
    """A model's name in a report: its schemes if it is quantized, else its floating dtype."""
    schemes = {scheme_name(m) for m in model.modules() if isinstance(m, QModule)}
    if schemes:
        return "+".join(sorted(schemes))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return type(model).__name__
