"""Loads the library of CUDA kernels, and knows why when it does not.

Importing qkernels never fails for it: without the library torch says that the ops have no CUDA
kernels, and ``doctor`` gives the reason.
"""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C_cuda.so")


def load(library: Path = LIBRARY) -> str:
    """Load the library; return why that was not possible, or "" when it was.

    Args:
        library: the file.
    """
    if not library.exists():
        return (
            "this build of qkernels has none: when it was built, no nvcc was found, or torch was "
            "one without CUDA, or QKERNELS_CUDA=0 was set; `QKERNELS_CUDA=1 pip install "
            "--no-build-isolation .` in a checkout builds them"
        )
    if torch.version.cuda is None:
        return "they are built, but this torch is built without CUDA; install one that has it"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"they do not load with torch {torch.__version__}: {error}"
    return ""


PROBLEM = load()


def why_not(*ops: str) -> str:
    """Why ops cannot run on a GPU, or "" when they can.

    Args:
        ops: their names without the namespace.
    """
    if PROBLEM:
        return PROBLEM
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in ops if not has(f"qkernels::{op}", "CUDA")]
    return f"there is none for {', '.join(missing)} in this version" if missing else ""
