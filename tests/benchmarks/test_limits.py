"""The machine's limits: measured, named, and not needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qkernels import _C
from qkernels.bench import limits
from qkernels.bench.limits import PEAKS, Machine, NoCompilerError


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(2)


def test_rates_are_of_this_world(machine: Machine) -> None:
    """Between a very slow and an impossible machine: an error of unit would be outside."""
    assert 1e8 < machine.read() < 1e13
    assert 1e8 < machine.write() < 1e13
    assert 1e8 < machine.copy() < 1e13
    for arithmetic in ("int8", "int4", "bf16", "fp32"):
        peak = machine.peak_for(arithmetic)
        if peak is not None:
            assert 1e8 < machine.peak(peak, 1) < 1e14


def test_a_survey_covers_one_and_all_threads(machine: Machine, monkeypatch) -> None:
    monkeypatch.setattr(machine, "peak", lambda name, threads, seconds: 1.0)
    monkeypatch.setattr(machine, "read", lambda threads: 2.0)
    monkeypatch.setattr(machine, "write", lambda threads: 4.0)
    monkeypatch.setattr(machine, "copy", lambda threads: 3.0)
    found = {(limit.name, limit.threads): limit.rate for limit in machine.survey()}
    assert found["read", 1] == found["read", 2] == 2.0
    assert {name for name, _ in found} <= PEAKS.keys() | {"read", "write", "copy"}


def test_the_best_instruction_is_within_the_isa(machine: Machine) -> None:
    for arithmetic in ("int8", "int4", "bf16", "fp32"):
        peak = machine.peak_for(arithmetic)
        if peak is not None and not _C.isa().startswith("avx512"):
            assert not peak.endswith("512")


def test_every_peak_has_a_name_for_people(machine: Machine) -> None:
    assert machine._peaks.keys() <= PEAKS.keys()


def test_the_loops_stay_in_registers(machine: Machine) -> None:
    """An accumulator that goes through memory halves the rate, and so every limit."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("there is no objdump on this machine")
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", machine._helper._name],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    loops = re.findall(r"<\S*(?:fma|madd|vnni|bf16)\S*>:\n(.*?)\bret\b", code, re.DOTALL)
    assert len(loops) >= len(PEAKS)
    assert not [line for loop in loops for line in loop.splitlines() if "(%rsp" in line]


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoCompilerError, match=r"C\+\+ compiler; install g\+\+"):
        Machine(1)


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "limits.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(limits, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NoCompilerError, match="could not compile"):
        Machine(1)
    assert not list((tmp_path / "qkernels").iterdir())
