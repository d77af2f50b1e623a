"""x_premul and k_perm of a QLinear: computed with, kept, moved, saved, folded back, explained."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear

K, N = 70, 33


def transforms(which="both"):
    generator = torch.Generator().manual_seed(7)
    premul = torch.rand(K, generator=generator) + 0.5
    perm = torch.randperm(K, generator=generator)
    return {"premul": (premul, None), "perm": (None, perm), "both": (premul, perm)}[which]


def made(scheme, which="both"):
    """A layer whose weight was made for its transforms, and the float layer it stands for."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = QLinear(K, N, scheme=scheme)
    layer.set_input_transform(*transforms(which))
    layer.set_weight(linear.weight)
    with torch.no_grad():
        layer.bias.copy_(linear.bias)
    return layer, linear


@pytest.fixture
def model(scheme):
    return nn.Sequential(made(scheme)[0], nn.ReLU(), nn.Linear(N, 4))


@pytest.mark.parametrize("which", ["premul", "perm", "both"])
def test_dequantize_folds_them_back(scheme, which, x):
    layer, linear = made(scheme, which)
    back = layer.dequantize()
    tolerance = 0.02 if scheme.activation != "float" else 1e-5
    assert (layer(x) - back(x)).norm() < tolerance * back(x).norm()
    # And it is the layer that was meant: off by the rounding of the weight alone.
    error = (back.weight - linear.weight).norm() / linear.weight.norm()
    assert error < (0.02 if scheme.format == "int8" else 0.2)
    assert back.bias is layer.bias
    assert not list(back.buffers())


def test_absent_ones_are_no_state(scheme):
    layer = QLinear(K, N, scheme=scheme)
    assert layer.x_premul is None
    assert layer.k_perm is None
    assert not {"x_premul", "k_perm"} & set(layer.state_dict())
    assert "premul" not in repr(layer)


def test_state_dict_round_trip(model, scheme, x):
    state = model.state_dict()
    assert torch.equal(state["0.x_premul"], transforms()[0])
    assert torch.equal(state["0.k_perm"], transforms()[1])
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    plain = nn.Sequential(QLinear(K, N, scheme=scheme), nn.ReLU(), nn.Linear(N, 4))
    for other in (plain, copy.deepcopy(plain), model):
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))
    plain[0].x_premul.zero_()
    assert state["0.x_premul"].any()
    meta = copy.deepcopy(plain).to("meta")
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), model(x))


def test_a_state_dict_without_them_is_incomplete(model, scheme):
    state = model.state_dict()
    del state["0.k_perm"]
    before = model[0].packed.clone()
    with pytest.raises(RuntimeError, match="0.k_perm"):
        model.load_state_dict(state)
    state["0.k_perm"] = torch.arange(3)
    with pytest.raises(RuntimeError, match="size mismatch for 0.k_perm"):
        model.load_state_dict(state)
    assert torch.equal(model[0].packed, before)


@pytest.mark.parametrize("start", ["float", "meta", "quantized"])
def test_files(model, scheme, x, start, tmp_path):
    path = tmp_path / "model.safetensors"
    qk.save_model(model, path)
    assert qk.io.read_header(path).modules["0"].input_transforms == ("x_premul", "k_perm")
    other = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 4))
    if start == "meta":
        other = other.to("meta")
    if start == "quantized":
        other = copy.deepcopy(model)
        other[0].x_premul.zero_()
    qk.load_model(other, path)
    assert torch.equal(other(x), model(x))


def test_files_need_a_fitting_model(model, scheme, tmp_path):
    path = tmp_path / "model.safetensors"
    qk.save_model(model, path)
    plain = nn.Sequential(QLinear(K, N, scheme=scheme), nn.ReLU(), nn.Linear(N, 4))
    with pytest.raises(qk.io.ModelFileError, match="with x_premul with k_perm"):
        qk.load_model(plain, path)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(model, x, duplicate):
    other = duplicate(model)
    assert torch.equal(other(x), model(x))
    other[0].x_premul.zero_()
    assert model[0].x_premul.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_leaves_them(model, x, dtype):
    premul = model[0].x_premul.clone()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert torch.equal(model[0].x_premul, premul)
    assert model[0].k_perm.dtype == torch.int64
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    model.type(torch.bfloat16)
    assert model[0].k_perm.dtype == torch.int64


def test_gradients(scheme, x):
    layer, _ = made(scheme)
    back = layer.dequantize()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = torch.randn(5, N)
    layer(a).backward(out)
    back(b).backward(out)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_layers_that_share_a_weight_but_not_the_factors(x):
    """dequantize_ must not tie what no longer is one weight."""
    a, _ = made(qk.W8A16())
    b = QLinear(K, N, scheme=qk.W8A16())
    b.packed = a.packed
    model = nn.ModuleList([a, b])
    expected = [layer.dequantize().weight for layer in model]
    qk.dequantize_(model)
    assert all(torch.equal(m.weight, w) for m, w in zip(model, expected, strict=True))


def test_compiled_and_exported(model, x):
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), expected)


def test_repr_and_explain_say_so(scheme, x):
    layer, _ = made(scheme)
    assert "x_premul, k_perm" in repr(layer)
    text = qk.explain(layer, x)
    assert "multiplied by x_premul" in text
    assert "order of the weight's columns by k_perm" in text


def test_refusals_change_nothing():
    layer, _ = made(qk.W8A8())
    with pytest.raises(ValueError, match=r"x_premul has shape \(3,\); expected \(70,\)"):
        layer.set_input_transform(torch.ones(3), None)
    with pytest.raises(ValueError, match="k_perm is no permutation"):
        layer.set_input_transform(torch.ones(K), torch.zeros(K, dtype=torch.int64))
    assert torch.equal(layer.x_premul, transforms()[0])
    layer.set_input_transform(None, None)
    assert layer.input_transforms == ()
