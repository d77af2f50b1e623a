"""A lowered model as a module: copies, files, compilation, threads."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkernels as qk
from helpers import cnns
from qkernels.io import ModelFileError
from qkernels.nn.int8 import Int8Conv


@pytest.fixture(scope="module")
def made():
    model, shapes = cnns.build("mobilenet_v3")
    return qk.lower(
        model, cnns.batch(shapes), batches=[cnns.batch(shapes, 8, 1)], observer="minmax"
    )


@pytest.fixture(scope="module")
def x():
    return cnns.batch(cnns.IMAGE, 3, 99)[0]


def test_copies(made, x):
    expected = made(x)
    other = copy.deepcopy(made)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.fc.bias.add_(1)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), expected)
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), expected)


def test_types_stay(made, x):
    other = copy.deepcopy(made).bfloat16()
    assert torch.equal(other(x), made(x))


def test_compiled_and_exported(made, x):
    expected = made(x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:2]), expected[:2])
    exported = torch.export.export(made, (x,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),))
    assert torch.equal(exported.module()(x), expected)


def test_layers_that_run_together_are_the_same_as_alone(made, x):
    expected = made(x)
    assert any("run_convolutions" in name for name in made._run.__code__.co_names)
    seen = []
    other = copy.deepcopy(made)
    layers = [m for m in other.modules() if isinstance(m, Int8Conv)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, y: seen.append(layer))
    assert torch.equal(other(x), expected)
    assert len(seen) == len(layers)
    with torch.autocast("cpu"):
        assert torch.equal(other(x), made(x))


def test_an_error_names_the_layer(made, x):
    other = copy.deepcopy(made)
    layer = [m for m in other.modules() if isinstance(m, Int8Conv) and m.joins][1]
    layer.y_scale.fill_(0)
    with pytest.raises(RuntimeError, match=f"'{layer.qualified_name}'.*y_scale must be a positive"):
        other(x)


def test_threads_and_company_do_not_matter(made, x):
    expected = made(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(made(x), expected)
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([made(image[None]) for image in x])
    assert torch.equal(alone, expected)


def test_explain(made, x):
    said = qk.explain(made, x)
    assert "stem.0: Int8Conv 3 → 16, 3×3" in said
    assert "integer arithmetic" in said


# ---- Files ---------------------------------------------------------------------------------------


@pytest.fixture
def file(made, tmp_path):
    qk.save_model(made, tmp_path / "model.safetensors", {"note": "mine"})
    return tmp_path / "model.safetensors"


def test_loaded_without_the_float_model(made, x, file):
    loaded = qk.load_lowered(file)
    assert torch.equal(loaded(x), made(x))
    assert loaded.code == made.code
    assert loaded.state_dict().keys() == made.state_dict().keys()
    header = qk.io.read_header(file)
    assert header.metadata == {"note": "mine"}
    assert header.version == 2


def test_loaded_into_one_that_was_lowered_alike(made, x, file):
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.fc.bias.zero_()
    assert torch.equal(qk.load_model(other, file)(x), made(x))


def test_files_and_models_that_do_not_fit(made, file, tmp_path):
    model, _ = cnns.build("mobilenet_v3")
    with pytest.raises(ModelFileError, match=r"use qk.load_lowered\(path\)"):
        qk.load_model(model, file)
    plain = tmp_path / "plain.safetensors"
    qk.save_model(model, plain)
    assert qk.io.read_header(plain).version == 1
    with pytest.raises(ModelFileError, match="holds no lowered model"):
        qk.load_lowered(plain)
    with pytest.raises(ModelFileError, match="load it into the float model and lower that"):
        qk.load_model(copy.deepcopy(made), plain)
    x = torch.randn(2, 3, 8, 8)
    other = qk.lower(nn.Sequential(nn.Conv2d(3, 4, 3)), x, batches=[x])
    with pytest.raises(ModelFileError, match="lowered in another way"):
        qk.load_model(other, file)


def rewritten(file, change):
    """The file with its graph changed."""
    tensors = load_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        metadata = json.loads(stream.read(length))["__metadata__"]
    document = json.loads(metadata["qkernels"])
    change(document["program"])
    metadata["qkernels"] = json.dumps(document)
    save_file(tensors, file, metadata)


def calls(name):
    def change(program):
        node = next(node for node in program["nodes"] if node["op"] == "call_function")
        node["target"] = name

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda program: program.update(version=2), "graph has version 2"),
        (lambda program: program.pop("nodes"), "cannot be read"),
        (lambda program: program["nodes"][0].update(op="call_method"), "'call_method'"),
        (lambda program: program["nodes"][0].update(name="x; import os"), "x; import os"),
        (lambda program: program["modules"].update({"a b": {}}), "'a b'"),
        (calls("aten.from_file.default"), "from_file"),
        (calls("aten.relu_.default"), "relu_"),
        (calls("os.system"), "os.system"),
        (calls("aten._resize_output_.default"), "_resize_output_"),
    ],
)
def test_graphs_that_are_refused(file, change, message):
    rewritten(file, change)
    with pytest.raises(ModelFileError, match=message):
        qk.load_lowered(file)
