"""What is shipped: the extension's dependencies, the sdist, the wheel, and an install of it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from qkernels import _C

ROOT = Path(__file__).resolve().parents[2]
CUDA = shutil.which("nvcc") is not None


def output(*command: str | Path, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# ---- The extension -------------------------------------------------------------------------------


def test_needs_few_libraries() -> None:
    dynamic = output("readelf", "--dynamic", "--wide", _C.__file__)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed - system == {"libtorch_cpu.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_uses_only_the_stable_interface_of_torch() -> None:
    """Names of torch's C++ classes change with every release; its C functions stay."""
    symbols = output("nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__)
    assert not re.findall(r".*\b(?:at|c10|caffe2|torch)::.*", symbols)
    assert "aoti_torch_library_init_def" in symbols


def test_exports_only_the_module() -> None:
    """Weak symbols (W, V, u) are copies of the standard library's templates, in any C++ library."""
    symbols = output("nm", "--dynamic", "--defined-only", _C.__file__)
    assert re.findall(r" T (.+)", symbols) == ["PyInit__C"]
    assert "qkernels" not in symbols


OPENMP = """
import torch, qkernels
x = torch.ones(256, 256)
torch.ops.qkernels.int_mm(x.to(torch.int8), x.to(torch.int8))
torch.mm(x, x)
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(sum(name in path.rsplit("/", 1)[-1] for path in paths for name in ("gomp", "iomp", "libomp")))
"""


def test_one_openmp_runtime_per_process() -> None:
    assert output(sys.executable, "-c", OPENMP).strip() == "1"


# ---- What is shipped -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    output(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=ROOT)
    (archive,) = out.glob("qkernels-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees this one's packages (torch above all) but not its qkernels.

    A folder that a .pth file names is searched for packages, while its own .pth files, the one of
    the editable install among them, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(sdist: Path, clean_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that whatever the sdist lacks is missed here."""
    out = tmp_path_factory.mktemp("wheel")
    ninja = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    pip = [clean_python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "PATH": ninja, "QKERNELS_CUDA_ARCHS": "80"}
    if CUDA:
        environment["QKERNELS_CUDA"] = "1"  # whatever torch is here
    output(*pip, "--wheel-dir", out, sdist, cwd=out, env=environment)
    (archive,) = out.glob("qkernels-*.whl")
    return archive


@pytest.mark.full
def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = output("git", "ls-files", "csrc", "qkernels", "setup.py", "pyproject.toml", cwd=ROOT)
    assert set(tracked.split()) <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_wheel_holds_what_runs_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if name.endswith(".so")]
    extension = [name for name in libraries if re.fullmatch(r"qkernels/_C\.[\w-]+\.so", name)]
    assert len(extension) == 1
    # The CUDA kernels are in it if this machine could compile them.
    assert set(libraries) - set(extension) == ({"qkernels/_C_cuda.so"} if CUDA else set())
    assert {"qkernels/py.typed", "qkernels/_C.pyi", "qkernels/__init__.py"} <= set(names)
    sources = (".h", ".inl", ".cu", ".cuh", ".o")
    assert not [name for name in names if "csrc" in name or name.endswith(sources)]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qkernels"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    tracked = output("git", "ls-files", "qkernels", cwd=ROOT)
    assert set(tracked.split()) <= set(names)


INSTALLED = """
import importlib.metadata, sys, torch
import qkernels
print(qkernels.__file__)
print(importlib.metadata.version("qkernels"), qkernels._C.build_info()["version"])
q = qkernels.quantize(torch.randn(4, 64), "int8")
print(tuple(q.dequantize(torch.float32).shape))
"""


@pytest.mark.full
@pytest.mark.timeout(900)
def test_wheel_installs_and_runs_elsewhere(wheel: Path, clean_python: Path, tmp_path: Path) -> None:
    pip = [clean_python, "-m", "pip", "install", "--no-deps", "--ignore-installed", "--no-index"]
    output(*pip, wheel, cwd=tmp_path)
    where, versions, shape = output(clean_python, "-c", INSTALLED, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(clean_python.parents[1])
    stated, compiled = versions.split()
    assert stated == compiled
    assert shape == "(4, 64)"
    command = clean_python.parent / "qkernels"
    assert "doctor" in output(command, "--help", cwd=tmp_path)


# setup.py up to the point where it has decided what to build.
SETUP = """
import os, sys
import setuptools, torch.utils.cpp_extension
setuptools.setup = lambda **_: sys.exit("nothing is wrong")
if "NO_NVCC" in os.environ:
    exists = os.path.exists
    os.path.exists = lambda path: "nvcc" not in path and exists(path)
sys.argv = ["setup.py", "build_ext"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""

NO_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "build_ext"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"QKERNELS_CUDA": "yes"}, "QKERNELS_CUDA must be 0 (no CUDA kernels), 1 or not set"),
        ({"QKERNELS_CUDA": "1", "NO_NVCC": "1"}, "asks for CUDA kernels, but nvcc was not found"),
        (
            {"QKERNELS_CUDA": "1", "QKERNELS_CUDA_ARCHS": "80;12"},
            "QKERNELS_CUDA_ARCHS names '12', which",
        ),
        ({"QKERNELS_SANITIZE": "yes"}, "QKERNELS_SANITIZE must be 0 (no sanitizers), 1 or not set"),
    ],
)
def test_building_says_what_is_wrong_with_a_variable(variables, sentence, tmp_path: Path) -> None:
    if "QKERNELS_CUDA_ARCHS" in variables and not CUDA:
        pytest.skip("no nvcc here: nobody to ask which architectures there are")
    script = tmp_path / "build.py"
    script.write_text(SETUP)
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_building_without_torch_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "needs torch >= 2.10" in done.stderr and "Traceback" not in done.stderr
