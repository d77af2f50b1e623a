"""The quantized convolutions: torch's arguments, results, states and lives."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk

MODULES = {
    "1d": (lambda: nn.Conv1d(6, 20, 5, stride=2, padding=2), (2, 6, 30)),
    "2d": (lambda: nn.Conv2d(3, 33, 3, padding=1), (2, 3, 9, 8)),
    "2d no bias": (lambda: nn.Conv2d(8, 8, (3, 1), dilation=2, bias=False), (1, 8, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 9, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 9, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 9, 8)),
    "replicate": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 9)),
    "circular": (lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular"), (1, 4, 4, 5, 6)),
    "groups": (lambda: nn.Conv2d(12, 24, 3, groups=4), (2, 12, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(20, 20, 3, padding=1, groups=20), (2, 20, 9, 8)),
    "3d": (lambda: nn.Conv3d(2, 5, (1, 2, 3)), (2, 2, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 9)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=1, output_padding=1, groups=2),
        (2, 6, 5, 4),
    ),
}
CASES = pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
SCHEMES = [
    qk.W8A8(),
    qk.W8A8(activation="asymmetric"),
    qk.W8A16(),
    qk.W4A16(group_size=16),
    qk.NF4(group_size=8),
]


def quantized(conv: nn.Module, scheme: qk.Scheme) -> qk.nn.QModule:
    return getattr(qk.nn, f"Q{type(conv).__name__}").from_float(conv, scheme)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@CASES
def test_it_computes_what_its_float_layer_does(make, shape, scheme):
    torch.manual_seed(0)
    conv, x = make(), torch.randn(shape)
    layer = quantized(conv, scheme)
    back = layer.dequantize()
    assert type(back) is type(conv)
    assert str(back) == str(conv)
    assert back.bias is conv.bias
    assert error(back.weight, conv.weight) < (0.01 if scheme.format == "int8" else 0.15)
    y = layer(x)
    assert error(y, back(x)) < (0.02 if scheme.activation != "float" else 1e-5)
    last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    assert torch.equal(layer(last), y)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.double()).dtype == torch.float64


@CASES
def test_the_constructor_is_torchs(make, shape):
    conv = make()
    names = "in_channels out_channels kernel_size stride padding dilation groups".split()
    given = {name: getattr(conv, name) for name in names}
    given |= {"padding_mode": conv.padding_mode, "bias": conv.bias is not None}
    if conv.transposed:
        given["output_padding"] = conv.output_padding
    layer = getattr(qk.nn, f"Q{type(conv).__name__}")(**given, scheme=qk.W8A8())
    assert str(layer.dequantize()) == str(conv)
    assert layer(torch.randn(shape)).shape == conv(torch.randn(shape)).shape


@CASES
def test_copies_and_files(make, shape, tmp_path):
    torch.manual_seed(1)
    x = torch.randn(shape)
    model = nn.Sequential(make())
    fresh = copy.deepcopy(model)
    qk.quantize_(model, qk.W8A8())
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with torch.no_grad():
        fresh[0].weight.zero_()
    qk.save_model(model, tmp_path / "model.safetensors")
    assert torch.equal(qk.load_model(fresh, tmp_path / "model.safetensors")(x), y)
    state = model.state_dict()
    assert state["0.weight"].shape == model[0].shape
    other = nn.Sequential(make())
    qk.quantize_(other, qk.W8A8())
    other.load_state_dict(state)
    assert torch.equal(other(x), y)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    qk.dequantize_(other)
    assert type(other[0]) is type(make())
    assert error(y, other(x)) < 0.02


@CASES
def test_compile_and_export(make, shape):
    torch.manual_seed(2)
    layer, x = quantized(make(), qk.W8A8()), torch.randn(shape)
    y = layer(x)
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    assert torch.equal(exported(x), y)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


@CASES
def test_training_around_it(make, shape):
    """Gradients to x and bias are those of the float layer that it stands for."""
    torch.manual_seed(3)
    layer = quantized(make(), qk.W8A8())
    back = copy.deepcopy(layer.dequantize())
    x = torch.randn(shape)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(a)
    grad = torch.randn_like(y)
    y.backward(grad)
    back(b).backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, back.bias.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] in (["bias"], [])


def test_autocast_casts_x_alone():
    layer = quantized(nn.Conv2d(4, 8, 3), qk.W8A8())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 4, 8, 8)).dtype == torch.bfloat16


def test_output_size_of_transposed_convolutions():
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    layer, x = quantized(conv, qk.W8A8()), torch.randn(1, 4, 5, 6)
    for size in ((9, 11), (10, 12)):
        assert layer(x, output_size=size).shape == conv(x, output_size=size).shape == (1, 6, *size)
        assert error(layer(x, output_size=size), conv(x, output_size=size)) < 0.03


def test_static_ranges():
    conv, x = nn.Conv2d(4, 8, 3), torch.rand(2, 4, 9, 9)
    scheme = qk.W8A8(static=True, activation="asymmetric")
    layer = qk.nn.QConv2d.from_float(conv, scheme, x_scale=1 / 255, x_zero_point=-128)
    assert error(layer(x), conv(x)) < 0.02
    assert torch.equal(layer(x)[0], layer(x[:1])[0])
    assert layer.state_dict()["x_zero_point"].item() == -128
    with pytest.raises(ValueError, match="needs x_scale, the measured scale"):
        qk.nn.QConv2d.from_float(conv, scheme)
    unset = qk.nn.QConv2d(4, 8, 3, scheme=scheme)
    with pytest.raises(RuntimeError, match="QConv2d: qkernels::conv: x_scale must be a positive"):
        unset(x)


def test_tied_convolutions_share_one_weight():
    first = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(first, nn.Conv2d(4, 4, 3))
    model[1].weight = first.weight
    qk.quantize_(model, qk.W8A8())
    assert model[0].packed is model[1].packed
    decoder = nn.Sequential(first, nn.ConvTranspose2d(4, 4, 3))
    decoder[1].weight = first.weight
    x = torch.randn(1, 4, 6, 6)
    expected = decoder(x)
    qk.quantize_(decoder, qk.W8A8())
    assert decoder[0].packed is not decoder[1].packed
    assert error(decoder(x), expected) < 0.03


def test_what_is_refused():
    with pytest.raises(ValueError, match="QConv2d: a convolution with int8 activations needs int8"):
        qk.nn.QConv2d(4, 4, 3, scheme=qk.W4A8(32))
    with pytest.raises(ValueError, match="which could overflow"):
        qk.nn.QConv1d(70_000, 1, 1, scheme=qk.W8A8(), device="meta")
    with pytest.raises(TypeError, match=r"QConv2d.from_float: got Conv1d; expected an nn.Conv2d"):
        qk.nn.QConv2d.from_float(nn.Conv1d(4, 4, 3))
    with pytest.raises(RuntimeError, match=r"QConv2d: x has shape \(2, 5, 8, 8\); expected"):
        qk.nn.QConv2d(4, 4, 3)(torch.randn(2, 5, 8, 8))
    with pytest.raises(ValueError, match="shares|cannot be quantized: its weight holds NaN"):
        conv = nn.Conv2d(4, 4, 3)
        conv.weight.data[0] = torch.nan
        qk.nn.QConv2d.from_float(conv)


def test_explain_says_what_runs():
    x = torch.randn(1, 8, 9, 9)
    integer = qk.explain(qk.nn.QConv2d(8, 4, 3), x)
    assert "QConv2d 8 → 4, 3×3 W8A8()" in integer
    assert "real integer arithmetic" in integer
    assert "conv_w8a8_" in integer
    assert "float arithmetic" in qk.explain(qk.nn.QConv2d(8, 4, 3, scheme=qk.W4A16(32)), x)
    model = nn.Sequential(qk.nn.QConv2d(8, 8, 3, groups=8), nn.Flatten())
    assert "conv_depthwise_w8a8_" in qk.explain(model, x)


def test_reflected_codes_are_the_reflected_input():
    """Padding of another kind happens before quantization, so it changes no scale."""
    conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
    layer, x = quantized(conv, qk.W8A8()), torch.randn(2, 4, 7, 7)
    plain = nn.Conv2d(4, 8, 3)
    plain.weight, plain.bias = conv.weight, conv.bias
    same = quantized(plain, qk.W8A8())(F.pad(x, (1, 1, 1, 1), mode="reflect"))
    assert torch.equal(layer(x), same)


class Network(nn.Module):
    """Everything that a small CNN is made of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.hardswish(self.point(self.depthwise(x)))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize("observer", ["minmax", "mse", "histogram"])
def test_a_calibrated_network(observer, tmp_path):
    torch.manual_seed(0)
    model = Network()
    for _ in range(3):
        model(torch.randn(8, 3, 20, 20))  # moves the statistics of the BatchNorm
    model.eval()
    batches = [torch.randn(4, 3, 20, 20) for _ in range(4)]
    x = torch.randn(4, 3, 20, 20)
    expected = model(x)
    fresh = copy.deepcopy(model)
    qk.fold_batchnorm_(model)
    assert isinstance(model.stem[1], nn.Identity)
    calibration = qk.calibrate(model, batches, observer=observer)
    scheme = qk.W8A8(static=True, activation="asymmetric")
    summary = qk.quantize_(model, scheme, calibration=calibration)
    assert len(summary.converted) == 5
    assert error(model(x), expected) < 0.05
    qk.fold_batchnorm_(fresh)
    qk.save_model(model, tmp_path / "cnn.safetensors")
    assert torch.equal(qk.load_model(fresh, tmp_path / "cnn.safetensors")(x), model(x))


def test_a_search_for_scales_and_data_leave_no_convolution_out():
    torch.manual_seed(0)
    model = Network().eval()
    x = torch.randn(4, 3, 20, 20)
    expected = model(x)
    plain, searched, calibrated = (copy.deepcopy(model) for _ in range(3))
    scheme = qk.W4A16(group_size=16)
    qk.quantize_(plain, scheme)
    qk.quantize_(searched, scheme, optimize="mse")
    summary = qk.quantize_calibrated_(calibrated, [torch.randn(4, 3, 20, 20)] * 8, scheme)
    assert len(summary.converted) == 5
    assert isinstance(calibrated.up, qk.nn.QConvTranspose2d)

    def weight_error(other):
        return error(other.point.dequantize().weight, model.point.weight)

    assert weight_error(searched) < weight_error(plain)
    assert error(calibrated(x), expected) < 0.3
