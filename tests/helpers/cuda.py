"""Builds the emulator's library with g++, says how nvcc compiles the same sources, and hands the
tests of kernels the emulator or a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests/cuda/host"
# With gcc's sanitizers, which see what is read outside of tensors. They replace the calls that find
# races, and do not know the fibers' stacks.
SANITIZE = os.environ.get("QKERNELS_SANITIZE") == "1"
OUT = ROOT / f"build/cuda_host{'_sanitize' * SANITIZE}"
CHECKS = "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
SANITIZERS = f"-fsanitize={CHECKS} --param=asan-stack=0 -fno-omit-frame-pointer" if SANITIZE else ""

# As setup.py builds the CPU library, but less optimized.
FLAGS = [
    *"-std=c++20 -O1 -g0 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden".split(),
    *"-Wall -Wextra -Wno-unknown-pragmas".split(),
    # The sanitizers' own branches make gcc take some variables for uninitialized.
    f"{SANITIZERS} -g1" if SANITIZE else "-Werror",
    "-DQKERNELS_HOST -DQKERNELS_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{ROOT / 'csrc'}",
    *(f"-isystem{path}" for path in include_paths()),
    f"-include {HOST / 'cuda_host.h'}",
]

# Of kernels: each plain load and store calls a function, which finds races.
NOTED = "" if SANITIZE else "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0"

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
        f"  command = {compiler} {' '.join(FLAGS)} $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {SANITIZERS} -shared $in -o $out "
        + " ".join(f"-L{path}" for path in library_paths())
        + " -ltorch_cpu",
    ]
    objects = []
    for source in [*kernels(), *glue(), *sorted(HOST.glob("*.c*"))]:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if source.suffix == ".cu":
            lines.append(f"  more = {NOTED}")
        elif source.parent == HOST:
            lines.append("  more = -O3")
    lines.append(f"build qkernels_host.so: link {' '.join(objects)}")
    (OUT / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert ninja, "ninja is not installed"
    # The compiler needs none of the libraries that sanitizers are.
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([ninja, "-C", OUT, "-j2"], capture_output=True, text=True, env=plain)
    if done.returncode != 0:
        sys.exit(f"the emulator's library does not build:\n{done.stdout[-8000:]}")
    return OUT / "qkernels_host.so"


# ---- Where the tests of kernels run --------------------------------------------------------------


def targets() -> list[str]:
    """The emulator, and the GPU where there is one that the library runs on."""
    from qkernels import _cuda

    return ["emulator", *(["device"] if torch.cuda.is_available() and not _cuda.PROBLEM else [])]


def hopper(ops: Any) -> bool:
    """Whether kernels are chosen for a GPU of sm_90a."""
    if isinstance(ops, DeviceOps):
        from qkernels import _C

        return torch.cuda.get_device_capability()[0] == 9 and _C.build_info()["hopper"]
    return os.environ.get("QKERNELS_HOST_SM90", "0") != "0"


class DeviceOps:
    """torch.ops.qkernels for tensors of the CPU, computed on the GPU: what the emulator offers.

    Arguments go to the GPU with the strides that they have, what is written there comes back, and
    the results are on the CPU.
    """

    def __getattr__(self, name: str) -> Any:
        return DeviceOp(getattr(torch.ops.qkernels, name))


class DeviceOp:
    """One of them."""

    def __init__(self, op: Any) -> None:
        self._op = op

    def __getattr__(self, overload: str) -> Any:
        return DeviceOp(getattr(self._op, overload))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moved = {key: on_gpu(value) for key, value in kwargs.items()}
        result = self._op(*map(on_gpu, args), **moved)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                value.copy_(moved[key])
        if isinstance(result, Tensor):
            return result.cpu()
        return tuple(t.cpu() for t in result) if isinstance(result, tuple | list) else result


def on_gpu(value: Any) -> Any:
    """A tensor on the GPU with the same strides and place in its storage; other values as is."""
    if isinstance(value, list):
        return [on_gpu(item) for item in value]
    if not isinstance(value, Tensor) or value.is_cuda:
        return value
    whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).cuda()
    there = torch.empty(0, dtype=value.dtype, device="cuda")
    there.set_(whole.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    if value.is_neg():
        there = torch._neg_view(there)
    return there
