"""Modules that move between devices: their weight is packed for the device that it is on."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels as qk
from qkernels import _cuda
from qkernels.nn import QEmbedding, QLinear
from qkernels.schemes import Scheme

SCHEMES = [
    qk.W8A8(),
    qk.W8A8(group_size=24, activation="asymmetric"),
    qk.W8A16(),
    qk.W4A16(group_size=16),
    qk.W4A16(group_size=16, symmetric=True),
    qk.W4A8(group_size=32),
    qk.NF4(group_size=16),
]


def quantized(scheme, model=None):
    model = float_model() if model is None else model
    qk.quantize_(model, scheme)
    return model


def float_model():
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 48), nn.Linear(48, 5))
    return model.eval()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_layout_is_that_of_the_device(scheme):
    for device, family in (("cpu", "cpu"), ("meta", "cpu"), ("cuda", "cuda")):
        said = qk._C.describe_layout(scheme.layout_on(device))
        assert said["device"] == family
        assert said["format"] == scheme.format
        assert said["symmetric"] == scheme.symmetric
    assert scheme.layout == scheme.layout_on("cpu") != scheme.layout_on("cuda")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_move_changes_layout_and_shape(monkeypatch, scheme):
    """With the meta device in the place of a GPU: as far as one gets without."""
    real = Scheme.layout_on
    monkeypatch.setattr(
        Scheme, "layout_on", lambda self, d: real(self, "cuda" if d == "meta" else d)
    )
    for module in (QLinear(40, 20, scheme=scheme), QEmbedding(30, 40, scheme=scheme)):
        on_cpu = module.packed.shape
        assert module.to("meta") is module
        assert module.layout == real(scheme, "cuda") != scheme.layout
        row = qk._C.block_bytes(module.layout, 40, scheme.group_size)
        assert module.packed.shape == (2, row)
        assert not module.packed.requires_grad
        module.half().to_empty(device="cpu")
        assert module.packed.shape == on_cpu
        assert module.layout == scheme.layout
        assert module.dtype == torch.float16


def test_a_move_that_is_none_keeps_the_bytes():
    module = QLinear(40, 20)
    packed = module.packed
    assert module.cpu().half().packed is packed


@pytest.mark.skipif(_cuda.why_not("linear") == "", reason="CUDA kernels are there")
def test_without_kernels_nothing_moves():
    module = QLinear(8, 4)
    module.qualified_name = "head"
    sentence = "QLinear 'head': qkernels has no CUDA kernels for it here: .* keep it on the CPU, or"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=sentence):
        module.to_empty(device="cuda")
    assert module.packed.device.type == module.bias.device.type == "cpu"
    with pytest.raises(RuntimeError, match="no kernels for device 'xpu'"):
        module._check_device(torch.device("xpu"))


def test_a_lowered_model_says_what_is_missing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    lowered = qk.lower(model, x, batches=[x])
    if _cuda.why_not("conv", "quantize_with", "dequantize") == "" and torch.cuda.is_available():
        pytest.skip("every kernel is there")
    before = lowered(x)
    sentence = "LoweredModel: qkernels has no CUDA kernels for it"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=sentence):
        lowered.to_empty(device="cuda")
    assert torch.equal(lowered(x), before)


def test_why_not(monkeypatch):
    monkeypatch.setattr(_cuda, "PROBLEM", "")
    has = {("qkernels::pack", "CUDA")}
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: (op, key) in has
    )
    assert _cuda.why_not("pack") == ""
    assert _cuda.why_not("pack", "conv", "add") == "there is none for conv, add in this version"
    monkeypatch.setattr(_cuda, "PROBLEM", "no nvcc was found")
    assert _cuda.why_not("pack") == "no nvcc was found"


# ---- On a GPU ------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(_cuda.PROBLEM), reason="no GPU, or no kernels for one"
)
INDICES = torch.arange(50).view(5, 10)


@on_gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_on_a_device_there_and_back(scheme):
    model = quantized(scheme)
    packed = [m.packed.clone() for m in model]
    expected = model(INDICES)
    saved = {key: t.clone() for key, t in model.state_dict().items()}
    model.cuda()
    assert all(m.packed.is_cuda and m.layout == scheme.layout_on("cuda") for m in model)
    got = model(INDICES.cuda()).cpu()
    assert (got - expected).norm() <= 0.02 * expected.norm()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), saved[key])
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(INDICES.cuda()).cpu(), got)
    assert torch.equal(copy.deepcopy(model)(INDICES.cuda()).cpu(), got)
    assert "by cuda" in qk.explain(model, INDICES.cuda())
    assert "kernel=cuda" in repr(model)
    other = quantized(scheme)
    other.load_state_dict(model.state_dict())  # from a GPU's checkpoint
    assert torch.equal(other(INDICES), expected)
    assign = quantized(scheme)
    assign.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(assign(INDICES.cuda()).cpu(), got)
    model.cpu()
    assert all(torch.equal(m.packed, p) for m, p in zip(model, packed, strict=True))
    assert torch.equal(model(INDICES), expected)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device_many_rows(dtype):
    """Both sides of the threshold, and captured in a graph."""
    layer = QLinear(64, 48, scheme=qk.W4A16(group_size=16))
    x = torch.randn(300, 64, dtype=dtype)
    expected = layer(x)
    layer.cuda()
    with torch.no_grad():
        for there in (x[:20].cuda(), x.cuda()):
            layer(there)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(there)
            graph.replay()
            close = y.cpu().float() - expected[: len(y)].float()
            assert close.norm() <= 0.02 * expected[: len(y)].float().norm()
    there = x.cuda().requires_grad_()
    layer(there).sum().backward()
    assert there.grad.isfinite().all()


CONVOLUTIONS = [*SCHEMES[2:5], SCHEMES[6], qk.W8A8(), qk.W8A8(activation="asymmetric")]


@on_gpu
@pytest.mark.parametrize("scheme", CONVOLUTIONS, ids=str)
def test_on_a_device_convolutions(scheme):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2)
    ).eval()
    qk.quantize_(model, scheme)
    x = torch.randn(2, 3, 9, 8)
    expected = model(x)
    model.cuda()
    for there in (x.cuda(), x.cuda().contiguous(memory_format=torch.channels_last)):
        got = model(there).cpu()
        assert (got - expected).norm() <= 0.02 * expected.norm()
    there = x.cuda().requires_grad_()
    model(there).sum().backward()
    assert there.grad.isfinite().all()
    assert torch.equal(model.cpu()(x), expected)


@on_gpu
def test_on_a_device_a_lowered_model():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Flatten()
    ).eval()
    x = torch.randn(4, 3, 14, 14)
    lowered = qk.lower(model, x, batches=[x])
    expected = lowered(x)
    assert torch.equal(lowered.cuda()(x.cuda()).cpu(), expected)


@on_gpu
def test_on_a_device_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 40), "head": nn.Linear(40, 50, bias=False)})
    model.head.weight = model.embed.weight
    qk.quantize_(model, qk.W8A16())
    assert model.head.packed is model.embed.packed
    model.cuda()
    assert model.head.packed is model.embed.packed
    y = model.head(model.embed(INDICES.cuda()))
    assert y.isfinite().all()
    assert model.cpu().head.packed is model.embed.packed


@on_gpu
def test_on_a_device_files_load_on_the_other(tmp_path):
    model = quantized(qk.W4A16(group_size=16))
    expected = model(INDICES)
    qk.save_model(model.cuda(), tmp_path / "gpu.safetensors")
    loaded = float_model()
    qk.load_model(loaded, tmp_path / "gpu.safetensors")
    assert torch.equal(loaded(INDICES), expected)
    there = float_model().cuda()
    qk.load_model(there, tmp_path / "gpu.safetensors")
    assert torch.equal(there(INDICES.cuda()), model(INDICES.cuda()))


@on_gpu
def test_on_a_device_quantized_there_is_quantized_here():
    source = float_model()
    here = quantized(qk.W8A8(), copy.deepcopy(source))
    there = quantized(qk.W8A8(), copy.deepcopy(source).cuda())
    for key, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), here.state_dict()[key])
    with torch.autocast("cuda", torch.bfloat16):
        assert there[1](torch.randn(3, 40, device="cuda")).dtype == torch.bfloat16
    x = torch.randn(3, 40, device="cuda", requires_grad=True)
    there[1](x).sum().backward()
    assert x.grad.isfinite().all()
    stream = io.BytesIO()
    torch.save(there.state_dict(), stream)


@on_gpu
def test_on_a_device_calls_are_captured_in_graphs():
    layer = quantized(qk.W4A16(group_size=16)).cuda()[1]
    x = torch.randn(4, 40, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(4, 40))
        graph.replay()
        assert torch.equal(y, layer(x))
