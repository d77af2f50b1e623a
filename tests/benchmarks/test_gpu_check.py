"""scripts/gpu_check.sh with programs in the place of those that need a GPU, and its report."""

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"
GROUPED = ROOT / "tests/cuda/test_linear_int8_grouped.py"

# Stands for an interpreter that sees a GPU: says which one, runs the report, and as pytest and as
# the benchmark prints what they print.
PYTHON = """#!/bin/bash
case "$1" in
-) cat >/dev/null; echo "$ARCH" ;;
scripts/*) exec "$REAL" "$@" ;;
*) echo "$OMP_NUM_THREADS $*" >>"$CALLS"
   if [[ "$*" == *tests/cuda/test_pack.py* ]]; then
     printf '%s\\n' 'E   AssertionError: 3 is not 4' 'FAILED tests/cuda/test_pack.py::test_bytes' \\
       '1 failed, 18 passed in 6.73s'
     exit 1
   fi
   echo '97 passed, 97 deselected in 55.97s' ;;
esac
"""
SANITIZER = """#!/bin/bash
while [[ "$1" == --* ]]; do tool="$tool $1 $2"; shift; [[ "$1" == --* ]] || shift; done
"$@"
if [[ "$tool $*" == *racecheck*tests/cuda/test_linear_int8_grouped.py\\ -k* ]]; then
  echo '========= Error: Potential WAR hazard detected at __shared__ 0x10 in block (0,0,0) :'
  echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'
  exit 9
fi
echo '========= ERROR SUMMARY: 0 errors'
"""


def run(folder, arch="90a", **environment):
    """The script's result, the calls of its interpreter, and check.json."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
        "REAL": sys.executable, "ARCH": arch, "CALLS": str(folder / "calls"), **environment,
    }  # fmt: skip
    done = subprocess.run(
        [SCRIPT, "--built", folder / "out"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    calls = (folder / "calls").read_text().splitlines()
    return done, calls, json.loads((folder / "out/check.json").read_text())


def test_every_step_is_run_and_what_failed_is_named(tmp_path):
    done, calls, found = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    steps = {step["step"]: step for step in found["steps"]}
    # Files of tests that run on each target.
    files = {
        path.stem
        for path in (ROOT / "tests/cuda").glob("test_*.py")
        if "ops: Any" in path.read_text() and path != GROUPED
    }
    assert {name for name in steps if name.startswith("test_")} == {"test_devices", *files}
    kinds = ("memcheck", "racecheck", "synccheck")
    assert {"bench", "memcheck_warpgroups", "memcheck_matmul", *kinds} <= set(steps)
    assert {f"grouped_wgmma_{kind}" for kind in ("tests", *kinds)} <= set(steps)
    bad = {name for name, step in steps.items() if step["status"] != 0}
    assert bad == {"test_pack", "grouped_wgmma_racecheck"}
    assert steps["test_pack"]["faults"][0] == "FAILED tests/cuda/test_pack.py::test_bytes"
    for line in (
        "test_pack failed (1)",
        "  E   AssertionError: 3 is not 4",
        "grouped_wgmma_racecheck failed (9, the sanitizer found something)",
        "  ========= Error: Potential WAR hazard",
        "has to be asked for still; grouped_wgmma_racecheck failed",
    ):
        assert line in done.stdout
    text = (tmp_path / "out/check.md").read_text()
    assert "| test_pack | failed (1) | " in text
    assert "| 1 failed, 18 passed in 6.73s |" in text
    assert "## grouped_wgmma_racecheck\n\n```text\n========= Error: Potential WAR hazard" in text
    assert not (tmp_path / "out/steps.tsv").exists()
    # The kernel that has to be asked for is in no step but its own.
    grouped = GROUPED.relative_to(ROOT)
    assert sum(f" {grouped} -k device and not emulator" in call for call in calls) == 4
    assert sum(f" tests/cuda --ignore={grouped} " in call for call in calls) == 4


def test_a_kernel_that_has_to_be_asked_for_fails_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    report = importlib.import_module("gpu_check_report")
    names = [f"grouped_wgmma_{kind}" for kind in ("tests", "memcheck", "racecheck", "synccheck")]
    told = []
    for failing, log in (
        (0, "12 passed in 3.10s"),
        (1, "12 passed in 3.10s"),
        (0, "12 passed, 2 skipped in 3.10s"),
        (0, "12 skipped in 0.10s"),
    ):
        lines = ["bench\t0\t5"]
        (tmp_path / "bench.log").write_text("copy: 3 us\n")
        for name in names:
            (tmp_path / f"{name}.log").write_text(log + "\n")
            lines.append(f"{name}\t{failing if name == names[2] else 0}\t5")
        (tmp_path / "steps.tsv").write_text("\n".join(lines) + "\n")
        assert report.main([str(tmp_path)]) == 0
        told.append(json.loads((tmp_path / "check.json").read_text())["verdict"].split(": ")[1])
    assert told == [
        "cleared; it may become the default",
        "has to be asked for still; grouped_wgmma_racecheck failed (1)",
        "has to be asked for still; " + "; ".join(f"{name} left tests out" for name in names),
        "has to be asked for still; " + "; ".join(f"{name} left tests out" for name in names),
    ]


def test_other_gpus_are_not_asked_about_hoppers_kernel(tmp_path):
    done, _, found = run(tmp_path, arch="80")
    assert not any("grouped" in step["step"] for step in found["steps"])
    assert "a GPU of sm_90a is needed" in done.stdout


def test_the_tests_that_it_names_are_there():
    """A step whose tests have another name would run none of them."""
    texts = {path: path.read_text() for path in (ROOT / "tests/cuda").glob("test_*.py")}
    names = set(re.findall(r"\btest_[a-z_]+\b(?![\w.*])", SCRIPT.read_text()))
    assert {"test_shapes", "test_groups", "test_products"} <= names
    assert not [name for name in names if not any(f"def {name}" in t for t in texts.values())]
    # No other file lets the kernel run that has to be asked for.
    assert [path for path, text in texts.items() if "QKERNELS_GROUPED_WGMMA" in text] == [GROUPED]


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_the_check_says_that_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert f"there is no GPU to check on: torch {torch.__version__}" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_the_check_wants_a_folder():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected one argument" in done.stderr


def test_scripts_are_clean():
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
