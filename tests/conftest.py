"""Set-up for all tests: where helpers are, how much hypothesis draws, which kernels run."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from qkernels import _C

# Two cores that do other work make times meaningless, so no deadline. Failures print how to repeat
# them; the quick profile draws the same examples in every run.
settings.register_profile(
    "quick",
    deadline=None,
    max_examples=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("full", parent=settings.get_profile("quick"), max_examples=200)


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("markexpr") == ""
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("full" if full else "quick")

    wanted = os.environ.get("QKERNELS_ISA")
    try:
        running = _C.isa()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    if wanted and running != wanted:
        raise pytest.UsageError(f"QKERNELS_ISA={wanted}, but the kernels of {running} run")


def pytest_report_header() -> str:
    return (
        f"qkernels: {_C.isa()} kernels, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
