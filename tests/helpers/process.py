"""Python in a process of its own: for what is decided once per process, and for crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import qkernels

TESTS = Path(__file__).resolve().parents[1]


def run_python(
    *arguments: str | Path, isa: str | None = None, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` on this qkernels and these helpers, with QKERNELS_ISA=isa."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), str(TESTS)])
    # The thread counts are the tests' business.
    env.pop("OMP_NUM_THREADS", None)
    env |= variables
    if isa is not None:
        env["QKERNELS_ISA"] = isa
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
