"""What passes from a module to the one that replaces it, and what stands in the way of that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qkernels import _cuda

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def carry_over(old: nn.Module, new: nn.Module, own_attributes: tuple[str, ...] = ()) -> None:
    """Give a module the mode, hooks and extra attributes of another.

    Args:
        old: the module that is replaced.
        new: its replacement.
        own_attributes: attributes of the old one that mean nothing to the new one.
    """
    new.train(old.training)
    for table in _HOOKS:
        new.__dict__[table].update(old.__dict__[table])
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]
    for name, value in old.__dict__.items():
        if name not in new.__dict__ and name not in own_attributes:
            new.__dict__[name] = value


def has_hooks(module: nn.Module) -> bool:
    """Whether code is registered to run with a module's forward or backward."""
    return any(module.__dict__[table] for table in _HOOKS)


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a replacement have the very hook tables of the old module, which is about to go.

    The handles that registering returned then remove hooks from the replacement.

    Args:
        old: the module that is replaced.
        new: its replacement.
    """
    for table in _HOOKS:
        new.__dict__[table] = old.__dict__[table]


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of a module to one that is called in its place and goes on calling it.

    Args:
        old: loses its hooks.
        new: gets them; handles that registering returned then remove them there.
    """
    for table in _HOOKS:
        mine, theirs = old.__dict__[table], new.__dict__[table]
        new.__dict__[table], old.__dict__[table] = mine, theirs
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]
    old.__dict__["_is_full_backward_hook"] = None


def why_not_replaceable(module: nn.Module) -> str | None:
    """Why a Linear or Embedding cannot be replaced without losing something, or None.

    Args:
        module: an `nn.Linear` or `nn.Embedding`.
    """
    weight: Tensor | None = module._parameters.get("weight")
    extra = [n for n in (*module._parameters, *module._buffers) if n not in ("weight", "bias")]
    if module._modules or extra:
        what = ", ".join([*module._modules, *extra])
        return (
            f"its weight is computed from others or it holds more than a weight ({what}); take the "
            "parametrization, weight norm, spectral norm or pruning off first"
        )
    if isinstance(weight, nn.UninitializedParameter):
        return "it is lazy and has not seen an input yet"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it has max_norm, which rewrites the weight while it runs"
    return why_not_whole(module)


def why_not_whole(module: nn.Module) -> str | None:
    """Why a module is more than its class and its tensors, or None.

    Args:
        module: of any class.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which a quantized layer would not call"
    if module._compiled_call_impl is not None:
        return "it was compiled in place; quantize first, then compile"
    if any(module.__dict__[table] for table in _STATE_DICT_HOOKS):
        return "it has state_dict hooks, which are written for a float weight"
    return None


def why_not_quantizable(weight: Tensor) -> str | None:
    """Why the values of a float weight cannot be quantized, or None.

    Args:
        weight: a matrix.
    """
    if weight.is_meta:
        return (
            "its weight is on the meta device and has no values; load them first, or load a "
            "quantized file with load_model"
        )
    if (reason := why_no_kernels(weight.device, ("quantize",))) is not None:
        return f"its weight is on {weight.device}: {reason}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}; expected one of {', '.join(map(str, FLOAT_DTYPES))}"
    if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        return "its weight holds NaN or Inf"
    return None


def why_no_kernels(device: torch.device, ops: Sequence[str]) -> str | None:
    """Why ops cannot run on a device, as the end of a sentence with the way out; or None.

    Args:
        device: of their tensors.
        ops: their names without the namespace.
    """
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"this version has no kernels for device {device.type!r}; keep the module on the CPU"
    reason = _cuda.why_not(*ops)
    if not reason:
        return None
    return f"qkernels has no CUDA kernels for it here: {reason}. Until then keep it on the CPU"
