"""What computes in the tests of kernels: the emulator, and a GPU where there is one.

A test that asks for `ops` runs on each of them; one that is about the emulator itself, or about a
mistake that no GPU survives, asks for `emulator`.
"""

import fcntl
from typing import Any

import pytest
import torch

from helpers import cuda
from helpers.cuda import DeviceOps, hopper


@pytest.fixture(scope="session")
def emulator() -> Any:
    """The emulator's library, built and loaded once, as torch.ops.qkernels_host."""
    cuda.OUT.mkdir(parents=True, exist_ok=True)
    with (cuda.OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = cuda.emulated()
    torch.ops.load_library(str(library))
    return torch.ops.qkernels_host


@pytest.fixture(scope="session", params=cuda.targets())
def ops(request: pytest.FixtureRequest) -> Any:
    """The ops with CPU tensors, as kernels for CUDA."""
    return cuda.DeviceOps() if request.param == "device" else request.getfixturevalue("emulator")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many multiprocessors the device has."""
    return lambda count: monkeypatch.setenv("QKERNELS_HOST_MULTIPROCESSORS", str(count))


@pytest.fixture
def sm90(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has the instructions of sm_90a."""
    monkeypatch.setenv("QKERNELS_HOST_SM90", "1")
    if isinstance(ops, DeviceOps) and not hopper(ops):
        pytest.skip("for a GPU of sm_90a")
