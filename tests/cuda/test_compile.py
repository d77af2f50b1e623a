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

# Bytes that a kernel may keep in local memory. Nobody has measured anything on the two newest, and
# a few kernels are a register or two short there.
MAY_SPILL = {"sm_100a": 16, "sm_120a": 16}

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


def local_memory(binary: Path, arch: str = "") -> dict[tuple[str, str], int]:
    """Bytes of stack by architecture and kernel, as c++filt calls it.

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
        (arch, name): size for name, ((arch, _), size) in zip(names, found.items(), strict=True)
    }


def check_local_memory(binary: Path, arch: str = "") -> None:
    kernels = local_memory(binary, arch)  # of a file that only launches others' there are none
    wrong = [
        f"{name} ({arch}): {size} bytes"
        for (arch, name), size in kernels.items()
        if size > MAY_SPILL.get(arch, 0)
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
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 3
    for tokens in (64, 128, 256):
        product = f"IGMMA.64x{tokens}x32.S8.S8"
        (kernel,) = (text for text in kernels if product in text)
        for instruction in ("UBLKCP.S.G.MULTICAST", "STSM.16.MT88.4", "STAS.128", "STG.E.128"):
            assert instruction in kernel, (tokens, instruction)
        # A thousand cycles, each time.
        assert "MEMBAR" not in kernel[kernel.index(product) :], tokens


def test_convolution_on_hopper(tmp_path: Path) -> None:
    source, binary = ROOT / "csrc/cuda/conv_int8_warpgroups.cu", tmp_path / "hopper.cubin"
    run(cuda.nvcc(), *cuda.NVCC_FLAGS, "-arch=sm_90a", "-cubin", source, "-o", binary)
    check_local_memory(binary)
    code = run(disassembler(), "--dump-sass", binary)
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 4
    for columns, kernel in zip((96, 128, 128, 192), sorted(kernels, key=columns_of), strict=True):
        assert columns_of(kernel) == columns
        # Pixels come in the background by way of L1; those outside of the image are not read. With
        # results of a byte or two a thread stores 16.
        assert len(re.findall(r"LDGSTS\.E\.128 .*, P\d ;", kernel)) >= 6
        assert "STSM.16.MT88.4" in kernel
        assert "STG.E.128" in kernel
        first, last = (find(kernel, "IGMMA.64x") for find in (str.index, str.rindex))
        assert "MEMBAR" not in kernel[first:last]


def columns_of(kernel: str) -> int:
    """Pixels of a product."""
    return int(re.search(r"IGMMA\.64x(\d+)x32\.S8\.S8", kernel)[1])


def test_groups_by_warpgroups_on_hopper(tmp_path: Path) -> None:
    source = ROOT / "csrc/cuda/linear_int8_grouped_warpgroups.cu"
    binary = tmp_path / "hopper.cubin"
    command = [cuda.nvcc(), *cuda.NVCC_FLAGS, "-arch=sm_90a", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, source, "-o", binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # While floats take up one product's sums, the next one's are under way.
    assert "wgmma.mma_async instructions are serialized" not in done.stderr
    check_local_memory(binary)
    code = run(disassembler(), "--dump-sass", binary)
    assert "UBLKCP.S.G.MULTICAST" in code
    assert "IGMMA.64x32x32.S8.S8" in code
    assert "IGMMA.64x64x32.S8.S8" in code
    assert "MEMBAR" not in code


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "F32.BF16"), ("f16", "F32")])
def test_float_warpgroups_on_hopper(tmp_path: Path, dtype: str, name: str) -> None:
    source = ROOT / f"csrc/cuda/linear_float_warpgroups_{dtype}.cu"
    binary = tmp_path / "hopper.cubin"
    run(cuda.nvcc(), *cuda.NVCC_FLAGS, "-arch=sm_90a", "-cubin", source, "-o", binary)
    check_local_memory(binary)
    kernels = re.split(r"\n\s*Function : ", run(disassembler(), "--dump-sass", binary))[1:]
    # int8 and int4, symmetric or not, and nf4; for 16, 32 and 64 rows.
    assert len(kernels) == 15
    for code in kernels:
        products = list(re.finditer(rf"HGMMA\.64x(16|32|64)x16\.{name} ", code))
        assert products
        assert "UBLKCP" in code
        assert "MEMBAR" not in code[products[0].start() : products[-1].start()]


def test_every_kernel_is_there_for_every_architecture_built() -> None:
    """A kernel that is built for some architectures only would fail to launch on the others."""
    archs: dict[str, set[str]] = {}
    for arch, kernel in local_memory(library()):
        archs.setdefault(kernel, set()).add(arch)
    assert len({frozenset(found) for found in archs.values()}) == 1


@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100a", "120a"])
def test_every_file_for_every_architecture(arch: str, tmp_path: Path) -> None:
    for source in cuda.kernels():
        binary = tmp_path / f"{source.stem}.cubin"
        run(cuda.nvcc(), *cuda.NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", binary)
        check_local_memory(binary, f"sm_{arch}")
