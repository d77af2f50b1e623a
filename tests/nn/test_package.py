"""The package itself: what import gives, how fast, and what it says when it cannot work."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import qkernels as qk
from qkernels import _C

ROOT = Path(__file__).parents[2]


def run(code, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(cwd or ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd
    )


def test_every_public_name_exists():
    for name in qk.__all__:
        assert getattr(qk, name) is not None
    assert set(qk.__all__) <= set(dir(qk))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qk.quantise


def test_version():
    try:
        expected = version("qkernels")
    except PackageNotFoundError:
        expected = _C.build_info()["version"]
    assert qk.__version__ == expected


def test_import_in_a_fresh_process():
    """Without optional packages, without loading what only some need, and without name clashes."""
    code = """
import sys
import torch
before = set(sys.modules)
for name in ("matplotlib", "transformers", "sklearn"):
    sys.modules[name] = None
import qkernels as qk
loaded = {m.partition(".")[0] for m in set(sys.modules) - before if sys.modules[m]}
assert not loaded & {"rich", "matplotlib", "transformers", "sklearn", "scipy"}, loaded
import qkernels.doctor, qkernels.explain, qkernels.quantize, qkernels.report
assert all(callable(f) for f in (qk.doctor, qk.explain, qk.quantize, qk.compare))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_library_that_does_not_load_is_one_sentence_and_doctor_runs(tmp_path):
    package = tmp_path / "qkernels"
    shutil.copytree(ROOT / "qkernels", package, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    (package / "_C.abi3.so").write_bytes(b"not a library")
    result = run("import qkernels; qkernels.quantize_", cwd=tmp_path)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: qkernels' compiled library")
    assert "torch >= 2.10" in message
    assert "pip install" in message
    result = run("from qkernels.cli import main; raise SystemExit(main(['doctor']))", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "does not load" in result.stdout


def test_torch_missing_is_one_sentence():
    result = run("import sys; sys.modules['torch'] = None; import qkernels")
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: qkernels needs torch >= 2.10")
