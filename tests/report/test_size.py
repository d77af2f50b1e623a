"""Bytes of a model: every storage once."""

import copy
import warnings

import torch
from torch import nn

import qkernels as qk
from qkernels.report.size import bytes_under, model_bytes, module_bytes


def test_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert module_bytes(model) == {"": 0, "0": 60, "1": 4 * 3 * 4 + 8}
    assert bytes_under(module_bytes(model), "0") == 60


def test_tied_weights_and_views_count_once():
    model = nn.Module()
    model.embedding = nn.Embedding(10, 4)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embedding.weight
    model.register_buffer("view", model.embedding.weight.detach()[2:])
    assert model_bytes(model) == 160


def test_models_on_the_meta_device_have_a_size():
    with torch.device("meta"):
        assert model_bytes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == 2 * 80


def test_quantized_weights_are_counted_as_packed():
    layer = qk.nn.QLinear(64, 32, bias=False)
    assert model_bytes(layer) == layer.packed.nbytes
    assert model_bytes(copy.deepcopy(layer)) == layer.packed.nbytes


def test_weights_that_torch_keeps_in_script_objects():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(nn.Sequential(nn.Linear(32, 8)), {nn.Linear}, dtype=torch.qint8)
        assert model_bytes(model) == 32 * 8 + 8 * 4
