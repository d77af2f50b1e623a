"""The examples in the docstrings of reports and commands run and print what they say."""

import doctest
import importlib

import pytest
import torch
from torch import nn

import qkernels as qk

MODULES = (
    "qkernels.cli",
    "qkernels.commands",
    "qkernels.doctor",
    "qkernels.explain",
    "qkernels.report.comparison",
    "qkernels.report.files",
    "qkernels.report.machine",
    "qkernels.report.outliers",
    "qkernels.report.outputs",
    "qkernels.report.size",
    "qkernels.selftest",
    "qkernels.timing",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path):
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "qk": qk, "folder": tmp_path}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.attempted
    assert not result.failed
