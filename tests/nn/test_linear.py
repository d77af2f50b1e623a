"""QLinear: construction, from_float and back, types, gradients, errors that name the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def float_layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(70, 33, bias=bias, dtype=dtype)


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_float_follows_its_own_dequantized_layer(scheme, bias, dtype, x):
    layer = QLinear.from_float(float_layer(bias, dtype), scheme)
    x = x.to(dtype)
    y = layer(x)
    back = layer.dequantize()
    assert y.dtype == back.weight.dtype == dtype
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert error(y, back(x)) < (0.02 if scheme.activation != "float" else tolerance)


def test_constructor_draws_what_nn_linear_draws(scheme):
    torch.manual_seed(3)
    layer = QLinear(70, 33, scheme=scheme)
    torch.manual_seed(3)
    same = QLinear.from_float(nn.Linear(70, 33), scheme)
    assert torch.equal(layer.packed, same.packed)
    assert torch.equal(layer.bias, same.bias)
    assert layer.bias.requires_grad
    assert not layer.packed.requires_grad


def test_reset_parameters_keeps_the_tensors():
    layer = QLinear(70, 33)
    packed, before = layer.packed, layer.packed.clone()
    layer.reset_parameters()
    assert layer.packed is packed
    assert not torch.equal(packed, before)


def test_from_float_keeps_bias_mode_dtype_and_attributes():
    linear = float_layer(dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    linear.is_head = True
    layer = QLinear.from_float(linear)
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.dtype == torch.bfloat16
    assert layer.is_head
    back = layer.dequantize()
    assert back.bias is linear.bias
    assert back.is_head
    assert not back.training
    assert not hasattr(back, "scheme")
    assert back.weight.requires_grad


def test_the_packed_weight_is_the_only_copy(scheme):
    layer = QLinear(256, 64, bias=False, scheme=scheme)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert [t is layer.packed for t in tensors] == [True]
    assert layer.packed.dtype == torch.uint8
    bits = 8 if scheme.format == "int8" else 4
    assert layer.packed.nbytes <= 256 * 64 * bits / 8 * 1.6 + 4096


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 3, 70), (1, 1, 1, 70)])
def test_any_batch_rank(shape, scheme):
    layer = QLinear(70, 33, scheme=scheme)
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 33)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 0), (1, 1), (0, 0)])
def test_any_size(k, n, scheme):
    layer = QLinear(k, n, scheme=scheme)
    y = layer(torch.randn(2, k))
    assert torch.equal(y, layer.bias.expand(2, n)) if k == 0 else y.shape == (2, n)


def test_rows_do_not_depend_on_the_batch(scheme, x):
    layer = QLinear.from_float(float_layer(), scheme)
    whole = layer(x)
    if scheme.activation != "float":
        assert torch.equal(whole, torch.cat([layer(row) for row in x.split(1)]))


def test_gradients_through_the_frozen_weight(scheme, x):
    layer = QLinear.from_float(float_layer(), scheme)
    back = layer.dequantize()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = torch.randn(5, 33)
    layer(a).backward(out)
    bias_grad = layer.bias.grad.clone()
    layer.bias.grad = None
    F.linear(b, back.weight, back.bias).backward(out)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias_grad, back.bias.grad)
    assert layer.packed.grad is None


def test_trains_a_layer_below_and_its_bias(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 70), nn.Tanh(), QLinear(70, 4, scheme=qk.W4A8(32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    packed = model[2].packed.clone()
    target = torch.randn(5, 4)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model[2].packed, packed)


def test_autocast_casts_x(scheme, x):
    layer = QLinear.from_float(float_layer(), scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert error(y, layer(x)) < 0.03


def test_static_scheme_needs_and_keeps_its_range(x):
    scale = float(x.abs().max()) / 127
    scheme = qk.W8A8(static=True)
    layer = QLinear.from_float(float_layer(), scheme, x_scale=scale)
    assert error(layer(x), QLinear.from_float(float_layer())(x)) < 0.02
    assert layer.state_dict()["x_scale"].item() == pytest.approx(scale)
    layer.half()
    assert layer.x_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.float16
    assert layer(x.half()).dtype == torch.float16
    asymmetric = qk.W8A8(static=True, activation="asymmetric")
    shifted = QLinear.from_float(float_layer(), asymmetric, x_scale=scale, x_zero_point=-20)
    assert shifted.x_zero_point.dtype == torch.int8
    assert error(shifted(x[:1] * 0.5), shifted.dequantize()(x[:1] * 0.5)) < 0.05
    with pytest.raises(ValueError, match="needs x_scale"):
        QLinear.from_float(float_layer(), scheme)
    with pytest.raises(ValueError, match="does not take x_scale"):
        QLinear.from_float(float_layer(), qk.W8A8(), x_scale=1.0)
    with pytest.raises(RuntimeError, match="x_scale"):
        QLinear(70, 33, scheme=scheme)(x)


def test_made_in_inference_mode_trains_outside(x):
    with torch.inference_mode():
        layer = QLinear.from_float(float_layer())
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.state_dict()["weight"].shape == (33, 70)


def test_hooks_are_carried_in_order():
    linear = float_layer()
    calls = []
    linear.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    linear.register_forward_pre_hook(
        lambda m, a, k: calls.append("pre with kwargs"), with_kwargs=True
    )
    linear.register_forward_hook(lambda m, a, y: y * 2)
    linear.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    layer = QLinear.from_float(linear)
    x = torch.randn(2, 70, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, QLinear.from_float(float_layer())(x) * 2)
    y.sum().backward()
    assert calls == ["pre", "pre with kwargs", "backward"]
    # Two live layers: a hook that is added to one is not added to the other.
    layer.register_forward_hook(lambda m, a, y: y)
    assert len(linear._forward_hooks) == 1


def test_repr_says_what_runs(scheme):
    text = repr(QLinear(70, 33, scheme=scheme))
    assert f"scheme={scheme}" in text
    assert "kernel=matmul_" in text
    assert "kernel=none on meta" in repr(QLinear(70, 33, scheme=scheme, device="meta"))


def test_weight_is_not_there_and_says_why():
    layer = QLinear(70, 33)
    layer.qualified_name = "encoder.3"
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"QLinear 'encoder.3' .*dequantize.*ignore"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


def test_errors_name_the_layer():
    layer = QLinear(70, 33)
    layer.qualified_name = "encoder.3"
    with pytest.raises(RuntimeError, match=r"^QLinear 'encoder.3': qkernels::linear.*69.*70"):
        layer(torch.randn(2, 69))
    with pytest.raises(RuntimeError, match="int64"):
        layer(torch.arange(70))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: QLinear(4, 4, scheme="W8A8"), TypeError, ["'W8A8'", "qk.W8A8()"]),
        (lambda: QLinear(4, 4, dtype=torch.int8), TypeError, ["torch.int8"]),
        (lambda: QLinear(131_072, 1, device="meta"), ValueError, ["131072", "131071"]),
        (lambda: QLinear.from_float(nn.Identity()), TypeError, ["Identity", "nn.Linear"]),
        (lambda: QLinear.from_float(Doubled(3, 3)), TypeError, ["Doubled", "forward"]),
        (lambda: QLinear.from_float(nn.Linear(3, 3, device="meta")), ValueError, ["meta"]),
        (lambda: QLinear.from_float(nn.Linear(3, 3, dtype=torch.cfloat)), ValueError, ["complex"]),
        (lambda: QLinear.from_float(nn.LazyLinear(3)), ValueError, ["lazy"]),
        (
            lambda: QLinear.from_float(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
            ValueError,
            ["parametrization"],
        ),
    ],
)
def test_refusals_are_sentences(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_long_rows_are_fine_in_groups_or_with_float_activations():
    QLinear(131_072, 1, scheme=qk.W8A16(), device="meta")
    QLinear(131_072, 1, scheme=qk.W4A8(), device="meta")
    QLinear(131_071, 1, scheme=qk.W8A8(), device="meta")


def test_nan_weights_are_refused():
    linear = float_layer()
    with torch.no_grad():
        linear.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        QLinear.from_float(linear)


def test_a_subclass_without_a_forward_converts_by_hand():
    assert QLinear.from_float(Plain(3, 3)).in_features == 3


def test_the_limit_is_the_op_s_limit():
    layer = QLinear(131_072, 1, scheme=qk.W8A16(), bias=False)
    with pytest.raises(RuntimeError, match="131071"):
        qk.functional.linear(
            torch.zeros(1, 131_072),
            layer.packed,
            layout=layer.layout,
            in_features=131_072,
            out_features=1,
            activation="symmetric",
        )
