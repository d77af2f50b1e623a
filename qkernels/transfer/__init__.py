"""Transfer learning: what trains, how far it may go from where it started, and adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkernels.transfer.adapter import LoRAConv, LoRALinear
from qkernels.transfer.files import load_adapters, save_adapters
from qkernels.transfer.groups import parameter_groups
from qkernels.transfer.head import replace_head_
from qkernels.transfer.lora import add_lora_, remove_
from qkernels.transfer.merge import Merged, merge_
from qkernels.transfer.parts import parts
from qkernels.transfer.peft import register_peft
from qkernels.transfer.penalties import L1, L2, L2SP
from qkernels.transfer.strategy import Strategy, strategy
from qkernels.transfer.unfreeze import GradualUnfreezing

if TYPE_CHECKING:
    from qkernels.transfer.parallel import QColwiseParallel, QRowwiseParallel

__all__ = [
    "GradualUnfreezing",
    "L1",
    "L2",
    "L2SP",
    "LoRAConv",
    "LoRALinear",
    "Merged",
    "QColwiseParallel",
    "QRowwiseParallel",
    "Strategy",
    "add_lora_",
    "load_adapters",
    "merge_",
    "parameter_groups",
    "parts",
    "register_peft",
    "remove_",
    "replace_head_",
    "save_adapters",
    "strategy",
]


def __getattr__(name: str) -> Any:
    # torch.distributed.tensor takes a second to import, and few programs need it.
    if name in ("QColwiseParallel", "QRowwiseParallel"):
        from qkernels.transfer import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module 'qkernels.transfer' has no attribute {name!r}")
