"""A fresh head for another task."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkernels.nn import QLinear
from qkernels.nn.carry import share_hooks
from qkernels.plan import check_model
from qkernels.transfer.adapter import LoRALinear
from qkernels.transfer.parts import LINEARS, head_name


def replace_head_(model: nn.Module, out_features: int, name: str | None = None) -> nn.Linear:
    """Replace a model's last linear layer by a fresh one with another number of outputs, in place.

    The new layer is a float one that trains, drawn as any `nn.Linear`. It keeps the old one's
    device, dtype, mode and hooks, and whether there is a bias. The `num_labels` of a transformers
    model, which its loss reads, follows.

    Args:
        model: float or quantized. It is changed.
        out_features: number of outputs, such as classes.
        name: qualified name of the layer, where it is not the one that is found: the last one of a
            child with a customary name (`classifier`, `fc`, `head`, `score` …), or else of all.

    Returns:
        The new layer.

    Raises:
        TypeError: the named module is no linear layer.
        ValueError: there is no linear layer or none of that name, or out_features is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1000))
        >>> qk.transfer.replace_head_(model, 10)
        Linear(in_features=64, out_features=10, bias=True)
    """
    check_model(model, "replace_head_")
    if not isinstance(out_features, int) or isinstance(out_features, bool) or out_features < 1:
        raise ValueError(
            f"replace_head_: out_features is {out_features!r}; expected an integer of 1 or more"
        )
    known = dict(model.named_modules(remove_duplicate=False))
    found = head_name(model) if name is None else name
    if not found:
        raise ValueError(
            f"replace_head_: {type(model).__name__} holds no linear layer; name the module to be "
            "replaced, or put the model and a new head into an nn.Sequential"
        )
    if found not in known:
        raise ValueError(
            f"replace_head_: the model has no module {found!r}; its names are those of "
            "model.named_modules()"
        )
    old = known[found]
    if not isinstance(old, LINEARS):
        raise TypeError(
            f"replace_head_: {found} is a {type(old).__name__}; expected a linear layer"
        )
    if isinstance(old, QLinear):
        old.check_not_fused("a new head")
    new = _fresh_like(old, out_features)
    for other, module in known.items():
        if module is old:
            model.set_submodule(other, new)
    _tell_transformers(model, out_features)
    return new


def _fresh_like(old: nn.Linear | QLinear | LoRALinear, out_features: int) -> nn.Linear:
    layer = old.base if isinstance(old, LoRALinear) else old
    tensor = layer.packed if isinstance(layer, QLinear) else layer.weight
    dtype = layer.dtype if isinstance(layer, QLinear) else layer.weight.dtype
    has_bias = layer.bias is not None
    new = nn.Linear(layer.in_features, out_features, has_bias, device=tensor.device, dtype=dtype)
    share_hooks(old, new)
    return new.train(old.training)


def _tell_transformers(model: nn.Module, count: int) -> None:
    holders: tuple[Any, ...] = (model, getattr(model, "config", None))
    for holder in holders:
        if isinstance(getattr(holder, "num_labels", None), int):
            holder.num_labels = count
