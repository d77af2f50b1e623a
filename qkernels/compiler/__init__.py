"""A backend of torch.compile that puts the ops of quantized layers together before Inductor runs."""

from qkernels.compiler.backend import backend
from qkernels.compiler.rewrite import rewrite

__all__ = ["backend", "rewrite"]
