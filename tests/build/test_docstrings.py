"""The examples in docstrings run and print what they say, all of them."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk

PACKAGE = Path(qk.__file__).parent


def has_examples(path):
    lines = path.read_text().splitlines()
    return any(">>> " in line and "+SKIP" not in line for line in lines)


MODULES = sorted(
    ".".join(("qkernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in PACKAGE.rglob("*.py")
    if has_examples(path)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "qk": qk, "folder": tmp_path}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted
    assert not result.failed
