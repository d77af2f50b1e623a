"""Where a measurement was made."""

from __future__ import annotations

import platform

import torch

from qkernels.environment import cpu_name


def machine_facts() -> dict[str, str]:
    """What a number depends on: processor, ISA in use, threads, versions.

    Example:
        >>> sorted(machine_facts())
        ['cpu', 'isa', 'python', 'qkernels', 'threads', 'torch']
    """
    from qkernels import _C, __version__

    return {
        "cpu": cpu_name(),
        "isa": _C.isa(),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "qkernels": __version__,
        "python": platform.python_version(),
    }
