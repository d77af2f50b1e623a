"""The results file: what was measured, where, with which versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qkernels import _C
from qkernels.bench.measure import Measured
from qkernels.report.machine import machine_facts

FORMAT = 1
# Whatever changes what a library computes with.
_ENVIRONMENT = (
    "QKERNELS_ISA",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "FBGEMM_ENABLE_INSTRUCTIONS",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
    "LD_PRELOAD",
    "MALLOC_CONF",
)


@dataclass
class Result:
    """What one contender needed in one case; times in seconds.

    Args:
        name: of the engine.
        kind: "float", "8 bits", "4 bits", or the task: with whom it competes.
        own: whether it is qkernels.
        median: of all timed calls.
        min: of all timed calls.
        iqr: interquartile range.
        samples: how many calls were timed.
        faults: minor page faults of a call.
        sqnr: of its result against the float reference, in dB; None where there is none.
        arithmetic: what limits it, a key of the record's limits.
        bits: stored bits per weight.
        extra: further facts, such as "cosine".
        waited: for a core, as a share of the time; see `Measured`.
    """

    name: str
    kind: str
    own: bool
    median: float
    min: float
    iqr: float
    samples: int
    faults: float
    sqnr: float | None = None
    arithmetic: str = ""
    bits: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0

    @classmethod
    def of(cls, name: str, kind: str, own: bool, measured: Measured, **more: Any) -> Result:
        t = measured.timing
        return cls(
            name,
            kind,
            own,
            t.median,
            t.min,
            t.iqr,
            len(t.samples),
            measured.faults,
            waited=measured.waited,
            **more,
        )


@dataclass
class Record:
    """One case: several contenders timed against each other.

    Args:
        unit: what was measured in one go, such as "linear 4096x4096".
        group: one of `plan.GROUPS`.
        case: what the case is, such as {"k": 4096, "n": 4096, "m": 1}.
        isa: instruction set that qkernels used.
        threads: number of threads.
        limits: rates sampled in the same rounds: "read" and "copy" in bytes per second, and for
            each arithmetic its operations per second.
        results: of the contenders.
    """

    unit: str
    group: str
    case: dict[str, Any]
    isa: str
    threads: int
    limits: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.group, self.isa, self.threads, *sorted(self.case.items()))


@dataclass
class Results:
    """A whole run.

    Args:
        about: machine, versions, commit, environment and options.
        limits: the machine's survey: name → {threads → rate}.
        skipped: contender → why it was not measured.
        done: units that are complete.
        records: the cases.
    """

    about: dict[str, Any]
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees half of it."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            found = json.loads(path.read_text())
            if found.pop("format") != FORMAT:
                raise ValueError("it has another format number")
            records = [
                Record(**{**r, "results": [Result(**x) for x in r["results"]]})
                for r in found.pop("records")
            ]
            return cls(records=records, **found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no results of `qkernels bench`: {error}") from None

    def add(self, unit: str, records: list[Record]) -> None:
        """Take in the records of a unit that is now complete."""
        replaced = {r.key for r in records}
        self.records = [r for r in self.records if r.key not in replaced] + records
        if unit not in self.done:
            self.done.append(unit)


def about(peers: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions, commit and environment of this process.

    Args:
        peers: distribution → version.
        options: of the command line.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {
            **machine_facts(),
            "cores": os.cpu_count(),
            "cache": last_level_cache(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "features": [name for name, there in _C.cpu_features().items() if there],
        },
        "versions": {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("numpy", "transformers")},
            **peers,
        },
        "build": dict(_C.build_info()),
        "commit": _commit(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "options": dict(options),
    }


def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    sizes = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) * sizes[text[-1]] if text[-1:] in sizes else int(text or 0))
    return max(found) or 32 << 20


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the checkout that runs, "+" if it is changed; "" outside of one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not (root / ".git").exists():
            return ""
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except FileNotFoundError:  # no git
        return ""
