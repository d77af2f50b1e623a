"""The benchmark suite: qkernels against its peers and against what the machine can do."""

from __future__ import annotations

from qkernels.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
