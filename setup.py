"""Builds the compiled libraries; everything else is declared in pyproject.toml.

`qkernels._C` is always built. `qkernels._C_cuda`, the CUDA kernels, takes minutes more: it is
built where nvcc is found and torch is one for CUDA, or where QKERNELS_CUDA=1 asks for it. No GPU is
needed. QKERNELS_SANITIZE=1 builds `_C` with gcc's sanitizers; scripts/sanitize.sh does that and
runs the tests.
"""

import os
import shutil
import subprocess
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
    import torch.utils.cpp_extension as torch_build
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


wanted = os.environ.get("QKERNELS_SANITIZE", "")
if wanted not in ("", "0", "1"):
    fail(f"QKERNELS_SANITIZE must be 0 (no sanitizers), 1 or not set, got {wanted!r}")
SANITIZE = wanted == "1"


class BuildKernels(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Editable installs would otherwise compile in a temporary folder, from nothing each time.
        self.build_temp = f"build/{sys.implementation.cache_tag}{'-sanitize' * SANITIZE}"
        version = self.distribution.get_version()
        self.define = [*(self.define or []), ("QKERNELS_VERSION", f'"{version}"')]

    def build_extension(self, extension):
        # Both libraries are built from some files of csrc/ops, each in its own way.
        outer = self.build_temp
        self.build_temp = os.path.join(outer, extension.name)
        try:
            super().build_extension(extension)
        finally:
            self.build_temp = outer

    def get_ext_filename(self, name):
        # There is no Python in the CUDA library, so one file serves every version.
        if name.endswith("_C_cuda"):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)


# Of what "undefined" means, what arithmetic and indexing can get wrong: all of it makes a file
# compile for many minutes. Python's own flags say -fwrapv, which would hide overflow.
checks = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
sanitize_args = [
    f"-fsanitize=address,{checks},float-cast-overflow",
    "-fno-wrapv",
    "-fno-omit-frame-pointer",
]
compile_args = [
    "-std=c++20",
    *(["-O1", "-g1", *sanitize_args] if SANITIZE else ["-O3", "-g0"]),
    # No fused multiply-add that the source does not spell out: results must not depend on the ISA.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Torch's headers (pybind11 among them) and Python's may warn; ours may not.
    *(f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]),
]
if Path(".git").exists() and not SANITIZE:
    # In a checkout only: users compile the sdist with compilers that nobody here has seen. The
    # sanitizers' own branches make gcc take some variables for uninitialized.
    compile_args.append("-Werror")

sources = {*glob("csrc/cpu/*.cpp"), *glob("csrc/ops/*.cpp")}
headers = [path for end in ("h", "inl", "cuh") for path in glob(f"csrc/**/*.{end}", recursive=True)]


def library(name, sources, macros, arguments):
    extension = CppExtension(
        name,
        sorted(sources),
        include_dirs=[os.path.abspath("csrc")],
        depends=sorted(headers),
        # The stable interface of torch 2.10: one build serves that release and every later one.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), *macros],
        extra_compile_args=arguments,
    )
    # The stable interface lives in libtorch_cpu; naming c10 or torch_python, as CppExtension does,
    # would tie the extension to one release of torch.
    extension.libraries = ["torch_cpu"]
    extension.extra_link_args = sanitize_args if SANITIZE else []
    return extension


# ---- CUDA ----------------------------------------------------------------------------------------

# "a" is code for one architecture alone; "+PTX" is what later ones can translate.
DEFAULT_ARCHS = "80+PTX;86;89;90a;100a;120a"


def cuda_toolkit():
    """The CUDA toolkit's folder and that of its static runtime; None where they are missing."""
    compiler = os.path.realpath(shutil.which("nvcc") or "nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [os.path.dirname(os.path.dirname(compiler)), "/usr/local/cuda"]
    for home in filter(None, homes):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            runtime = os.path.join(home, folder, "libcudart_static.a")
            if os.path.exists(f"{home}/bin/nvcc") and os.path.exists(runtime):
                return home, os.path.dirname(runtime)
    return None


def arch_flags(home):
    """nvcc's flags for the architectures to build for; of the default ones, those that it knows."""
    listing = [f"{home}/bin/nvcc", "--list-gpu-code"]
    known = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    wanted = os.environ.get("QKERNELS_CUDA_ARCHS")
    flags = []
    for arch in (wanted or DEFAULT_ARCHS).replace(",", ";").split(";"):
        number = arch.removesuffix("+PTX")
        if f"sm_{number.rstrip('abcdefghijklmnopqrstuvwxyz')}" not in known:
            if wanted:
                fail(
                    f"QKERNELS_CUDA_ARCHS names {arch!r}, which {listing[0]} does not know; name "
                    f"architectures such as 80;90a, of {', '.join(known)}"
                )
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_library():
    """The extension in a list, which is empty where it is not to be built."""
    asked = os.environ.get("QKERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        fail(f"QKERNELS_CUDA must be 0 (no CUDA kernels), 1 or not set, got {asked!r}")
    toolkit = cuda_toolkit()
    # A torch without CUDA compiles them but cannot load them.
    wanted = asked == "1" or (asked == "" and torch.version.cuda is not None)
    if not wanted or toolkit is None:
        if asked == "1":
            fail(
                "QKERNELS_CUDA=1 asks for CUDA kernels, but nvcc was not found, or no "
                "libcudart_static.a with it; set CUDA_HOME to the folder of a CUDA toolkit"
            )
        return []
    home, runtime = toolkit
    torch_build.CUDA_HOME = home  # None in a torch without CUDA
    # These would let kernels read the host's tables, and get nothing, without a word.
    torch_build.COMMON_NVCC_FLAGS.clear()
    # Kernels share no CUDA runtime with torch, so nvcc may be of another release than its.
    torch_build._check_cuda_version = lambda *_: None
    ours = {path for path in glob("csrc/ops/*.cpp") if "/cpu_" not in path}
    ours -= {"csrc/ops/introspect.cpp", "csrc/ops/schema.cpp"}
    nvcc_args = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
    if Path(".git").exists():
        nvcc_args += ["-Werror=all-warnings"]
    flags = arch_flags(home)
    if any(flag.endswith("code=sm_90a") for flag in flags):
        nvcc_args.append("-DQKERNELS_SM90A")
    arguments = {"cxx": compile_args, "nvcc": [*nvcc_args, *flags]}
    extension = library(
        "qkernels._C_cuda", {*ours, *glob("csrc/cuda/*.cu")}, [("QKERNELS_CUDA", None)], arguments
    )
    extension.library_dirs += [runtime]
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    # libtorch brings libtorch_cuda, where torch has it, and with that the current stream.
    extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]
    return [extension]


with_cuda = cuda_library()
# `explain` asks the CPU's library what a GPU would run.
sm90a = any("-DQKERNELS_SM90A" in each.extra_compile_args["nvcc"] for each in with_cuda)

setuptools.setup(
    ext_modules=[
        library(
            "qkernels._C",
            {path for path in sources if "/cuda_" not in path},
            [("QKERNELS_SM90A", None)] if sm90a else [],
            compile_args,
        ),
        *with_cuda,
    ],
    cmdclass={"build_ext": BuildKernels},
)
