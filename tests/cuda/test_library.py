"""`qkernels._C_cuda` as it is shipped: what it needs, and that it loads. No GPU takes part."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import cuda
from qkernels import _cuda

pytestmark = pytest.mark.skipif(cuda.nvcc() is None, reason="no nvcc here: it is not built")

# What libtorch_cuda has and a torch without CUDA lacks.
STREAM = "aoti_torch_get_current_cuda_stream"


def output(*command: str | Path) -> str:
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    if not _cuda.LIBRARY.exists():
        pytest.fail(f"{_cuda.LIBRARY} is missing although nvcc is here; `make build` makes it")
    return _cuda.LIBRARY


def test_needs_few_libraries(library: Path) -> None:
    dynamic = output("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    system = r"lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d+|ld-linux-x86-64\.so\.2"
    own = {name for name in needed if not re.fullmatch(system, name)}
    assert own == {"libtorch.so", "libtorch_cpu.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_uses_only_the_stable_interface_of_torch(library: Path) -> None:
    symbols = output("nm", "--dynamic", "--undefined-only", "--demangle", library)
    assert not re.findall(r".*\b(?:at|c10|caffe2|torch)::.*", symbols)
    used = set(re.findall(r" U ((?:aoti_)?torch_\w+)", symbols))
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    there = set(output("nm", "--dynamic", "--defined-only", torch_cpu).split())
    assert used - there == {STREAM}


def test_exports_nothing(library: Path) -> None:
    assert not re.findall(r" T (.+)", output("nm", "--dynamic", "--defined-only", library))


LOADED = """
import json, sys, torch, qkernels
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps([op for op in sys.argv[2:] if has(f"qkernels::{op}", "CUDA")]))
q = qkernels.quantize(torch.ones(4, 64), "int8")
assert torch.equal(q.dequantize(torch.float32), torch.ones(4, 64))
"""


def test_loads_and_registers_what_the_emulator_tests(
    library: Path, emulator: Any, tmp_path: Path
) -> None:
    """With the one missing function put in its place, a torch without CUDA can load it."""
    source, stub = tmp_path / "stream.c", tmp_path / "stream.so"
    source.write_text(f"int {STREAM}(int device, void** stream) {{ return 1; }}\n")
    output(os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", stub)
    prefix = "qkernels::"
    names = sorted(
        name.removeprefix(prefix)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    )
    done = subprocess.run(
        [sys.executable, "-c", LOADED, library, *names],
        env={**os.environ, "LD_PRELOAD": str(stub)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels = [n for n in names if has(f"qkernels_host::{n}", "CPU")]
    by_torch = ["add_norm", "attention"]  # on a GPU, in Python
    assert json.loads(done.stdout) == sorted(kernels + by_torch)


def test_a_torch_without_cuda_leaves_it_alone() -> None:
    if torch.version.cuda is None:
        assert "this torch is built without CUDA" in _cuda.PROBLEM
    else:
        assert _cuda.PROBLEM == ""
