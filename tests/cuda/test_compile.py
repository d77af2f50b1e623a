"""What nvcc made of the kernels: no local memory, and the instructions that were meant.

`make build` compiles for the architectures of QKERNELS_CUDA_ARCHS, and the quick tests read that
library; `make test-full` compiles every file for every architecture besides.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from helpers import cuda
from helpers.cuda import ROOT
from qkernels import _cuda

pytestmark = [
    pytest.mark.skipif(cuda.nvcc() is None, reason="no nvcc here: nothing to look at"),
    pytest.mark.timeout(900),
]

# Kernels that may keep something in local memory, by what c++filt calls them: why.
MAY_SPILL: dict[str, str] = {
    r"\bskinny_kernel<\(qkernels::Format\)1, 2>.*\(sm_(80|86|89|1.0a)\)": "8 bytes: 16 tokens",
    r"\blinear_float_kernel<.*Format\)0, .* 2, 8, 8>.*\(sm_120a\)": "8 bytes: 64 x 256",
    r"\bbackward_16_kernel<.*Format\)[01], .* false>.*\(sm_100a\)": "8 bytes: ragged rows",
}

# What has to be in the machine code of each kernel that matches.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    # bfloat16 to int8, eight at a time.
    r"\bquantize_with_kernel<\(qkernels::Format\)0, \(qkernels::DType\)1, true>": (
        r"LDG\.E\.128\S*",
        r"STG\.E\.64",
    ),
    # int8 products, their operands through shared memory.
    r"\brow_kernel<": (r"IMMA\.16832\.S8\.S8", r"LDGSTS\S*\.128\S*", r"LDS\.128"),
    r"\bgrouped_kernel<": (r"IMMA\.16832\.S8\.S8", r"LDGSTS\S*\.128\S*", r"LDS\.128"),
    r"\bskinny_kernel<": (r"IMMA\.16832\.S8\.S8", r"LDGSTS\S*\.128\S*", r"LDS\.128"),
    # Two eights of bfloat16 to 4 bits: a vector of codes.
    r"\bshort_groups_kernel<.*QuantizeJob<\(qkernels::Format\)[12], \(qkernels::DType\)1>, 16>": (
        r"LDG\.E\.128\S*",
        r"STG\.E\.64",
    ),
    r"\bconv_kernel<": (r"IMMA\.16832\.S8\.S8", r"LDGSTS\S*", r"LDS\.128"),
    r"\bdequantize_kernel<\(qkernels::Format\)1, \(qkernels::DType\)1, true>": (
        r"LDG\.E\S*",
        r"STG\.E\.128",
    ),
    # A packed weight to bfloat16: 16 bytes of codes, and eight numbers at a time.
    r"\bdequantize_packed_kernel<\(qkernels::Format\)[012], \(qkernels::DType\)1>": (
        r"LDG\.E\.\S*128\S*",
        r"STG\.E\.128",
    ),
    r"\bfinish_kernel<\(qkernels::DType\)1, true>": (r"LDG\.E\.128\S*", r"STG\.E\.128"),
    # Weights in 16 bytes past L1, x in the background, products on the tensor cores.
    r"\blinear_float_kernel<.*\(qkernels::DType\)1,": (
        r"LDG\.E\S*128\S*",
        r"LDGSTS\.E\.BYPASS\S*128",
        r"LDS\.128",
        r"HMMA\.16816\.F32\.BF16",
    ),
    r"\blinear_float_kernel<.*\(qkernels::DType\)2,": (r"HMMA\.16816\.F32",),
    r"\bgemv_kernel<.*\(qkernels::DType\)1,": (
        r"LDG\.E\S*128\S*",
        r"LDGSTS\.E\.BYPASS\S*128",
        r"HMMA\.16816\.F32\.BF16",
    ),
    # The same with scales that are chosen: groups of up to 256, and longer ones.
    r"\bshort_groups_kernel<.*QuantizeJob<\(qkernels::Format\)0, \(qkernels::DType\)1>": (
        r"LDG\.E\.128\S*",
        r"STG\.E\.(64|128)",
    ),
    r"\blong_groups_kernel<.*QuantizeJob<\(qkernels::Format\)0, \(qkernels::DType\)1>": (
        r"LDG\.E\.128\S*",
        r"STG\.E\.64",
    ),
    # int4 weight, bfloat16 gradient.
    r"\bbackward_16_kernel<\(qkernels::Format\)1, \(qkernels::DType\)1, true>": (
        r"HMMA\.16816\.F32\.BF16",
        r"LDSM\.16\.M88\.4",
        r"LDSM\.16\.MT88\.4",
        r"LDGSTS\.E\.\S*128\S*",
    ),
}


def tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit, from there or from the package of its own on PyPI."""
    homes = [Path(nvcc).parent] if (nvcc := cuda.nvcc()) else []
    packages = [path for at in sys.path for path in Path(at).glob("nvidia/*/bin")]
    found = shutil.which(name) or next(
        (str(home / name) for home in (*homes, *packages) if (home / name).exists()), None
    )
    return Path(found) if found else None


def disassembler() -> Path:
    found = tool("cuobjdump")
    if found is None or tool("nvdisasm") is None:
        pytest.skip("no cuobjdump and nvdisasm here; pip install -r requirements/test.txt")
    return found


def run(*command: str | Path) -> str:
    path = os.pathsep.join([str(disassembler().parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def local_memory(binary: Path, arch: str = "") -> dict[str, int]:
    """Bytes of stack by kernel, as c++filt calls it and with its architecture.

    A cubin does not say its own, so it is given.
    """
    text = run(disassembler(), "--dump-resource-usage", binary)
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.fullmatch(r" Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"\bSTACK:(\d+) .*\bLOCAL:(\d+)", line):
            found[arch, name] = int(match[1]) + int(match[2])
    names = demangled([name for _, name in found])
    return {
        f"{name} ({arch})": size
        for name, ((arch, _), size) in zip(names, found.items(), strict=True)
    }


def check_local_memory(binary: Path, arch: str = "") -> None:
    kernels = local_memory(binary, arch)  # of a file that only launches others' there are none
    wrong = [
        f"{name}: {size} bytes"
        for name, size in kernels.items()
        if size and not any(re.search(allowed, name) for allowed in MAY_SPILL)
    ]
    assert not wrong, "\n".join(wrong)


def library() -> Path:
    if not _cuda.LIBRARY.exists():
        pytest.fail(f"{_cuda.LIBRARY} is missing although nvcc is here; `make build` makes it")
    return _cuda.LIBRARY


@cache
def machine_code() -> dict[str, set[str]]:
    """The instructions of each kernel in the built library, one architecture after the other."""
    text = run(disassembler(), "--dump-sass", library())
    functions: dict[str, set[str]] = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name = part.split("\n", 1)[0].strip()
        mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", part, re.M)
        functions.setdefault(name, set()).update(mnemonics)
    return dict(zip(demangled(list(functions)), functions.values(), strict=True))


def test_no_kernel_uses_local_memory() -> None:
    assert local_memory(library())
    check_local_memory(library())


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_instructions(kernel: str) -> None:
    matching = {name: code for name, code in machine_code().items() if re.search(kernel, name)}
    assert matching, f"no kernel is called {kernel}"
    for name, code in matching.items():
        for instruction in INSTRUCTIONS[kernel]:
            assert any(re.fullmatch(instruction, found) for found in code), (name, instruction)


def test_warpgroups_on_hopper(tmp_path: Path) -> None:
    """`make build` may leave sm_90a out, so the one file that needs it is compiled here."""
    source, binary = ROOT / "csrc/cuda/linear_int8_warpgroups.cu", tmp_path / "hopper.cubin"
    run(cuda.nvcc(), *cuda.NVCC_FLAGS, "-arch=sm_90a", "-cubin", source, "-o", binary)
    check_local_memory(binary)
    code = run(disassembler(), "--dump-sass", binary)
    assert "UBLKCP.S.G.MULTICAST" in code
    first, last = (find(code, "IGMMA.64x256x32.S8.S8") for find in (str.index, str.rindex))
    assert "MEMBAR" not in code[first:last]  # a thousand cycles, each time


def test_every_kernel_is_there_for_every_architecture_built() -> None:
    """A kernel that is built for some architectures only would fail to launch on the others."""
    archs: dict[str, set[str]] = {}
    for name in local_memory(library()):
        kernel, arch = re.fullmatch(r"(.*) \((sm_\w+)\)", name).groups()
        archs.setdefault(kernel, set()).add(arch)
    assert len({frozenset(found) for found in archs.values()}) == 1


@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100a", "120a"])
def test_every_file_for_every_architecture(arch: str, tmp_path: Path) -> None:
    for source in cuda.kernels():
        binary = tmp_path / f"{source.stem}.cubin"
        run(cuda.nvcc(), *cuda.NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", binary)
        check_local_memory(binary, f"sm_{arch}")
