"""Each ring of the design includes only what lies below it, and Python leaves kernels alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkernels

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "qkernels"

# What a file of each ring may include; anything else fails. A header of the C++ standard library
# has neither a dot nor a slash in its name.
STANDARD = r"<[a-z_0-9]+>"
MAY_INCLUDE = {
    "core": [STANDARD, '"core/.*"'],
    "cpu": [STANDARD, '"(core|cpu)/.*"'],
    "cuda": [STANDARD, '"(core|cuda)/.*"', r"<cuda\w*\.h>", r"<cuda/.*>"],
    "ops": [
        STANDARD,
        '"(core|cpu|cuda|ops)/.*"',
        "<torch/csrc/stable/.*>",
        "<torch/headeronly/.*>",
        "<torch/csrc/inductor/aoti_torch/c/.*>",
    ],
}
# Files that may include more than their ring does, each for one reason.
ALSO = {
    "cpu/dispatch.cpp": ["<cpuid.h>"],
    "ops/cpu_weights.cpp": [r"<sys/mman\.h>"],
    "ops/cpu_linear.cpp": [r"<sched\.h>"],  # who waits for rows of x lets others run
    "ops/introspect.cpp": [r"<pybind11/\w+\.h>"],
}
INTRINSICS = re.compile(r"cpu/(simd_)?(avx|amx|sse)\w*\.(h|cpp|inl)")
# ops/ splits the work and asks torch's own pool to run it: nobody starts threads, and kernels take
# ranges and have nothing to lock.
THREADS = r"<(thread|future|execution)>|<omp\.h>|#\s*pragma\s+omp"
LOCKS = r"<(mutex|shared_mutex|condition_variable|latch|barrier|semaphore)>"

FILES = sorted(
    path.relative_to(CSRC).as_posix()
    for path in CSRC.rglob("*")
    if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"}
)


def includes(file: str) -> list[str]:
    text = (CSRC / file).read_text()
    return re.findall(r'^\s*#\s*include\s+(<[^>]+>|"[^"]+")', text, re.MULTILINE)


@pytest.mark.parametrize("file", FILES)
def test_includes(file: str) -> None:
    allowed = [*MAY_INCLUDE[file.split("/")[0]], *ALSO.get(file, [])]
    if INTRINSICS.fullmatch(file):
        allowed.append("<immintrin.h>")
    wrong = [name for name in includes(file) if not re.fullmatch("|".join(allowed), name)]
    assert not wrong, f"csrc/{file} includes {', '.join(wrong)}; its ring may include {allowed}"


@pytest.mark.parametrize("file", FILES)
def test_no_threads_of_our_own(file: str) -> None:
    text = (CSRC / file).read_text()
    assert not re.search(THREADS, text)
    assert file.startswith("ops/") or not re.search(LOCKS, text)


def test_introspection_is_free_of_torch() -> None:
    assert not [name for name in includes("ops/introspect.cpp") if "torch" in name]


def test_pybind11_is_in_one_file() -> None:
    users = [file for file in FILES if any("pybind11" in name for name in includes(file))]
    assert users == ["ops/introspect.cpp"]


# One place for what the emulator has to replace.
ASSEMBLY = r"\basm\b|\b__shared__\b|\b__(shfl|ldg|dp4a|byte_perm)\w*\("
RUNTIME = r"<<<|\bcuda[A-Z]\w+\("


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("cuda/")])
def test_instructions_and_the_cuda_runtime_are_in_their_files(file: str) -> None:
    code = re.sub(r"//.*", "", (CSRC / file).read_text())
    assert file.startswith("cuda/ptx") or not re.search(ASSEMBLY, code)
    assert file.startswith("cuda/runtime.") or not re.search(RUNTIME, code)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("cuda/")])
def test_headers_of_cuda_stay_on_their_side(file: str) -> None:
    """csrc/ops is compiled by g++ alone: launch.h is plain C++ and includes no .cuh."""
    if file.endswith(".h"):
        assert not [name for name in includes(file) if "cuda_" in name or ".cuh" in name]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("ops/")])
def test_ops_see_headers_of_kernels_only(file: str) -> None:
    assert not [name for name in includes(file) if name.endswith('.cuh"')]


def test_files_for_both_devices_do_not_include_the_cpu_kernels() -> None:
    shared = [file for file in FILES if re.fullmatch(r"ops/(?!cpu_|introspect)\w+\.cpp", file)]
    assert shared
    for file in shared:
        assert not [name for name in includes(file) if name.startswith('"cpu/')]


# An ISA as a value of its own, or a kernel's name such as matmul_w4a8_avx512_8x48. A sentence that
# a user reads may speak of AVX2.
ISA_NAME = r"avx2|avxvnni|avx512\w*|amx\w*|sm_?[0-9]{2}a?"
KERNEL_NAME = r"\w+_(avx|amx|sm_?[0-9])\w*"


def kernels_named_in(source: str) -> list[str]:
    """Kernels and ISAs in a Python source: identifiers and strings, not docstrings and comments."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            wrong = re.fullmatch(KERNEL_NAME, node.id)
        elif isinstance(node, ast.Attribute):
            wrong = re.fullmatch(KERNEL_NAME, node.attr)
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            wrong = re.fullmatch(f"{ISA_NAME}|{KERNEL_NAME}", str(node.value))
        else:
            continue
        if wrong:
            found.append(f"{wrong[0]} in line {node.lineno}")
    return found


@pytest.mark.parametrize(
    "file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
)
def test_python_never_names_a_kernel(file: str) -> None:
    found = kernels_named_in((PACKAGE / file).read_text())
    assert not found, f"qkernels/{file} names {', '.join(found)}; ask qkernels._C instead"


def test_kernel_names_are_recognized() -> None:
    source = '"""avx2"""\nscalar = use("avx512", "AVX2 is slower")\nmatmul_w4a8_avx2_4x16(scalar)'
    found = ["avx512 in line 2", "matmul_w4a8_avx2_4x16 in line 3"]
    assert sorted(kernels_named_in(source)) == found


@pytest.mark.parametrize("blocked", ["matplotlib", "transformers", "sklearn", "pandas"])
def test_import_needs_no_optional_package(blocked: str) -> None:
    code = f"import sys; sys.modules[{blocked!r}] = None; import qkernels, qkernels.cli"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_needs_no_compiler() -> None:
    code = "import os; os.environ['PATH'] = ''; import qkernels; qkernels.quantize"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tests_run_on_this_tree() -> None:
    assert Path(qkernels.__file__).parent == PACKAGE
