"""Tensors that are spread over processes: torch's DTensor, imported only where there is one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold only a part."""
    return hasattr(tensor, "device_mesh")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of a sharded one, all processes must ask for it at the same time."""
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor
    whole: Tensor = spread.full_tensor()
    return whole


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has whole, cut as another one is.

    Args:
        tensor: plain, or sharded already.
        other: plain, or sharded over some processes.
    """
    if is_sharded(tensor) or not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = other
    # Without a source: nothing is sent, each process cuts its part.
    cut: Tensor = distribute_tensor(
        tensor, spread.device_mesh, spread.placements, src_data_rank=None
    )
    return cut
