"""A backend of torch.compile: quantized layers are put together, and Inductor does the rest."""

from qkernels.compiler.inductor import backend
from qkernels.compiler.rewrite import rewrite

__all__ = ["backend", "rewrite"]
