"""Says which peers are missing, and why."""

from __future__ import annotations

from qkernels.bench.peers import load_peers


def pytest_report_header() -> list[str]:
    return [f"{name} is left out: {reason}" for name, reason in load_peers().skipped.items()]
