"""The examples in docstrings and in the guide run and print what they say."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("adapter", "files", "groups", "head", "lora", "merge", "parts", "penalties", "strategy")


@pytest.mark.parametrize("name", [*MODULES, "parallel", "unfreeze"])
def test_examples(name, tmp_path):
    torch.manual_seed(0)
    module = importlib.import_module(f"qkernels.transfer.{name}")
    names = {"torch": torch, "nn": nn, "qk": qk, "folder": tmp_path}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted
    assert not result.failed


def test_guide_runs(tmp_path):
    """Its Python blocks, one after the other, as a reader would type them."""
    text = (ROOT / "docs" / "TRANSFER.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
