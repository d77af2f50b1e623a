"""Builds the emulator's library with g++, and says how nvcc compiles the same sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests/cuda/host"
OUT = ROOT / "build/cuda_host"

# As setup.py builds the CPU library, but less optimized.
FLAGS = [
    *"-std=c++20 -O1 -g0 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden".split(),
    *"-Wall -Wextra -Werror -Wno-unknown-pragmas".split(),
    "-DQKERNELS_HOST -DQKERNELS_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{ROOT / 'csrc'}",
    *(f"-isystem{path}" for path in include_paths()),
    f"-include {HOST / 'cuda_host.h'}",
]


# As setup.py compiles them.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}"]


def nvcc() -> str | None:
    """The compiler that setup.py takes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else []
    found = (shutil.which(place) for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc"))
    return next(filter(None, found), None)


def glue() -> list[Path]:
    """The files of csrc/ops that are built for CUDA: all but those of the CPU."""
    return sorted(
        path
        for path in (ROOT / "csrc/ops").glob("*.cpp")
        if not path.name.startswith("cpu_") and path.name != "introspect.cpp"
    )


def kernels() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def emulated() -> Path:
    """The library that registers torch.ops.qkernels_host; only what changed is compiled."""
    OUT.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(FLAGS)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out "
        + " ".join(f"-L{path}" for path in library_paths())
        + " -ltorch_cpu",
    ]
    objects = []
    for source in [*kernels(), *glue(), *sorted(HOST.glob("*.c*"))]:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build qkernels_host.so: link {' '.join(objects)}")
    (OUT / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert ninja, "ninja is not installed"
    done = subprocess.run([ninja, "-C", OUT, "-j2"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the emulator's library does not build:\n{done.stdout[-8000:]}")
    return OUT / "qkernels_host.so"
