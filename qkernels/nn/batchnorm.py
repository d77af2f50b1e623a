"""Batch normalization that follows a convolution: finding it, and folding it into the weight."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

_PAIRS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Conv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.Conv3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
}


def pairs_to_fold(model: nn.Module) -> dict[int, nn.Module]:
    """The batch normalization that alone reads a convolution's output, by the id of the latter.

    They are read from the traced graph; where tracing fails, only neighbours in an `nn.Sequential`
    are found.

    Args:
        model: any module; it is not run.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return {}
    try:
        found = _traced_pairs(model)
    except Exception:  # whatever a forward raises when it is run on symbols
        found = _neighbours(model)
    return {id(conv): norm for conv, norm in found if _fit(conv, norm)}


def _traced_pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    graph = fx.Tracer().trace(model)
    calls = [n for n in graph.nodes if n.op == "call_module"]
    modules = {n: model.get_submodule(str(n.target)) for n in calls}
    times = Counter(id(module) for module in modules.values())
    return [
        (modules[node], modules[user])
        for node in calls
        if len(node.users) == 1
        and (user := next(iter(node.users))) in modules
        and times[id(modules[node])] == times[id(modules[user])] == 1
    ]


def _neighbours(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    times = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return [
        (first, second)
        for module in model.modules()
        if type(module) is nn.Sequential
        for first, second in pairwise(module)
        if times[id(first)] == times[id(second)] == 1
    ]


def _fit(conv: nn.Module, norm: nn.Module) -> bool:
    norm_any: Any = norm
    return (
        type(norm) in _PAIRS.get(type(conv), ())
        and norm_any.affine
        and norm_any.track_running_stats
        and norm_any.num_features == conv.out_channels
    )


def true_factor(norm: nn.Module) -> Tensor:
    """What a batch normalization multiplies each channel by, going by its running statistics.

    Args:
        norm: a batch normalization.
    """
    n: Any = norm
    factor: Tensor = n.weight / torch.sqrt(n.running_var + n.eps)
    return factor


def safe_factor(norm: nn.Module) -> Tensor:
    """The same, but 1 for channels that it multiplies by 0, so that one can divide by it.

    Args:
        norm: a batch normalization.
    """
    factor = true_factor(norm)
    return torch.where(factor == 0, 1.0, factor)


@torch.no_grad()
def folded_bias(bias: Tensor | None, norm: nn.Module) -> nn.Parameter:
    """The bias of a convolution that a batch normalization, in eval mode, has been folded into.

    Args:
        bias: of the convolution before, or None.
        norm: the batch normalization.
    """
    n: Any = norm
    before = -n.running_mean if bias is None else bias - n.running_mean
    return nn.Parameter(before * true_factor(norm) + n.bias)
