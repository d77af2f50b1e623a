"""Builds and loads the emulator's library once, as torch.ops.qkernels_host."""

import fcntl
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import build


@pytest.fixture(scope="session")
def ops() -> Any:
    build.OUT.mkdir(parents=True, exist_ok=True)
    with (build.OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = build.emulated()
    torch.ops.load_library(str(library))
    return torch.ops.qkernels_host
