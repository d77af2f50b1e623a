"""A converted model computes what training saw: codes to the bit, results within a bound."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from helpers.check import float_path_bound, same_tensor
from qkernels.nn import QATEmbedding, QATLinear, QEmbedding, QLinear

from .conftest import train


def prepared_and_trained(model, scheme, x, learn_scale=False, ignore=()):
    qk.prepare_qat_(model, scheme, ignore, learn_scale=learn_scale)
    classes = model(x).shape[-1]
    target = torch.arange(model(x)[..., 0].numel()) % classes
    train(model, x, target)
    return model.eval()


def bound(layer: QATLinear, x: torch.Tensor) -> np.ndarray:
    """How far the two may be apart: float sums of the same products, in another order, each.

    Both are within float_path_bound of the exact result, W8A8's and W4A8's sums being exact but for
    one rounding for each group.
    """
    weight = layer.fake_weight().detach().double().numpy()
    values = layer.fake_input(x).detach().double().numpy()
    groups = 1 if layer.scheme.group_size == -1 else -(-weight.shape[1] // layer.scheme.group_size)
    bias = 0 if layer.bias is None else np.abs(layer.bias.detach().double().numpy())
    # A bias and a zero point are terms of their own. x itself is rounded to its scale's multiples.
    extra = (groups + 4) * 2.0**-23 * (np.abs(values) @ np.abs(weight).T)
    if layer.scheme.activation == "asymmetric":
        # The zero point's part is computed apart and taken away again.
        extra = extra * 4 + (groups + 4) * 2.0**-23 * np.abs(values).max() * np.abs(weight).sum(1)
    return 2 * float_path_bound(values, weight, groups) + extra + 2.0**-22 * bias


@pytest.mark.parametrize("learn_scale", [False, True])
def test_mlp(mlp, scheme, x, learn_scale):
    model = prepared_and_trained(mlp(), scheme, x, learn_scale)
    fake = copy.deepcopy(model)
    codes = {n: m.quantized_weight() for n, m in fake.named_modules() if isinstance(m, QATLinear)}
    summary = qk.convert_(model)
    assert [row.became for row in summary.converted] == [f"QLinear {scheme}"] * 2
    hidden = x
    for name in ("0", "1", "2"):
        before, after = fake.get_submodule(name), model.get_submodule(name)
        if name != "1":
            assert type(after) is QLinear
            for part in ("data", "scale", "zero_point"):
                got, want = (getattr(q, part) for q in (after.quantized_weight(), codes[name]))
                assert (got is None and want is None) or torch.equal(got, want)
            # What training saw is what these codes stand for, to the bit.
            same_tensor(after.float_weight(), before.fake_weight().detach())
            with torch.no_grad():
                apart = (after(hidden) - before(hidden)).double().abs().numpy()
            assert (apart <= bound(before, hidden)).all()
        with torch.no_grad():
            hidden = before(hidden)


def test_without_learned_scales_it_is_what_quantize_makes(mlp, x):
    scheme = qk.W4A8(group_size=24)
    model = prepared_and_trained(mlp(), scheme, x)
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    qk.quantize_(plain, scheme)
    qk.convert_(model)
    same_tensor(model(x), plain(x))


def test_learned_scales_begin_as_quantize_makes_them(mlp, scheme, x):
    if scheme.static:
        return
    follows, learns = mlp(), mlp()
    qk.prepare_qat_(follows, scheme)
    qk.prepare_qat_(learns, scheme, learn_scale=True)
    same_tensor(learns(x).detach(), follows(x).detach())


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("scheme", [qk.W8A16(), qk.W4A16(8), qk.NF4(16)], ids=str)
def test_embedding(scheme, learn_scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 20, padding_idx=3))
    indices = torch.tensor([[0, 3, 49], [7, 7, 3]])
    model = prepared_and_trained(model, scheme, indices, learn_scale)
    assert type(model[0]) is QATEmbedding
    before = model(indices).detach()
    qk.convert_(model)
    assert type(model[0]) is QEmbedding
    same_tensor(model(indices), before)


def test_only_rows_that_were_looked_up_get_gradients():
    model = nn.Sequential(nn.Embedding(50, 20, padding_idx=3))
    qk.prepare_qat_(model, qk.W4A16(8), learn_scale=True)
    model(torch.tensor([5, 3, 5])).sum().backward()
    assert (model[0].weight.grad.any(1) == (torch.arange(50) == 5)).all()
    assert not model[0].weight_scale.grad[torch.arange(50) != 5][4:].any()


@pytest.mark.parametrize("learn_scale", [False, True])
def test_transformer_layer(learn_scale):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 32)
    model = prepared_and_trained(model, qk.W8A8(), x, learn_scale)
    assert isinstance(model.layers[1].linear2, QATLinear)
    with torch.no_grad():
        before = model(x)  # torch's fused path would pass the fake quantization by
        by_hand = x
        for part in model.layers:
            part.train()
            by_hand = part(by_hand)
        assert torch.allclose(before, by_hand, atol=1e-5)
    model.eval()
    qk.convert_(model)
    assert isinstance(model.layers[1].linear2, QLinear)
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=2e-3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices):
        return self.head(self.table(indices))


@pytest.mark.parametrize("learn_scale", [False, True])
def test_tied_weights_stay_one(learn_scale):
    torch.manual_seed(0)
    model, indices = Tied(), torch.arange(12)
    before_count = len(list(model.parameters()))
    qk.prepare_qat_(model, qk.W8A16(), learn_scale=learn_scale)
    assert model.head.weight is model.table.weight
    assert len(list(model.parameters())) == before_count + learn_scale
    train(model, indices, indices)
    expected = model(indices).detach()
    qk.convert_(model)
    assert model.head.packed is model.table.packed
    assert torch.allclose(model(indices), expected, atol=1e-5)


def test_bias_hooks_and_attributes_stay(mlp, x):
    model = mlp()
    weight, bias, calls = model[0].weight, model[0].bias, []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].note = "kept"
    qk.prepare_qat_(model, qk.W8A8())
    assert model[0].weight is weight and model[0].bias is bias
    model(x)
    qk.convert_(model)
    model(x)
    assert model[0].bias is bias and model[0].note == "kept"
    assert len(calls) == 2
    handle.remove()
    model(x)
    assert len(calls) == 2
    for name in ("scheme", "quantizing", "weight_scale", "input_range"):
        assert name not in qk.nn.QATLinear(8, 4).to_float().__dict__


def test_conversion_is_refused_before_anything_changes(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, {"0": qk.W8A8(), "2": qk.W8A8(static=True)})
    with pytest.raises(ValueError, match=r"a layer, and has changed nothing: 2: its input has not"):
        qk.convert_(model)
    assert isinstance(model[0], QATLinear)
    with pytest.raises(RuntimeError, match="its input has not been observed yet"):
        model.eval()(x)
    model.train()(x)
    with torch.no_grad():
        model[0].weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="0: its weight holds NaN"):
        qk.convert_(model)
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(), learn_scale=True)
    with torch.no_grad():
        model[0].weight_scale[2] = -1
    with pytest.raises(ValueError, match="0: a learned scale is 0 or negative"):
        qk.convert_(model)
    with torch.no_grad():
        model[0].weight_scale[2] = torch.nan
    with pytest.raises(ValueError, match="0: its learned scales hold NaN"):
        qk.convert_(model)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda m: qk.prepare_qat_(m[0], qk.W8A8()), ValueError, "use qkernels.nn.QATLinear.from"),
        (lambda m: qk.prepare_qat_(m, "W8A8"), TypeError, "prepare_qat_: scheme is 'W8A8'"),
        (lambda m: qk.prepare_qat_(m, {}), ValueError, "prepare_qat_: scheme is an empty dict"),
        (lambda m: qk.prepare_qat_(m, qk.W8A8(), [3]), TypeError, "prepare_qat_: ignore is [3]"),
        (lambda m: qk.prepare_qat_(m, {"9": qk.W8A8()}), ValueError, "prepare_qat_: scheme names"),
        (lambda m: qk.prepare_qat_(m, qk.W8A8(), learn_scale=1), TypeError, "learn_scale is 1"),
        (lambda m: qk.prepare_qat_(7, qk.W8A8()), TypeError, "prepare_qat_: model is int"),
        (lambda m: qk.convert_(m), ValueError, "convert_: Sequential holds no layer that"),
        (lambda m: qk.convert_(QATLinear(4, 4)), ValueError, "put it into an nn.Sequential"),
        (lambda m: qk.qat.enable(m), ValueError, "enable: Sequential holds no layer"),
        (lambda m: QATLinear.from_float(nn.ReLU(), qk.W8A8()), TypeError, "expected an nn.Linear"),
        (lambda m: QATLinear(4, 4, scheme=8), TypeError, "QATLinear: scheme is 8"),
    ],
)
def test_sentences(mlp, call, error, sentence):
    with pytest.raises(error) as caught:
        call(mlp())
    assert sentence in str(caught.value)


def test_prepared_layers_are_not_prepared_or_quantized_again(mlp):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8())
    for again in (qk.prepare_qat_, qk.quantize_):
        with pytest.raises(ValueError, match=r"prepared for W8A8\(\); convert_ quantizes it"):
            again(model, qk.W8A8())


def test_summary_says_what_became_of_every_module(mlp):
    model = nn.Sequential(mlp(), nn.LayerNorm(18))
    model.head = nn.Linear(18, 18)
    summary = qk.prepare_qat_(model, {"*": qk.W8A8(), "0.2": qk.W4A8(16)}, ignore="head")
    became = {row.name: row.became for row in summary}
    assert became["0.0"] == "QATLinear W8A8()"
    assert became["0.2"] == "QATLinear W4A8(group_size=16)"
    assert became["1"] is None and became["head"] is None
    assert summary.bytes_before == summary.bytes_after
    summary = qk.convert_(model)
    assert {row.name for row in summary.converted} == {"0.0", "0.2"}
    assert summary.bytes_after < 0.6 * summary.bytes_before
