"""Adapters on convolutions, against torch's float64 convolution with the update in the weight."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.nn import QConv2d
from qkernels.transfer import LoRAConv, LoRALinear, add_lora_, load_adapters, merge_, save_adapters

INT4 = qk.W4A16(group_size=-1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    CONVOLUTIONS = {
        "1d": (nn.Conv1d(6, 5, 3, stride=2, padding=2), (11,)),
        "2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), bias=False), (7, 6)),
        "3d": (nn.Conv3d(2, 3, 2, padding=1, dilation=(1, 2, 1)), (4, 5, 3)),
        "groups": (nn.Conv2d(6, 9, 3, groups=3, dilation=2), (8, 7)),
        "depthwise": (nn.Conv2d(5, 10, 3, padding=1, groups=5), (5, 5)),
        "same": (nn.Conv2d(3, 4, 3, padding="same"), (5, 6)),
        "reflect": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (5, 6)),
    }
KINDS = {nn.Conv1d: qk.nn.QConv1d, nn.Conv2d: qk.nn.QConv2d, nn.Conv3d: qk.nn.QConv3d}
each_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def randomized(model, seed=3):
    """With other than zero updates."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def dense(adapter):
    """The float64 convolution that an adapter and its base stand for."""
    base = adapter.base.dequantize() if hasattr(adapter.base, "packed") else adapter.base
    made = copy.deepcopy(base).double().requires_grad_(True)
    a, b = adapter.lora_a.detach().double(), adapter.lora_b.detach().double()
    with torch.no_grad():
        for row in range(len(b)):
            for r in range(len(a)):
                made.weight[row] += adapter.scaling * b[row, r] * a[r]
    return made


@each_convolution
def test_what_code_may_ask_of_a_convolution(name):
    base = CONVOLUTIONS[name][0]
    layer = LoRAConv(copy.deepcopy(base), rank=2)
    names = (*base.__constants__, "transposed")
    assert [getattr(layer, n) for n in names] == [getattr(base, n) for n in names]
    assert layer.bias is layer.base.bias


@each_convolution
@pytest.mark.parametrize("scheme", [None, qk.W8A16(), INT4, qk.NF4(16)], ids=str)
def test_output_and_gradients_against_dense_float64(name, scheme):
    conv, size = CONVOLUTIONS[name]
    base = copy.deepcopy(conv) if scheme is None else KINDS[type(conv)].from_float(conv, scheme)
    layer = randomized(LoRAConv(base, rank=3, alpha=5, rslora=name == "groups"))
    x = torch.randn(2, conv.in_channels, *size, generator=torch.Generator().manual_seed(1))
    x.requires_grad_(True)
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(grad)

    reference = dense(layer)
    inner = x.detach().double().requires_grad_(True)
    expected = reference(inner)
    expected.backward(grad.double())
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.detach().double(), expected.detach(), **close)
    torch.testing.assert_close(x.grad.double(), inner.grad, **close)
    # The chain rule through W + scaling · B A, rows of B and of dW one for each output channel.
    outer = layer.scaling * reference.weight.grad.flatten(1)
    a, b = layer.lora_a.detach().double(), layer.lora_b.detach().double()
    torch.testing.assert_close(layer.lora_b.grad.double(), outer @ a.flatten(1).T, **close)
    torch.testing.assert_close(layer.lora_a.grad.double().flatten(1), b.T @ outer, **close)
    alone = layer(x[0])  # without a batch
    torch.testing.assert_close(alone, y[0], **close)


@each_convolution
def test_on_int8_activations_the_adapter_adds_its_own_convolution(name):
    conv, size = CONVOLUTIONS[name]
    layer = randomized(LoRAConv(KINDS[type(conv)].from_float(conv, qk.W8A8()), rank=3))
    x = torch.randn(2, conv.in_channels, *size, generator=torch.Generator().manual_seed(1))
    added = layer(x) - layer.base(x)
    silent = copy.deepcopy(layer)
    silent.lora_b.data.zero_()
    expected = dense(layer)(x.double()) - dense(silent)(x.double())
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-4)


@each_convolution
@pytest.mark.parametrize("scheme", [None, qk.W8A8(), INT4], ids=str)
def test_merging_by_formula(name, scheme):
    conv, _ = CONVOLUTIONS[name]
    model = nn.Sequential(copy.deepcopy(conv))
    if scheme is not None:
        qk.quantize_(model, scheme)
    add_lora_(model, rank=2)
    layer = randomized(model)[0]
    wanted = dense(layer).weight.detach()
    update = wanted - (layer.base.dequantize() if scheme else layer.base).weight.double()
    (row,) = merge_(model)
    stored = (model[0].dequantize() if scheme else model[0]).weight.detach().double()
    noise = (stored - wanted).norm()
    assert row.kind == f"{type(model[0]).__name__} {scheme if scheme else 'float32'}"
    assert row.lost == pytest.approx((noise / update.norm()).item(), rel=1e-3, abs=1e-6)
    if scheme is None:
        torch.testing.assert_close(stored, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert row.sqnr_db == pytest.approx(20 * math.log10(wanted.norm() / noise), abs=0.01)
        expected = KINDS[type(conv)].matrix_of(model[0].dequantize())
        fresh = copy.deepcopy(conv)
        fresh.weight.data = wanted.float()
        again = KINDS[type(conv)].from_float(fresh, scheme).float_weight()
        assert (expected - again).norm() < 1e-5 * again.norm()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        y = F.relu(self.depthwise(F.relu(self.stem(x))))
        return self.head(F.relu(self.up(y)).mean((2, 3)))


def net(scheme=INT4, ignore="head"):
    torch.manual_seed(0)
    model = Net()
    if scheme is not None:
        qk.quantize_(model, scheme, ignore=ignore)
    return model


@pytest.fixture
def x():
    return torch.randn(3, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def test_default_targets(x):
    model = net()
    expected = model(x)
    table = add_lora_(model, rank=2, modules_to_save="head")
    assert [type(m) for m in (model.stem, model.depthwise)] == [LoRAConv] * 2
    assert isinstance(model.up, qk.nn.QConvTranspose2d)
    assert type(model.head) is nn.Linear
    assert table.trainable == 2 * (27 + 8) + 2 * (9 + 8) + 25
    assert torch.equal(model(x), expected)
    whole = net(None)
    add_lora_(whole)
    assert [type(m) for m in (whole.stem, whole.head)] == [LoRAConv, LoRALinear]


def test_training_moves_adapters_only(x):
    model = net()
    add_lora_(model, rank=4, modules_to_save="head")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = torch.tensor([4, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_adapters_alone_are_saved_and_loaded(x, tmp_path):
    path = tmp_path / "adapters.safetensors"
    model = net()
    add_lora_(model, rank=2, modules_to_save="head")
    save_adapters(randomized(model), path)
    assert set(load_file(path)) == {
        *(f"{layer}.lora_{c}" for layer in ("stem", "depthwise") for c in "ab"),
        "head.weight",
        "head.bias",
    }
    fresh = load_adapters(net(), path)
    assert torch.equal(fresh(x), model(x))
    other = load_adapters(net(qk.W8A16()), path)  # on another base
    assert torch.equal(other.stem.lora_a, model.stem.lora_a)
    with pytest.raises(qk.io.ModelFileError, match="stem: it is a Identity"):
        broken = net()
        broken.stem = nn.Identity()
        load_adapters(broken, path)


def test_the_life_of_a_model(x, tmp_path):
    model = net()
    add_lora_(model, rank=2, dropout=0.2)
    randomized(model).eval()
    expected = model(x)
    qk.save_model(model, tmp_path / "all.safetensors")
    other = net(None)
    add_lora_(other, rank=2, dropout=0.2, targets=["stem", "depthwise"])
    qk.load_model(other.eval(), tmp_path / "all.safetensors")
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin(x), expected)
    model.train()
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(11)
        model.zero_grad()
        run(x).square().sum().backward()
        found.append(model.stem.lora_a.grad.clone())
    assert torch.equal(*found)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.eval()(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    qk.transfer.remove_(model)
    assert isinstance(model.stem, QConv2d)


def test_refusals(x):
    model = net()
    with pytest.raises(ValueError, match="up: it is a QConvTranspose2d; adapters go on nn.Linear"):
        add_lora_(model, targets="up")
    with pytest.raises(TypeError, match="LoRAConv: base is ConvTranspose2d"):
        LoRAConv(nn.ConvTranspose2d(4, 4, 2))
    with pytest.raises(ValueError, match="itself a LoRAConv"):
        merge_(LoRAConv(nn.Conv2d(4, 4, 2)))
