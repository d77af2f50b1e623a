"""lower: which ops become integer ones, and how near the results are to the float model's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure

import qkernels as qk
from helpers import cnns
from qkernels.nn.int8 import Dequantize, Int8Conv, Int8Module, Quantize

STATIC = {kind: qk.W8A8(static=True, activation=kind) for kind in ("symmetric", "asymmetric")}


def lowered(name, activation="asymmetric", observer="minmax"):
    model, shapes = cnns.build(name)
    batches = [cnns.batch(shapes, 8, seed) for seed in range(3)]
    made = qk.lower(
        model, batches[0], batches=batches, scheme=STATIC[activation], observer=observer
    )
    return model, made, cnns.batch(shapes, 5, 99)


def sqnr(expected, got):
    expected, got = expected.double(), got.double()
    return 10 * math.log10(expected.square().sum() / (expected - got).square().sum())


# What stays float, how often codes become float on the way, and the least SQNR in dB. Without an
# entry: nothing, never, 30.
FLOAT = {
    "mobilenet_v3": (["squeeze.hardsigmoid", "squeeze.mul"], 1),
    "efficientnet": (["squeeze.hardsigmoid", "squeeze.mul"], 1),
    "unet_bilinear": (["up.0"], 0),
    "convnext": (["permute", "norm", "mul", "permute", "add", "mean"], 1),
    "several": (["right", "pad", "softmax"], 2),
    "volume": (["view"], 0),
}


@pytest.mark.parametrize("index, name", list(enumerate(cnns.NETS)))
def test_networks(index, name):
    model, made, x = lowered(name, ("symmetric", "asymmetric")[index % 2])
    with torch.no_grad():
        expected = model(*x)
    got = made(*x)
    assert tree_structure(got) == tree_structure(expected)
    for wanted, given in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        assert given.dtype == wanted.dtype
        assert sqnr(wanted, given) > 30
    left, conversions = FLOAT.get(name, ([], 0))
    assert [row.name for row in made.summary.left] == left
    assert all(row.note for row in made.summary.left)
    kinds = [type(module) for module in made.modules()]
    assert kinds.count(Dequantize) == conversions
    assert kinds.count(Quantize) == 0  # the convolutions quantize what is float
    for size in (1, 3):
        assert tree_leaves(made(*(t[:size] for t in x)))[0].shape[0] == size


def test_nothing_is_float_between_the_layers_of_a_resnet():
    _, made, x = lowered("resnet")
    seen = []

    def look(module, args, output):
        seen.append((module, args, output))

    for module in made.modules():
        if isinstance(module, Int8Conv | Int8Module):
            module.register_forward_hook(look)
    made(*x)
    assert made.summary.bytes_after < 0.3 * made.summary.bytes_before
    assert len(seen) == 9  # seven layers, two poolings; additions and activations are inside
    assert [args[0].dtype for _, args, _ in seen] == [torch.float32] + 8 * [torch.int8]
    assert [output.dtype for _, _, output in seen] == 8 * [torch.int8] + [torch.float32]
    assert all(t.dtype == torch.int8 for _, args, _ in seen for t in args[1:])
    for _, _, output in seen[:-2]:
        assert output.is_contiguous(memory_format=torch.channels_last)


# ---- Against the arithmetic written out ----------------------------------------------------------


class FakeQuantized:
    """int8 values in float64, from ranges of the extremes of what is passed through first."""

    def __init__(self, symmetric):
        self.symmetric = symmetric
        self.ends = {}

    def watch(self, name, value):
        low, high = self.ends.get(name, (0.0, 0.0))
        self.ends[name] = (min(low, float(value.min())), max(high, float(value.max())))
        return value

    def round(self, name, value):
        low, high = self.ends[name]
        if self.symmetric:
            scale, zero, least = max(-low, high) / 127, 0, -127
        else:
            scale = (high - low) / 255
            zero, least = round(-128 - low / scale), -128
        return ((value / scale).round() + zero).clamp(least, 127).sub(zero) * scale

    @staticmethod
    def layer(conv, norm=None):
        """Weight, its BatchNorm folded in, in 127 steps for each output channel; and bias."""
        weight = conv.weight.detach().double()
        bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        bias = bias.double()
        if norm is not None:
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * factor.view(-1, 1, 1, 1)
            bias = (bias - norm.running_mean.double()) * factor + norm.bias.double()
        steps = weight.flatten(1).abs().amax(1) / 127
        steps = steps.view(-1, *[1] * (weight.dim() - 1))
        return (weight / steps).round() * steps, bias.detach()


def resnet_by_hand(net, x, keep):
    """The lowered ResNet in float64; `keep(name, value)` wherever there are codes."""

    def convolve(x, conv, norm):
        weight, bias = FakeQuantized.layer(conv, norm)
        return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding)

    x = keep("input", x.double())
    x = keep("stem", convolve(x, net.stem[0], net.stem[1]).relu())
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    for name in ("layer1", "layer2"):
        block = getattr(net, name)
        shortcut = x
        if block.down is not None:
            shortcut = keep(f"{name}.down", convolve(x, *block.down))
        inner = keep(f"{name}.1", convolve(x, block.conv1, block.bn1).relu())
        x = keep(f"{name}.2", (convolve(inner, block.conv2, block.bn2) + shortcut).relu())
    x = keep("pool", x.mean((2, 3)))
    weight, bias = FakeQuantized.layer(net.fc)
    return x @ weight.T + bias


def mobilenet_by_hand(net, x, keep):
    def convolve(x, layer):
        conv, norm = layer[:2]
        weight, bias = FakeQuantized.layer(conv, norm)
        return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, 1, conv.groups)

    x = keep("input", x.double())
    x = keep("stem", convolve(x, net.stem).clamp(0, 6))
    inner = keep("expand", convolve(x, net.expand).clamp(0, 6))
    inner = keep("depthwise", convolve(inner, net.depthwise).clamp(0, 6))
    x = keep("project", convolve(inner, net.project) + x)
    x = keep("mean", x.mean((2, 3)))
    weight, bias = FakeQuantized.layer(net.fc)
    return x @ weight.T + bias


@pytest.mark.parametrize("activation", STATIC)
@pytest.mark.parametrize(
    "name, by_hand", [("resnet", resnet_by_hand), ("mobilenet_v2", mobilenet_by_hand)]
)
def test_the_arithmetic_is_that_of_fake_quantization(name, by_hand, activation):
    model, made, (x,) = lowered(name, activation)
    reference = FakeQuantized(activation == "symmetric")
    float_layer = FakeQuantized.layer
    try:  # ranges come from the float model
        FakeQuantized.layer = staticmethod(exact_layer)
        for seed in range(3):
            by_hand(model, *cnns.batch(cnns.IMAGE, 8, seed), reference.watch)
    finally:
        FakeQuantized.layer = staticmethod(float_layer)
    with torch.no_grad():
        expected = by_hand(model, x, reference.round)
    # Only ties that float32 and float64 see differently; the float model is at about 40 dB.
    assert sqnr(expected, made(x)) > 55


def exact_layer(conv, norm=None):
    """A layer whose BatchNorm is folded in, without rounding."""
    weight = conv.weight.detach().double()
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    if norm is None:
        return weight, bias
    factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = (bias - norm.running_mean.double()) * factor + norm.bias.detach().double()
    return weight * factor.view(-1, 1, 1, 1), bias


# ---- Arguments -----------------------------------------------------------------------------------


def test_a_calibration_of_layers_is_enough():
    model, shapes = cnns.build("resnet")
    batches = [cnns.batch(shapes, 8, seed) for seed in range(3)]
    calibration = qk.calibrate(model, batches, observer="minmax")
    made = qk.lower(model, batches[0], calibration=calibration)
    with torch.no_grad():
        assert sqnr(model(*batches[0]), made(*batches[0])) > 35
    # No layer reads the last sum, so that has no range.
    assert [row.name for row in made.summary.left] == ["pool", "view"]
    # No layer reads what this one gives, and the layer's own output is before its BatchNorm.
    down = made.get_submodule("layer2.down.0")
    assert down.y_scale is None
    scale = calibration.input("layer1.conv2").asymmetric.scale
    assert made.get_submodule("layer1.conv1").y_scale.item() == scale


def test_ignored_layers_stay_float():
    model, shapes = cnns.build("resnet")
    x = cnns.batch(shapes)
    made = qk.lower(model, x, batches=[x], ignore=("stem", "fc"))
    notes = {row.name: row.note for row in made.summary.left}
    assert notes["stem.0"] == "ignored by 'stem'"
    assert notes["fc"] == "ignored by 'fc'"
    assert torch.equal(made.fc.weight, model.fc.weight)
    assert made.fc.weight.data_ptr() != model.fc.weight.data_ptr()
    with torch.no_grad():
        assert sqnr(model(*x), made(*x)) > 35


def test_the_float_model_stays_as_it_was():
    model, shapes = cnns.build("mobilenet_v2")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = cnns.batch(shapes)
    made = qk.lower(model, x, batches=[x])
    assert model.training and model.dropout.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_labels_in_batches_are_left_out():
    model, shapes = cnns.build("vgg")
    (x,) = cnns.batch(shapes)
    labelled = [(x, torch.zeros(len(x)))]
    made = qk.lower(model, x, batches=labelled, observer="minmax")
    assert torch.equal(made(x), qk.lower(model, x, batches=[x], observer="minmax")(x))


def test_one_image_is_example_enough():
    model, shapes = cnns.build("vgg")
    x = cnns.batch(shapes, 1)
    made = qk.lower(model, x, batches=[x])
    assert made(*cnns.batch(shapes, 6)).shape == (6, 5)


def test_a_layer_called_twice_has_one_weight():
    _, made, _ = lowered("several")
    first, second = made.get_submodule("shared"), made.get_submodule("shared_2")
    assert first.packed is second.packed
    assert first.x_scale.item() != second.x_scale.item()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({}, ValueError, "neither of batches and calibration"),
        ({"batches": X}, TypeError, r"pass \[batch\]"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"calibration": [X]}, TypeError, "calibration is list"),
        ({"batches": [X], "scheme": qk.W8A8()}, ValueError, "codes between layers need int8"),
        ({"batches": [X], "scheme": qk.W8A16()}, ValueError, r"expected qk.W8A8\(static=True\)"),
        ({"batches": [X], "observer": "best"}, ValueError, "lower: observer is 'best'"),
        ({"batches": [X], "ignore": "nothing"}, ValueError, "lower: ignore names 'nothing'"),
        ({"batches": [X], "ignore": ("0", "2")}, ValueError, "ignored by '0'"),
        ({"batches": [X * float("nan")]}, ValueError, "never a finite number"),
        ({"batches": [X[:, :2]]}, ValueError, r"of shape \(2, 2, 8, 8\), but the model"),
        ({"batches": ["text"]}, TypeError, "a batch is str"),
    ],
)
def test_arguments_that_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        qk.lower(small(), X, **arguments)


def test_a_float64_model_is_refused():
    with pytest.raises(ValueError, match="Sequential has float64 parameters; .*float"):
        qk.lower(small().double(), X.double(), batches=[X.double()])


def test_a_model_that_cannot_be_exported():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="torch.export cannot capture Branching"):
        qk.lower(Branching(), X, batches=[X])


def test_calls_that_are_refused():
    made = qk.lower(small(), X, batches=[X])
    with pytest.raises(ValueError, match=r"of shape \(2, 3, 9, 8\), but .* \(any, 3, 8, 8\)"):
        made(torch.randn(2, 3, 9, 8))
    with pytest.raises(ValueError, match="torch.float64"):
        made(X.double())
    with pytest.raises(TypeError, match="other arguments than the example_inputs"):
        made(X, X)
    with pytest.raises(ValueError, match="keep the float model"):
        qk.dequantize_(made)
