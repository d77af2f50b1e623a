"""Replacing a layer, and what modules above it must be told then."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from qkernels.nn.carry import share_hooks
from qkernels.nn.fastpath import settle_fast_paths
from qkernels.nn.module import QModule


def replace_everywhere(
    model: nn.Module, names: Sequence[str], old: nn.Module, new: nn.Module
) -> None:
    """Put a module in the place of another, under all of its names, with its hooks.

    Args:
        model: holds the old module.
        names: all qualified names of the old module in the model.
        old: the module that goes.
        new: the module that comes.
    """
    share_hooks(old, new)
    if isinstance(new, QModule):
        new.qualified_name = names[0]
    for name in names:
        model.set_submodule(name, new)


def settle_parents(model: nn.Module) -> None:
    """Adapt what is above layers that were replaced: torch's fused paths, transformers' saving.

    Args:
        model: any module; it and everything below is looked at.
    """
    settle_fast_paths(model)
    # A model of transformers cannot be there unless this has been imported.
    if "transformers.modeling_utils" in sys.modules and _has_transformers_5():
        from qkernels.hf import adopt

        adopt(model)


def _has_transformers_5() -> bool:
    return int(sys.modules["transformers"].__version__.partition(".")[0]) >= 5
