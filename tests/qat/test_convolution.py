"""Convolutions that train for quantization, and the batch normalization after them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from helpers.check import same_tensor
from qkernels.nn import QATConv2d

W8 = qk.W8A16()


def fake(rows, scheme):
    """A matrix through quantize and dequantize."""
    args = (scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
    return qk.quantize(rows.detach(), *args).dequantize()


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
        (nn.Conv2d(6, 8, 3, stride=2, groups=2), (2, 6, 9, 8)),
        (nn.Conv2d(6, 8, (3, 1), dilation=2, padding="same", bias=False), (6, 9, 8)),
        (nn.Conv3d(6, 8, 2, padding=1), (2, 6, 5, 4, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", [W8, qk.W8A8(), qk.W4A16(-1), qk.W8A8(static=True)], ids=str)
def test_values_and_gradients(conv, shape, scheme):
    model = nn.Sequential(copy.deepcopy(conv))
    qk.prepare_qat_(model, scheme)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    # By hand: a scale for each output channel, and one for each sample or all.
    batched = x.dim() == conv.weight.dim()
    weight = fake(conv.weight.flatten(1), scheme).view_as(conv.weight)
    values = x.detach()
    if scheme.static:
        values = qk.quantize(values, "int8", None).dequantize()
    elif scheme.activation != "float":
        rows = values.flatten(1) if batched else values.flatten()[None]
        values = qk.quantize(rows, "int8").dequantize().view_as(values)
    plain = copy.deepcopy(conv)
    plain.weight = nn.Parameter(weight)
    values.requires_grad_()
    want = plain(values)
    same_tensor(y.detach(), want.detach())
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, plain.weight.grad)
    if not scheme.static:  # where the range's ends may clip a value or two
        torch.testing.assert_close(x.grad, values.grad)

    qk.convert_(model)
    assert type(model[0]).__name__ == f"Q{type(conv).__name__}"
    same_tensor(model[0].dequantize().weight.detach(), weight)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_groups_of_weights_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="one scale for each output channel; give convolutions"):
        qk.prepare_qat_(model, qk.W4A16(32))
    summary = qk.prepare_qat_(model, {"*": qk.W4A16(32), "0": qk.W4A16(-1)})
    assert len(summary.converted) == 2


class Block(nn.Module):
    """Two convolutions with batch normalization, and one whose output is read twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = y + self.bn2(self.conv2(y))
        z = self.conv3(y)
        return z + self.bn3(z)


def block():
    torch.manual_seed(0)
    model = Block()
    for norm in (model.bn1, model.bn2, model.bn3):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 2)
    return model


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("learn_scale", [False, True])
def test_batch_normalization_is_folded(learn_scale):
    model = block()
    with torch.no_grad():
        model.bn2.weight[3] = 0.0  # as residual branches begin
    names = list(model.state_dict())
    summary = qk.prepare_qat_(model, W8, learn_scale=learn_scale)
    folds = {row.name for row in summary.converted if "folds the batch" in row.became}
    assert folds == {"conv1", "conv2"}
    if not learn_scale:
        assert list(model.state_dict()) == names

    # In eval mode: the quantized product of weight and normalization, by hand.
    model.eval()
    conv, norm = model.conv1, model.bn1
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    weight = fake(conv.weight.flatten(1) * factor[:, None], W8).view_as(conv.weight)
    bias = norm.bias - norm.running_mean * factor
    with torch.no_grad():
        want = F.conv2d(X, weight, bias, padding=1)
        torch.testing.assert_close(norm(conv(X)), want, rtol=1e-4, atol=1e-5)
        before = model(X)
    assert before.isfinite().all()

    fake_model = copy.deepcopy(model)
    assert fake_model.conv1.batchnorm[0] is fake_model.bn1 is not model.bn1
    summary = qk.convert_(model)
    became = {row.name: row.became for row in summary}
    assert became["bn1"] == "Identity, folded into conv1"
    assert became["bn3"] is None
    assert type(model.bn2) is nn.Identity and type(model.bn3) is nn.BatchNorm2d
    with torch.no_grad():
        torch.testing.assert_close(model.conv1(X), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)


def test_training_is_that_of_batch_normalization():
    """Statistics are those of the batch, as without folding, but for the quantization."""
    model, plain = block(), block()
    qk.prepare_qat_(model, W8)
    y, want = model(X), plain(X)
    assert ((y - want).norm() / want.norm()) < 0.02
    for a, b in ((model.bn1, plain.bn1), (model.bn2, plain.bn2)):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=0.05, atol=0.02)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=0.05, atol=0.02)
    target = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for out in (y, want):
        F.mse_loss(out, target).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name != "conv2.bias":  # which batch statistics take away again
            assert ((p.grad - q.grad).norm() / q.grad.norm()) < 0.05, name


def test_without_quantization_nothing_is_folded():
    model, plain = block(), block()
    qk.prepare_qat_(model, W8)
    qk.qat.disable(model)
    same_tensor(model(X).detach(), plain(X).detach())


def test_neighbours_are_found_where_tracing_fails():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = Untraceable()
    summary = qk.prepare_qat_(model, W8)
    assert "folds the batch" in summary.converted[0].became
    model(X)
    qk.convert_(model)
    assert type(model.body[1]) is nn.Identity


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
    ],
    ids=str,
)
def test_what_cannot_be_folded_stays(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    qk.prepare_qat_(model, W8)
    assert isinstance(model[0], QATConv2d) and not model[0].batchnorm
    model(X)
    qk.convert_(model)
    assert model[1] is norm


def test_a_shared_convolution_is_not_folded():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = nn.Sequential(conv, norm, conv)
    qk.prepare_qat_(model, W8)
    assert not model[0].batchnorm and model[0] is model[2]


def test_compile():
    model = block()
    qk.prepare_qat_(model, W8)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, want = compiled(X), other(X)
    torch.testing.assert_close(y, want)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    F.mse_loss(y, target).backward()
    F.mse_loss(want, target).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_state_dict_loads_into_the_float_model():
    model = block()
    qk.prepare_qat_(model, W8)
    model(X)
    plain = Block()
    plain.load_state_dict(model.state_dict())
    qk.prepare_qat_(plain, W8)
    same_tensor(plain.eval()(X).detach(), model.eval()(X).detach())
