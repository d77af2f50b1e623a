"""Discriminative learning rates: lower ones for what lies further from the head."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from qkernels.plan import check_model
from qkernels.transfer.parts import parts


def parameter_groups(
    model: nn.Module, lr: float, factor: float = 2.6, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer parameter groups whose learning rate falls from part to part, from the head down.

    The head gets `lr`, the part before it `lr / factor`, the next `lr / factor ** 2` (Howard and
    Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018). Parameters that
    are frozen now are in the groups too, so that they can be thawed later; optimizers pass by
    whatever has no gradient. Quantized weights are in none.

    Args:
        model: float or quantized.
        lr: learning rate of the head.
        factor: 1 or more; 1 gives every part the same rate.
        weight_decay: if given, of matrices; biases and norms get 0.

    Returns:
        Groups for any torch optimizer, from the head down, each with the "name" of its part.

    Raises:
        TypeError: not a module.
        ValueError: a rate, factor or weight decay out of range, or nothing that can train.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = qk.transfer.parameter_groups(mlp, lr=0.26)
        >>> [(group["name"], round(group["lr"], 6)) for group in groups]
        [('2', 0.26), ('0', 0.1)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_model(model, "parameter_groups")
    limits = (("lr", lr, 0.0), ("factor", factor, 1.0), ("weight_decay", weight_decay or 0.0, 0.0))
    for name, value, least in limits:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise ValueError(f"parameter_groups: {name} is {value!r}; expected {least:g} or more")
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for depth, part in enumerate(reversed(parts(model))):
        new = [p for p in part.parameters.values() if id(p) not in seen and p.is_floating_point()]
        seen.update(map(id, new))
        rate = lr / factor**depth
        if weight_decay is None:
            split: list[tuple[list[nn.Parameter], dict[str, float]]] = [(new, {})]
        else:
            matrices = [p for p in new if p.ndim > 1]
            rest = [p for p in new if p.ndim <= 1]
            split = [(matrices, {"weight_decay": weight_decay}), (rest, {"weight_decay": 0.0})]
        groups += [
            {"params": list(dict.fromkeys(members)), "lr": rate, "name": part.name, **more}
            for members, more in split
            if members
        ]
    if not groups:
        raise ValueError(
            f"parameter_groups: {type(model).__name__} has no float parameters, so nothing could "
            "train; add adapters with qk.transfer.add_lora_"
        )
    return groups
