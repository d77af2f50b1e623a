"""fuse_: what is fused, that outputs stay, what is left and why, files, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.io import ModelFileError
from qkernels.nn import QLinear
from qkernels.nn.fused import FusedActivation

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
LAYERS = {
    "linear": (lambda: nn.Linear(40, 33), (5, 40)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding_mode="reflect", padding=1), (2, 6, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2), (1, 3, 3, 4, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 4, 5)),
}
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))


def quantized(*layers, scheme=None):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    qk.quantize_(model, scheme or qk.W8A8(), ignore=())
    return model


def mlp(scheme=None):
    return quantized(nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 8), nn.Tanh(), scheme=scheme)


def fused_names(summary):
    return {row.name: row.became for row in summary.converted}


def reasons(summary):
    return {row.name: row.note for row in summary.left}


@pytest.mark.parametrize("scheme", [qk.W8A8(), qk.W8A16()], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_stay(kind, name, scheme):
    make, shape = LAYERS[kind]
    model = quantized(make(), ACTIVATIONS[name](), scheme=scheme)
    x = torch.randn(shape)
    expected, keys = model(x), list(model.state_dict())
    summary = qk.fuse_(model)
    assert fused_names(summary) == {"1": "Identity, fused into 0"}
    assert isinstance(model[1], nn.Identity)
    assert model[0].epilogue == name
    assert f"epilogue={name}" in repr(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_gradients_stay():
    model = mlp().train()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).sum().backward()
    bias = model[0].bias.grad.clone()
    model.zero_grad()
    qk.fuse_(model)
    model(y).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(model[0].bias.grad, bias)


def test_bfloat16_rounds_once():
    """Rounded after the function, not before it as well."""
    model = mlp().bfloat16()
    exact = F.gelu(model[0](X.bfloat16().float()).double())
    qk.fuse_(model)
    with torch.no_grad():
        got = model[:2](X.bfloat16())
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


class Parent(nn.Module):
    """A layer and an activation, used in many ways."""

    def __init__(self, use):
        super().__init__()
        self.lin, self.act, self.other = nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def untraceable(self, x):
    return self.act(self.lin(x)) if x.sum() < 1e9 else x


def read_in_training(self, x):
    y = self.lin(x)
    return self.act(y) + y.mean() if self.training else self.act(y)


LEFT = {
    "read twice": (lambda s, x: s.act(y := s.lin(x)) + y, "used elsewhere"),
    "activation twice": (lambda s, x: s.act(s.other(s.act(s.lin(x)))), "runs 2 times"),
    "layer twice": (lambda s, x: s.act(s.lin(s.lin(x))), "runs more than once"),
    "something between": (lambda s, x: s.act(s.lin(x) + 1), "not come straight from a layer"),
    "not called": (lambda s, x: s.lin(x), "no code that can be traced calls it"),
    "before the layer": (lambda s, x: s.lin(s.act(x)), "not come straight from a layer"),
    "in training only": (read_in_training, "used elsewhere"),
    "untraceable": (untraceable, "no code that can be traced"),
}


@pytest.mark.parametrize("way", LEFT)
def test_what_is_left(way):
    use, why = LEFT[way]
    model = nn.Sequential(Parent(use)).eval()
    qk.quantize_(model, qk.W8A8())
    expected = model(X)
    summary = qk.fuse_(model)
    assert why in reasons(summary)["0.act"]
    assert model[0].lin.epilogue == model[0].other.epilogue == "none"
    assert type(model[0].act) is nn.ReLU
    assert not model.training
    assert torch.equal(model(X), expected)


def test_parts_of_what_cannot_be_traced():
    model = nn.Sequential(Parent(untraceable), nn.Sequential(nn.Linear(40, 8), nn.SiLU())).eval()
    qk.quantize_(model, qk.W8A8())
    assert fused_names(qk.fuse_(model)) == {"1.1": "Identity, fused into 1.0"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m[0].register_forward_hook(lambda *_: None), "0 has hooks"),
        (lambda m: m[1].register_forward_pre_hook(lambda *_: None), "1 has hooks"),
        (lambda m: setattr(m[1], "forward", lambda x: x), "1 is compiled, or has a forward"),
        (lambda m: m.add_module("again", m[1]), "runs 2 times"),
        (lambda m: m.add_module("again", m[0]), "runs more than once"),
        (lambda m: m.__setitem__(0, nn.Linear(40, 33)), "a Linear, which is not quantized"),
        (lambda m: m.__setitem__(1, type("Mine", (nn.GELU,), {})()), None),
        (lambda m: setattr(m[0], "epilogue", "relu"), "computes relu already"),
    ],
)
def test_layers_and_activations_that_are_not_plain(change, why):
    model = mlp()
    change(model)
    summary = qk.fuse_(model)
    assert not summary.converted
    assert why is None or why in reasons(summary)["1"]


def test_names_that_share_a_module():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(40, 8), nn.ReLU())
            self.alias = self.a[0]

        def forward(self, x):
            return self.a(x)

    model = Two().eval()
    qk.quantize_(model, qk.W8A8())
    assert "a.0 has several names: a.0, alias" in reasons(qk.fuse_(model))["a.1"]


def test_ignore_and_bad_arguments():
    model = mlp()
    assert reasons(qk.fuse_(model, ignore="0"))["1"] == "ignored by '0'"
    with pytest.raises(ValueError, match="'nothing', which matches no module"):
        qk.fuse_(model, ignore=["nothing"])
    with pytest.raises(TypeError, match="model is str"):
        qk.fuse_("model")
    with pytest.raises(ValueError, match="no quantized layer; call quantize_ first"):
        qk.fuse_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    summary = qk.fuse_(model)
    assert reasons(summary)["3"] == "no kernel computes Tanh"
    assert "fused into 0" in str(summary)
    assert fused_names(qk.fuse_(model)) == {}


def test_the_way_back():
    model = mlp()
    expected, activation = model(X), model[1]
    qk.fuse_(model)
    model.train()
    with pytest.raises(ValueError, match=r"gelu, is fused.*unfuse_"):
        model[0].dequantize()
    assert fused_names(qk.unfuse_(model)) == {"1": "GELU"}
    assert model[1] is activation
    assert activation.training
    assert torch.equal(model(X), expected)
    assert not qk.unfuse_(model).rows


def test_dequantize_puts_activations_back():
    model = mlp()
    qk.fuse_(model)
    near = model(X)
    qk.dequantize_(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear, nn.Tanh]
    torch.testing.assert_close(model(X), near, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(way):
    model = mlp()
    qk.fuse_(model)
    with torch.no_grad():
        expected = model(X)
        other = way(model)
        assert torch.equal(other(X), expected)
        assert other[1].layer is other[0]
        qk.unfuse_(other)
        assert model[0].epilogue == "gelu"
        assert torch.equal(model(X), expected)


def test_files(tmp_path):
    path = tmp_path / "model.safetensors"
    model = mlp()
    qk.save_model(model, tmp_path / "plain.safetensors")
    qk.fuse_(model)
    with torch.no_grad():
        expected = model(X)
    qk.save_model(model, path)
    header = qk.io.read_header(path)
    assert header.version == 3
    assert header.fused == {"1": "0"}
    assert header.modules["0"].epilogue == "gelu"
    assert qk.io.read_header(tmp_path / "plain.safetensors").version == 1

    def floats():
        return nn.Sequential(nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 8), nn.Tanh()).eval()

    for other in (floats(), mlp(), copy.deepcopy(model)):
        qk.load_model(other, path)
        assert isinstance(other[1], FusedActivation)
        assert other[1].layer is other[0]
        with torch.no_grad():
            assert torch.equal(other(X), expected)
        qk.unfuse_(other)
        assert type(other[1]) is nn.GELU
    with pytest.raises(ModelFileError, match=r"epilogue|gelu"):
        qk.load_model(copy.deepcopy(model), tmp_path / "plain.safetensors")
    for wrong in (nn.ReLU(), nn.GELU("tanh"), nn.Identity()):
        other = floats()
        other[1] = wrong
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ModelFileError, match=r"activation 1 \(gelu\) fused into 0"):
            qk.load_model(other, path)
        assert type(other[0]) is nn.Linear
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_explain_and_compare():
    reference = nn.Sequential(nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 8)).eval()
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A8())
    plain = qk.compare(model, reference, [X], latency=False)
    qk.fuse_(model)
    assert "computes the activation function that was behind it, gelu" in qk.explain(model[0], X)
    assert " with gelu, " in qk.explain(model, X)
    fused = qk.compare(model, reference, [X], latency=False)
    assert fused.cosine_mean == pytest.approx(plain.cosine_mean, abs=1e-5)
    for a, b in zip(plain.layers, fused.layers, strict=True):
        assert b.own_sqnr_db == pytest.approx(a.own_sqnr_db, abs=3)
        assert b.share == pytest.approx(a.share, rel=0.01)


def test_what_works_before_the_activation_refuses():
    model = mlp()
    qk.fuse_(model)
    with pytest.raises(ValueError, match="unfuse_"):
        qk.transfer.LoRALinear(model[0])
    with pytest.raises(ValueError, match="unfuse_"):
        qk.transfer.add_lora_(model, targets="0")
    with pytest.raises(ValueError, match="unfuse_"):
        qk.transfer.replace_head_(model, 3, "0")
    qk.unfuse_(model)
    qk.transfer.add_lora_(model, targets="0")
    assert "not come straight from a layer" in reasons(qk.fuse_(model))["1"]


def test_compiled():
    model = mlp()
    qk.fuse_(model)
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)


def transformer(kind):
    config = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 96, "vocab_size": 100}
    torch.manual_seed(0)
    if kind == "llama":
        sizes["num_key_value_heads"] = 2
        return config.LlamaForCausalLM(config.LlamaConfig(**sizes))
    act = kind.removeprefix("bert ")
    return config.BertModel(config.BertConfig(**sizes, hidden_act=act), add_pooling_layer=False)


@pytest.mark.parametrize(
    ("kind", "name", "layer"),
    [
        ("bert gelu", "gelu", "encoder.layer.1.intermediate.dense"),
        ("bert gelu_new", "gelu_tanh", "encoder.layer.1.intermediate.dense"),
        ("bert gelu_fast", "gelu_tanh", "encoder.layer.1.intermediate.dense"),
        ("bert gelu_pytorch_tanh", "gelu_tanh", "encoder.layer.1.intermediate.dense"),
        ("bert relu", "relu", "encoder.layer.1.intermediate.dense"),
        ("bert quick_gelu", None, "encoder.layer.1.intermediate.dense"),
        ("llama", "silu", "model.layers.1.mlp.gate_proj"),
    ],
)
def test_transformers(kind, name, layer):
    model = transformer(kind).eval()
    qk.quantize_(model, qk.W8A8(), ignore=())
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        expected = model(ids)[0]
        summary = qk.fuse_(model)
        got = model(ids)[0]
    assert len(summary.converted) == (2 if name else 0), str(summary)
    assert model.get_submodule(layer).epilogue == (name or "none")
    assert isinstance(model.get_submodule(layer), QLinear)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)
