"""What the process runs in: variables, libraries that are mapped, allocator, CPU quota."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Every environment variable that qkernels reads. There is no other list.
VARIABLES: dict[str, str] = {
    "QKERNELS_ISA": (
        "the instruction set that kernels use: scalar, avx2, avxvnni, avx512 or avx512bf16; one "
        "that the machine lacks is an error. Not set: the best that the CPU can run."
    ),
    "QKERNELS_HUGE_PAGES": (
        "0 keeps packed weights of 2 MiB and more in the system's usual pages. Not set, or "
        "anything else: Linux is asked for pages of 2 MiB for them, which makes layers with few "
        "rows faster."
    ),
    "QKERNELS_MATMUL_ROWS": (
        "on a GPU, the rows of x from which a linear layer with float activations, and its "
        "gradient, dequantize the weight and call torch's matmul, whatever the format. A large "
        "number keeps the kernels, and with them results that do not depend on the other rows. "
        "Not set: the numbers in csrc/cuda/linear_float.h."
    ),
    "QKERNELS_GROUPED_WGMMA": (
        "1 lets a Hopper GPU run its own kernel for int8 activations and weights in groups. It is "
        "more than twice as fast, and equal to the bit in all tests, but not cleared by "
        "compute-sanitizer. Not set, or anything else: the kernel of the other GPUs."
    ),
    "QKERNELS_CUDA": (
        "read when qkernels is built from source: 0 leaves the CUDA kernels out, 1 builds them and "
        "makes it an error if nvcc is missing. Not set: they are built where nvcc is found and "
        "torch is built with CUDA."
    ),
    "QKERNELS_CUDA_ARCHS": (
        "read when qkernels is built from source: the GPU architectures to build for, as 80;90a; "
        "+PTX behind one adds code that later GPUs translate. Not set: "
        "80+PTX;86;89;90a;100a;120a, as far as nvcc knows them."
    ),
    "QKERNELS_SANITIZE": (
        "read when qkernels is built from source: 1 builds the CPU library with gcc's sanitizers, "
        "for `make sanitize`. Not set, or 0: without."
    ),
}

# Variables of others that change what qkernels does or how fast.
FOREIGN_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_CONF",
)

# Measured on glibc 2.36: no page fault when a large tensor is allocated again and again, in twelve
# of fourteen processes (the place of the heap is random, and in some it cannot grow). Freed memory
# then stays in the process, up to the given number of bytes.
GLIBC_ADVICE = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483648"
JEMALLOC_ADVICE = "MALLOC_CONF=oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[.-]")
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def cpu_name() -> str:
    """The processor's own name from /proc/cpuinfo, or what the platform module knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def mapped_libraries() -> tuple[str, ...]:
    """Paths of the shared objects that are mapped into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line}
    return tuple(sorted(paths))


def openmp_runtimes(libraries: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the libraries that are OpenMP runtimes; more than one compete for the cores."""
    return tuple(path for path in libraries if _OPENMP.match(os.path.basename(path)))


def allocator(libraries: tuple[str, ...]) -> str:
    """The memory allocator: tcmalloc, jemalloc or mimalloc if one is mapped, else glibc's."""
    for path in libraries:
        for name in _ALLOCATORS:
            if name in os.path.basename(path):
                return name
    return "glibc malloc"


@dataclass(frozen=True)
class PageFaults:
    """What it costs to allocate and fill a tensor that was allocated and freed before."""

    size: int
    pages: int
    faults: int
    seconds: float


def page_faults(size: int = 64 << 20) -> PageFaults:
    """Allocate, fill and free a tensor several times, and count the page faults of the best time.

    An allocator that keeps memory needs a few rounds to find a place for the tensor; one that
    gives it back to the system pays every time.

    Args:
        size: bytes of the tensor.
    """
    import resource

    pages = size // resource.getpagesize()
    rounds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        torch.empty(size, dtype=torch.uint8).fill_(1)
        elapsed = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        rounds.append(PageFaults(size, pages, faults, elapsed))
    return min(rounds[1:], key=lambda best: best.faults)


def usable_cpus() -> int:
    """CPUs that this process may be scheduled on."""
    return len(os.sched_getaffinity(0))


def cpu_quota() -> float | None:
    """CPUs that the container's quota grants (cgroup v2 or v1), None if it is not limited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        v1 = Path("/sys/fs/cgroup/cpu")
        quota_us = int((v1 / "cpu.cfs_quota_us").read_text())
        return None if quota_us <= 0 else quota_us / int((v1 / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
