"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest
import torch
from torch import nn

import qkernels as qk

MODULES = (
    "qkernels",
    "qkernels.calibrate",
    "qkernels.calibration.histogram",
    "qkernels.calibration.observers",
    "qkernels.calibration.result",
    "qkernels.codes",
    "qkernels.fold",
    "qkernels.formats",
    "qkernels.functional",
    "qkernels.int8",
    "qkernels.io.file",
    "qkernels.jsonfile",
    "qkernels.io.load",
    "qkernels.io.save",
    "qkernels.mixed.assign",
    "qkernels.mixed.plan",
    "qkernels.mixed.quality",
    "qkernels.mixed.search",
    "qkernels.lowering.model",
    "qkernels.lowering.run",
    "qkernels.nn.embedding",
    "qkernels.nn.linear",
    "qkernels.nn.qat",
    "qkernels.plan",
    "qkernels.qat",
    "qkernels.optimize.search",
    "qkernels.plan",
    "qkernels.ptq.gptq",
    "qkernels.ptq.patches",
    "qkernels.ptq.run",
    "qkernels.ptq.scaling",
    "qkernels.quantize",
    "qkernels.schemes",
    "qkernels.summary",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "qk": qk, "folder": tmp_path}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted
    assert not result.failed
