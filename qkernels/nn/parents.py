"""What modules above a layer must be told when it is replaced."""

from __future__ import annotations

import sys

from torch import nn

from qkernels.nn.fastpath import settle_fast_paths


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
