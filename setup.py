"""Builds `qkernels._C`, the one C++ extension; everything else is declared in pyproject.toml."""

import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

import setuptools


def fail(sentence):
    raise SystemExit(f"qkernels: {sentence}")


def older(version, *parts):
    return tuple(int(part) for part in version.split(".")[: len(parts)]) < parts


if not sys.platform.startswith("linux") or not sysconfig.get_platform().endswith("x86_64"):
    fail(f"the kernels are written for Linux on x86-64, this is {sysconfig.get_platform()}")

if older(setuptools.__version__, 77):
    fail(
        f"building from source needs setuptools >= 77, but {setuptools.__version__} is installed "
        "in this environment; upgrade it, or let pip build in isolation (that is, without "
        "--no-build-isolation)"
    )

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError as missing:
    fail(
        f"building from source needs torch >= 2.10 and setuptools, but {missing.name!r} is not "
        "installed in this environment; install torch first, or let pip build in isolation "
        "(that is, without --no-build-isolation), which fetches it for the build"
    )

if older(torch.__version__, 2, 10):
    fail(
        f"building from source needs torch >= 2.10 (the first with the stable C++ interface that "
        f"qkernels uses), but torch {torch.__version__} is installed; upgrade torch"
    )

compiler = os.environ.get("CXX", "c++")
if shutil.which(compiler.split()[0]) is None:
    fail(f"the C++ compiler {compiler!r} was not found; install g++ 11 or newer, or set CXX")

# Two jobs fit a small machine: one kernel file takes about 1 GB to compile.
os.environ.setdefault("MAX_JOBS", "2")
# A virtual environment that is used without being activated has its ninja here.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


class BuildKernels(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Editable installs would otherwise compile in a temporary folder, from nothing each time.
        self.build_temp = f"build/{sys.implementation.cache_tag}"
        version = self.distribution.get_version()
        self.define = [*(self.define or []), ("QKERNELS_VERSION", f'"{version}"')]


compile_args = [
    "-std=c++20",
    "-O3",
    "-g0",
    # No fused multiply-add that the source does not spell out: results must not depend on the ISA.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Torch's headers (pybind11 among them) and Python's may warn; ours may not.
    *(f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]),
]
if Path(".git").exists():
    # In a checkout only: users compile the sdist with compilers that nobody here has seen.
    compile_args.append("-Werror")

extension = CppExtension(
    "qkernels._C",
    sorted(set(glob("csrc/cpu/*.cpp") + glob("csrc/ops/*.cpp")) - set(glob("csrc/ops/cuda_*.cpp"))),
    include_dirs=[os.path.abspath("csrc")],
    depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
    # The stable interface of torch 2.10: one build serves that release and every later one.
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=compile_args,
)
# The stable interface lives in libtorch_cpu; naming c10 or torch_python, as CppExtension does,
# would tie the extension to one release of torch.
extension.libraries = ["torch_cpu"]

setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels})
