"""The same products with the instruction set capped, ours and that of peers that can be capped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from qkernels import _C
from qkernels.bench import plan
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.results import Record, Results

# onnxruntime, OpenVINO and ggml take what the CPU has and cannot be told otherwise.
_PEERS = "torch fp32,torch.ao *,torch int4pack *"


def _elsewhere(isa: str) -> str:
    """An instruction set as others know it: the best up to it that goes by letters and a number."""
    names = _C.isas()
    upto = names[: names.index(isa) + 1]
    return [name for name in upto if re.fullmatch(r"[a-z]+\d+", name)][-1]


def environment(isa: str) -> dict[str, str]:
    """Variables that cap qkernels, torch, oneDNN, FBGEMM and MKL at an instruction set.

    Args:
        isa: as qkernels names it.

    Example:
        >>> isa = _C.isas()[1]
        >>> environment(isa)["ONEDNN_MAX_CPU_ISA"] == isa.upper()
        True
    """
    known = _elsewhere(isa)
    return {
        "QKERNELS_ISA": isa,
        "ATEN_CPU_CAPABILITY": known,
        "ONEDNN_MAX_CPU_ISA": known.upper(),
        "FBGEMM_ENABLE_INSTRUCTIONS": known.upper(),
        "MKL_ENABLE_INSTRUCTIONS": known.upper(),
    }


def units(bench: Bench) -> Iterator[Unit]:
    """A unit for each ISA below the best, but for the reference; a quick run takes the first."""
    for isa in _C.available_isas()[1 : 2 if bench.quick else -1]:
        yield f"capped {isa}", lambda isa=isa: _capped(bench, isa)  # type: ignore[misc]


def _capped(bench: Bench, isa: str) -> list[Record]:
    available = plan.CAPPED_SHAPES[:1] if bench.quick else plan.CAPPED_SHAPES
    shapes = bench.only.shapes(available)
    if not shapes:
        return []
    # A process of its own: these variables are read once, when the libraries load.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qkernels.bench", "--output", folder, "--no-plots"]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--quick"] if bench.quick else []
        command += ["--only", "group=linear", f"peer={_PEERS}"]
        command.append(f"shape={','.join(map(str, shapes))}")
        command.append(f"m={','.join(map(str, shapes[0].rows))}")
        if bench.only.scheme:
            command.append(f"scheme={','.join(bench.only.scheme)}")
        done = subprocess.run(
            command,
            env={**os.environ, **environment(isa)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the run capped at {isa} failed: {done.stderr.strip()[-500:]}")
        records = Results.load(Path(folder) / "results.json").records
    for record in records:
        record.unit, record.group = f"capped {isa}", "capped"
    return records
