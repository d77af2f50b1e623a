"""The machine's physical limits: memory bandwidth, and the rate of each multiplying instruction."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from qkernels import _C

SOURCE = Path(__file__).parent / "native" / "limits.cpp"
# The instructions of native/limits.cpp, in words.
PEAKS: Mapping[str, str] = {
    "fma_256": "fp32 FMA, 256 bits",
    "fma_512": "fp32 FMA, 512 bits",
    "madd16_256": "int8 as int16: vpmaddwd + vpaddd",
    "maddubs_256": "int8: vpmaddubsw + vpmaddwd + vpaddd",
    "maddubs8_256": "int4 × int8: eight vpmaddubsw, one vpmaddwd",
    "vnni_256": "int8: vpdpbusd, 256 bits",
    "vnni_512": "int8: vpdpbusd, 512 bits",
    "bf16_512": "bf16: vdpbf16ps",
}
# The best instructions for each arithmetic first; what the ISA in use lacks is passed over.
_BEST: Mapping[str, tuple[str, ...]] = {
    "int8": ("vnni_512", "vnni_256", "madd16_256"),
    "int4": ("vnni_512", "vnni_256", "maddubs8_256"),
    "bf16": ("bf16_512", "fma_512", "fma_256"),
    "fp32": ("fma_512", "fma_256"),
}
# Far more than any last-level cache, and a multiple of 128 bytes for any number of threads.
_STREAM_BYTES = 192 << 20
_SAMPLE_BYTES = 64 << 20


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, so the machine's limits stay unknown."""


@dataclass(frozen=True)
class Limit:
    """One measured limit; `rate` in operations or bytes per second.

    Args:
        name: a key of `PEAKS`, or "read", "write" or "copy".
        threads: how many threads worked at it.
        rate: operations per second (a multiplication and an addition are two), or bytes per second
            (copying counts those read and those written).
    """

    name: str
    threads: int
    rate: float


class Machine:
    """Measures limits with the compiled helper.

    Args:
        threads: threads that count as "all".

    Raises:
        NoCompilerError: no g++ or clang++ is installed, or it failed.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helper = _load(_compile())
        self._peaks: dict[str, int] = {}
        index = 0
        while (name := self._helper.qk_peak_name(index)) is not None:
            if name:
                self._peaks[name.decode()] = index
            index += 1

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Ones, because the pages of fresh zeros may all be one and the same page of the system.
        source, target = (torch.ones(_STREAM_BYTES + 64, dtype=torch.uint8) for _ in range(2))
        return source[-source.data_ptr() % 64 :], target[-target.data_ptr() % 64 :]

    def read(self, threads: int | None = None) -> float:
        """Bytes per second of one pass over a part of memory that no cache holds."""
        threads = threads or self.threads
        source, _ = self._buffers
        self._offset = (getattr(self, "_offset", 0) + _SAMPLE_BYTES) % _STREAM_BYTES
        size = _SAMPLE_BYTES // (384 * threads) * 384 * threads
        return size / float(self._helper.qk_read(source.data_ptr() + self._offset, size, threads))

    def copy(self, threads: int | None = None) -> float:
        """Bytes read and written per second, by the faster of streaming stores and memcpy."""
        threads = threads or self.threads
        source, target = self._buffers
        size = _STREAM_BYTES // (128 * threads) * 128 * threads
        seconds = min(
            float(
                self._helper.qk_copy(
                    target.data_ptr(), source.data_ptr(), size, threads, int(streaming)
                )
            )
            for streaming in (False, True)
        )
        return 2 * size / seconds

    def write(self, threads: int | None = None) -> float:
        """Bytes per second written past the caches; copying cannot write faster than that."""
        threads = threads or self.threads
        _, target = self._buffers
        size = _STREAM_BYTES // (128 * threads) * 128 * threads
        return size / float(self._helper.qk_write(target.data_ptr(), size, threads))

    def peak(self, name: str, threads: int | None = None, seconds: float = 0.004) -> float:
        """Operations per second of the instruction that `PEAKS` describes under this name."""
        return float(self._helper.qk_peak(self._peaks[name], threads or self.threads, seconds))

    def peak_for(self, arithmetic: str) -> str | None:
        """The instruction that limits an arithmetic on the ISA in use.

        Args:
            arithmetic: "int8" (int8 × int8), "int4" (int4 × int8), "bf16" or "fp32".
        """
        usable = [p for p in _BEST[arithmetic] if p in self._peaks and _within_isa(p)]
        return usable[0] if usable else None

    def survey(self) -> list[Limit]:
        """All limits with one thread and with all of them, the best of several samples each."""
        found = []
        for threads in sorted({1, self.threads}):
            for name in self._peaks:
                rate = max(self.peak(name, threads, 0.02) for _ in range(5))
                found.append(Limit(name, threads, rate))
            for name, measure in (("read", self.read), ("write", self.write), ("copy", self.copy)):
                found.append(Limit(name, threads, max(measure(threads) for _ in range(5))))
        return found


def _within_isa(peak: str) -> bool:
    """Whether the ISA in use, which QKERNELS_ISA may have lowered, has this instruction."""
    width = 512 if _C.isa().upper().startswith("AVX512") else 256
    if peak == "vnni_256":
        return "VNNI" in _C.isa().upper()
    return int(peak.rsplit("_", 1)[1]) <= width


def _compile() -> Path:
    """The helper as a shared library, compiled once for each version of its source."""
    given = os.environ.get("CXX", "").split()
    compiler = [shutil.which(given[0])] if given else [shutil.which("g++"), shutil.which("clang++")]
    found = next((c for c in compiler if c), None)
    if found is None:
        raise NoCompilerError(
            "measuring the machine's limits needs a C++ compiler; install g++, or read the results "
            "without the shares of the limits"
        )
    key = hashlib.sha256(SOURCE.read_bytes() + found.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkernels"
    library = cache / f"limits-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".so", delete=False) as made:
        command = [found, "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        done = subprocess.run(
            [*command, "-o", made.name, str(SOURCE)], capture_output=True, text=True
        )
    if done.returncode != 0:
        Path(made.name).unlink()
        raise NoCompilerError(
            f"{found} could not compile {SOURCE.name}: {done.stderr.strip()[-300:]}"
        )
    # Renamed at the end, so that two runs at once never load half a file.
    Path(made.name).replace(library)
    return library


def _load(library: Path) -> ctypes.CDLL:
    helper = ctypes.CDLL(str(library))
    helper.qk_peak_name.argtypes = [ctypes.c_int]
    helper.qk_peak_name.restype = ctypes.c_char_p
    helper.qk_peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    helper.qk_peak.restype = ctypes.c_double
    helper.qk_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    helper.qk_read.restype = ctypes.c_double
    helper.qk_write.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    helper.qk_write.restype = ctypes.c_double
    helper.qk_copy.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
    ]
    helper.qk_copy.restype = ctypes.c_double
    return helper
