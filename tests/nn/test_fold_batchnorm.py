"""fold_batchnorm_: the numbers in float64, which pairs are found, and why others are left."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 8, bias=False), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=2, dilation=2), (2, 6, 9)),
    "conv2d": (
        lambda: nn.Conv2d(6, 8, (3, 1), stride=2, padding_mode="reflect", padding=1),
        (2, 6, 9, 7),
    ),
    "conv2d-grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False), (2, 6, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2, bias=False), (1, 6, 3, 4, 5)),
    "transpose1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), (2, 6, 5)),
    "transpose2d": (
        lambda: nn.ConvTranspose2d(6, 8, 3, bias=False, output_padding=1, stride=2),
        (2, 6, 4, 5),
    ),
    "transpose2d-grouped": (lambda: nn.ConvTranspose2d(6, 8, (2, 3), groups=2), (2, 6, 4, 5)),
    "transpose3d": (lambda: nn.ConvTranspose3d(6, 8, 2, groups=2, bias=False), (1, 6, 3, 3, 3)),
}


def seen(norm):
    """A BatchNorm in eval mode that has seen something."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


def norm_for(x, channels=8, **options):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(x)]
    return seen(kind(channels, **options))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def folded_names(summary):
    return {row.name: row.became for row in summary.converted}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_stays(name, affine):
    make, shape = LAYERS[name]
    layer = make()
    model = nn.Sequential(layer, norm_for(shape, affine=affine, eps=1e-3), nn.ReLU()).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    weight = layer.weight
    summary = qk.fold_batchnorm_(model)
    assert folded_names(summary) == {"1": "Identity, folded into 0"}
    assert type(model[1]) is nn.Identity
    assert not model[1].training
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer.bias, nn.Parameter)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    layer, norm = nn.Conv2d(3, 4, 3).to(dtype), norm_for((1, 3, 5, 5), 4)
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    mean, var, gamma, beta = (
        t.detach().double().numpy()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    qk.fold_batchnorm_(nn.Sequential(layer, norm))
    factor = gamma / np.sqrt(var + norm.eps)
    exact = torch.from_numpy(weight * factor[:, None, None, None]).to(dtype)
    torch.testing.assert_close(layer.weight.detach(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert (layer.weight == exact).float().mean() > 0.99
    exact = torch.from_numpy((bias - mean) * factor + beta).to(dtype)
    torch.testing.assert_close(layer.bias.detach(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert layer.weight.dtype == layer.bias.dtype == dtype


class Block(nn.Module):
    """A residual block with a shortcut, as in ResNet."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = norm_for((1,) * 4, width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm_for((1,) * 4, width)
        self.down = nn.Sequential(nn.Conv2d(width, width, 1), norm_for((1,) * 4, width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.down(x))


class Untraceable(nn.Module):
    """Takes another way for other values, which stand-ins for tensors do not have."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        if x.sum() > 1e9:
            x = x + 1
        return self.body(x)


def check_same(model, x, folded):
    model.eval()
    expected = model(x)
    summary = qk.fold_batchnorm_(model)
    assert set(folded_names(summary)) == set(folded), str(summary)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    return summary


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def test_residual_blocks():
    model = nn.Sequential(Block(), Block())
    names = [f"{i}.{name}" for i in (0, 1) for name in ("bn1", "bn2", "down.1")]
    check_same(model, X, names)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_parts_of_a_model_that_cannot_be_traced_as_a_whole():
    inner = Untraceable(nn.Sequential(Block(), nn.Conv2d(8, 8, 1), norm_for((1,) * 4)))
    model = Untraceable(nn.Sequential(nn.Conv2d(8, 8, 1), norm_for((1,) * 4), inner))
    names = ["bn1", "bn2", "down.1"]
    check_same(model, X, ["body.1", "body.2.body.2", *(f"body.2.body.0.{n}" for n in names)])


class TwoWays(nn.Module):
    """What `make_forward` does with conv and bn."""

    def __init__(self, forward, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(8, channels, 1)
        self.bn = norm_for((1,) * 4, channels)
        self.other = nn.Conv2d(8, channels, 1)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "conv, which feeds it, runs more than once"),
        (lambda m, x: (y := m.conv(x)) + m.bn(y), "used elsewhere"),
        (lambda m, x: m.bn(m.bn(m.conv(x))), "runs 2 times"),
        (lambda m, x: m.conv(x), "no code that can be traced calls it"),
        (lambda m, x: m.bn(m.conv(x).relu()), "not come straight from a layer"),
        (lambda m, x: m.bn(x), "not come straight from a layer"),
        (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), "reads conv.weight directly"),
        (lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean[:, None, None], "reads bn.running_mean"),
    ],
)
def test_a_pair_that_is_more_than_a_pair_is_left(forward, words):
    summary = check_same(TwoWays(forward), X, [])
    assert words in summary.left[0].note


class OptionalMask(nn.Module):
    def __init__(self, swap):
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn = norm_for((1,) * 4)
        self.swap = swap

    def forward(self, x, mask=None):
        if mask is None and self.swap:
            return self.bn(self.other(x))
        x = self.conv(x if mask is None else x * mask)
        return self.bn(x)


def test_optional_arguments_are_traced_both_ways():
    check_same(OptionalMask(swap=False), X, ["bn"])
    model = OptionalMask(swap=True)
    summary = check_same(model, X, [])
    assert "depends on how the model is called" in summary.left[0].note


class Keeps(nn.Module):
    """Leaves traces of its input in attributes, and counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), norm_for((1,) * 4)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls.add_(1)
        self.last = self.conv(x)
        return self.bn(self.last)


def test_tracing_leaves_no_traces():
    model = Keeps().eval()
    torch.manual_seed(5)
    qk.fold_batchnorm_(model)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert after == torch.rand(1)
    assert model.calls == 0
    assert model.last is None


def pair(norm=None, conv=None):
    return nn.Sequential(conv or nn.Conv2d(3, 8, 1), norm or norm_for((1,) * 4))


def shared():
    conv = nn.Conv2d(3, 8, 1)
    return nn.ModuleDict({"a": nn.Sequential(conv, norm_for((1,) * 4)), "b": nn.Sequential(conv)})


def tied():
    model = nn.ModuleDict({"a": pair(), "b": nn.Conv2d(3, 8, 1)})
    model["b"].weight = model["a"][0].weight
    return model


def hooked(which):
    model = pair()
    model[which].register_forward_hook(lambda *a: None)
    return model


def with_nan():
    model = pair()
    model[1].running_var[3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pair(nn.BatchNorm2d(8)), "training mode"),
        (lambda: pair(nn.BatchNorm2d(8, track_running_stats=False).eval()), "track_running_stats"),
        (lambda: pair(nn.SyncBatchNorm(8).eval()), "SyncBatchNorm is not folded"),
        (lambda: nn.Sequential(nn.Linear(4, 8), norm_for((1,) * 4)), "a Linear"),
        (lambda: nn.Sequential(nn.ReLU(), norm_for((1,) * 4)), "a ReLU"),
        (lambda: nn.Sequential(norm_for((1,) * 4)), "not come straight from a layer"),
        (shared, "several names"),
        (tied, "shares a parameter"),
        (lambda: hooked(0), "0 has hooks"),
        (lambda: hooked(1), "1 has hooks"),
        (with_nan, "NaN or Inf"),
        (lambda: pair().to("meta"), "meta device"),
        (lambda: pair(norm_for((1,) * 4, 4)), "has 4 channels but 0 has 8"),
        (
            lambda: pair(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1))),
            "Parametrized",
        ),
    ],
)
def test_what_cannot_be_folded_is_left_with_the_reason(make, words):
    model = make()
    before = copy.deepcopy(model.state_dict())
    summary = qk.fold_batchnorm_(model)
    assert len(summary) == 1
    assert not summary.converted
    assert words in summary.left[0].note, summary.left[0].note
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not value.is_meta:
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)


def test_the_summary_has_sizes_and_notes():
    model = nn.Sequential(nn.Linear(6, 8), norm_for((1, 1)))
    size = sum(t.nbytes for t in (*model[1].parameters(), *model[1].buffers()))
    row = next(iter(qk.fold_batchnorm_(model)))
    assert (row.kind, row.bytes_before, row.bytes_after) == ("BatchNorm1d", size, 0)
    assert row.note == "for inputs [rows, features]"
    assert len(qk.fold_batchnorm_(model)) == 0


class Opaque(nn.Module):
    """Not traceable, and without a part that is."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.late = nn.Conv2d(8, 8, 1), norm_for((1,) * 4), norm_for((1,) * 4)

    def forward(self, x):
        return self.late(self.bn(self.conv(x)).relu() + float(x.sum() > 0))


def test_pairs_by_name():
    model = Opaque().eval()
    expected = model(X)
    assert "cannot be traced" in qk.fold_batchnorm_(model).left[0].note
    summary = qk.fold_batchnorm_(model, pairs=[("conv", "bn")])
    assert folded_names(summary) == {"bn": "Identity, folded into conv"}
    assert summary.left[0].note == "not among the pairs"
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pairs", "error", "words"),
    [
        ([("conv", "batchnorm")], ValueError, "'batchnorm'"),
        ([("conv", "late"), ("bn", "conv")], ValueError, "'conv' cannot be folded into 'bn'"),
        ([("conv", "bn"), ("conv", "late")], ValueError, "another of the pairs"),
        (["conv"], TypeError, "two names"),
        ([("conv", 3)], TypeError, "two names"),
    ],
)
def test_bad_pairs_change_nothing(pairs, error, words):
    model = Opaque()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match="fold_batchnorm_") as caught:
        qk.fold_batchnorm_(model, pairs)
    assert words in str(caught.value), str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_folded_still_trains_and_copies():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), norm_for((1, 1)))
    with torch.inference_mode():
        qk.fold_batchnorm_(model)
    copy.deepcopy(model)(torch.randn(3, 6)).sum().backward()
    model(torch.randn(3, 6)).sum().backward()
    assert model[0].bias.grad is not None


# ---- in quantize_ -------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48), norm_for((1, 1), 48), nn.ReLU(), nn.Linear(48, 40, bias=False),
        norm_for((1, 1), 40), nn.Linear(40, 4),
    ).eval()  # fmt: skip


def test_quantize_folds_when_asked():
    x = torch.randn(64, 32)
    model, reference = mlp(), mlp()
    expected = reference(x)
    summary = qk.quantize_(model, qk.W8A8(), ignore="3", fold_batchnorm=True)
    rows = {row.name: row for row in summary}
    assert rows["1"].became == "Identity, folded into 0"
    assert rows["1"].bytes_after == 0
    assert rows["4"].became is None
    assert rows["4"].note == "not folded: ignored by '3'"
    assert rows["0"].became == "QLinear W8A8()"
    assert summary.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
    plain = mlp()
    assert {row.name for row in qk.quantize_(plain, qk.W8A8()).left} == {"1", "2", "4"}
    assert isinstance(plain[1], nn.BatchNorm1d)


def test_a_refused_quantize_has_not_folded():
    model = mlp()
    with pytest.raises(ValueError, match="calibration"):
        qk.quantize_(model, qk.W8A8(static=True), fold_batchnorm=True)
    assert isinstance(model[1], nn.BatchNorm1d)
