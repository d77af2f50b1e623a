"""Builds and loads the emulator's library once, as torch.ops.qkernels_host."""

import fcntl
from typing import Any

import pytest
import torch

from helpers import cuda


@pytest.fixture(scope="session")
def ops() -> Any:
    cuda.OUT.mkdir(parents=True, exist_ok=True)
    with (cuda.OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = cuda.emulated()
    torch.ops.load_library(str(library))
    return torch.ops.qkernels_host
