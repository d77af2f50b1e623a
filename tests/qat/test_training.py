"""Prepared modules in all kinds of training: gradients, schedules, checkpoints, compile."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from helpers.check import same_tensor
from qkernels.nn import QATLinear

from .conftest import train


def gradients(model, x, target):
    model.zero_grad()
    F.mse_loss(model(x), target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- Gradients -----------------------------------------------------------------------------------


def test_gradients_are_those_of_float_layers_on_the_quantized_values(mlp, scheme, x):
    """Straight through: as if the quantized values were the parameters."""
    if scheme.static:
        return
    model = mlp()
    qk.prepare_qat_(model, scheme)
    layer = model[0]
    weight = layer.fake_weight().detach().requires_grad_()
    values = layer.fake_input(x).detach().requires_grad_()
    x = x.clone().requires_grad_()
    y, want = layer(x), F.linear(values, weight, layer.bias)
    same_tensor(y.detach(), want.detach())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(grad)
    got = layer.weight.grad, layer.bias.grad, x.grad
    layer.bias.grad = None
    want.backward(grad)
    for a, b in zip(got, (weight.grad, layer.bias.grad, values.grad), strict=True):
        same_tensor(a, b)


def test_learned_scales_get_the_gradient_of_lsq(mlp, x):
    """Against the formulas, in float64: a row's scale, 8 bits, g = 1 / sqrt(70 * 127)."""
    model = mlp()
    qk.prepare_qat_(model, qk.W8A16(), learn_scale=True)
    layer = model[0]
    with torch.no_grad():
        layer.weight_scale.mul_(0.6)
    grad = torch.randn(5, 33, generator=torch.Generator().manual_seed(5))
    layer(x).backward(grad)
    w, s = layer.weight.detach().double(), layer.weight_scale.detach().double()
    to_weight = grad.double().T @ x.double()
    v = w / s
    slope = torch.where(v.abs() < 127, v.round() - v, 127 * v.sign())
    want = (to_weight * slope).sum(1, keepdim=True) / (70 * 127) ** 0.5
    torch.testing.assert_close(layer.weight_scale.grad.double(), want, rtol=1e-3, atol=1e-5)
    assert (v.abs() > 127).any()
    torch.testing.assert_close(
        layer.weight.grad.double(), to_weight * (v.abs() < 127), rtol=1e-4, atol=1e-5
    )


def test_learned_scales_and_zero_points_are_trained(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W4A16(16), learn_scale=True)
    before = [p.detach().clone() for p in qk.qat.learned_parameters(model)]
    assert len(before) == 4
    losses = train(model, x, torch.arange(5), steps=20)
    assert losses[-1] < losses[0]
    after = qk.qat.learned_parameters(model)
    changed = [not torch.equal(p, b) for p, b in zip(after, before, strict=True)]
    assert changed[0] and changed[2]


def test_learned_zero_points_are_used_as_stored():
    """They are numbers of codes, stored as eighths; what is out of range is clamped."""
    layer = QATLinear(16, 5, scheme=qk.W4A16(16), learn_scale=True)
    start = layer.quantized_weight().zero_point
    same_tensor(layer.weight_zero_point.detach(), start.float() / 8)
    with torch.no_grad():
        layer.weight_zero_point.copy_(torch.tensor([7.0, 7.3, 7.5625, -3.0, 99.0])[:, None])
    stored = layer.quantized_weight()
    assert stored.zero_point.flatten().tolist() == [56, 58, 60, 0, 120]
    same_tensor(layer.fake_weight().detach(), stored.dequantize())


def test_a_float16_scale_is_used_as_stored(x):
    """And a scale that is too small for its type stays positive."""
    layer = QATLinear(
        70, 4, scheme=qk.W4A16(-1, symmetric=True, scale_dtype=torch.float16), learn_scale=True
    )
    with torch.no_grad():
        layer.weight_scale.copy_(torch.tensor([0.1, 1e-9, -1.0, 1e6])[:, None])
    stored = layer.quantized_weight().scale
    assert stored.dtype == torch.float16
    assert stored.flatten().tolist() == [0.0999755859375, 2.0**-24, 2.0**-24, 65504.0]
    used = layer.fake_weight().detach()
    same_tensor(used, layer.quantized_weight().dequantize())


# ---- State ---------------------------------------------------------------------------------------


def test_float_checkpoints_load_both_ways(mlp, x):
    plain, model = mlp(), mlp()
    qk.prepare_qat_(model, qk.W4A8(16))
    train(model, x, torch.arange(5))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    fresh = mlp()
    qk.prepare_qat_(fresh, qk.W4A8(16))
    fresh.load_state_dict(plain.state_dict())
    same_tensor(fresh(x).detach(), model(x).detach())


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_starts_scales_anew(mlp, x, assign):
    model, other = mlp(), mlp()
    with torch.no_grad():
        other[0].weight.mul_(3)
    scheme = qk.W8A8(static=True, activation="asymmetric", group_size=16)
    qk.prepare_qat_(model, scheme, learn_scale=True)
    model.load_state_dict(other.state_dict(), assign=assign)
    qk.prepare_qat_(other, scheme, learn_scale=True)
    same_tensor(model[0].weight_scale.detach(), other[0].weight_scale.detach())
    same_tensor(model[0].fake_weight().detach(), other[0].fake_weight().detach())


@pytest.mark.parametrize("learn_scale", [False, True])
def test_everything_that_was_learned_is_saved(mlp, scheme, x, learn_scale):
    model = mlp()
    qk.prepare_qat_(model, scheme, learn_scale=learn_scale)
    train(model, x, torch.arange(5))
    fresh = mlp()
    qk.prepare_qat_(fresh, scheme, learn_scale=learn_scale)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_tensor(other.eval()(x).detach(), model.eval()(x).detach())


def test_codes_are_not_taken_for_weights(mlp):
    model, quantized = mlp(), mlp()
    qk.prepare_qat_(model, qk.W8A8())
    qk.quantize_(quantized, qk.W8A8())
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"0\.weight is torch.int8 in the checkpoint: codes"):
        model.load_state_dict(quantized.state_dict(), strict=False)
    same_tensor(model[0].weight.detach(), before)


def test_missing_weights_are_still_told(mlp):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(), learn_scale=True)
    state = mlp().state_dict()
    del state["2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"2.weight\""):
        model.load_state_dict(state)


def test_a_deep_copy_is_independent(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True), learn_scale=True)
    model(x)
    clone = copy.deepcopy(model)
    expected = model.eval()(x).detach()
    train(clone.train(), x, torch.arange(5))
    same_tensor(model(x).detach(), expected)


def test_scales_keep_their_type_when_a_model_is_cast(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True), learn_scale=True)
    model(x).sum().backward()
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight_scale.dtype == model[0].input_range.scale.dtype == torch.float32
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model.double()(x.double()).dtype == torch.float64


# ---- Schedule ------------------------------------------------------------------------------------


def test_enable_and_disable(mlp, x):
    model, plain = mlp(), mlp()
    qk.prepare_qat_(model, qk.W4A8(16))
    quantized = model(x).detach()
    qk.qat.disable(model)
    same_tensor(model(x).detach(), plain(x).detach())
    qk.qat.enable(model)
    same_tensor(model(x).detach(), quantized)
    assert not torch.equal(quantized, plain(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_observed_ranges_are_a_moving_average(mlp, symmetric):
    model = nn.Sequential(mlp()[0])
    activation = "symmetric" if symmetric else "asymmetric"
    qk.prepare_qat_(model, qk.W8A8(static=True, activation=activation))
    batches = [torch.randn(4, 70) * (i + 1) + 0.5 for i in range(5)]
    low, high = 0.0, 0.0
    for i, batch in enumerate(batches):
        model(batch)
        share = 1.0 if i == 0 else 0.01
        low += share * (min(batch.min().item(), 0) - low)
        high += share * (max(batch.max().item(), 0) - high)
    observed = model[0].input_range
    assert observed.x_min.item() == pytest.approx(low, rel=1e-5)
    assert observed.x_max.item() == pytest.approx(high, rel=1e-5)
    scale, zero = observed.stored()
    want = max(-low, high) / 127 if symmetric else (high - low) / 255
    assert scale.item() == pytest.approx(want, rel=1e-5)
    if not symmetric:
        assert zero.item() == round(-128 - low / want)

    before = scale.clone()
    model.eval()(batches[0] * 100)
    qk.qat.freeze_observers(model)
    model.train()(batches[0] * 100)
    assert observed.stored()[0] == before


def test_observers_watch_while_quantization_is_off(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True))
    qk.qat.disable(model)
    model(x)
    qk.qat.enable(model)
    assert model.eval()(x).isfinite().all()


def test_a_broken_batch_shows_and_moves_nothing(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True))
    model(x)
    before = model[0].input_range.stored()[0]
    broken = x.clone()
    broken[2, 3] = torch.inf
    y = model(broken)
    assert y[2].isnan().all()
    assert model[0].input_range.stored()[0] == before


def test_learned_input_scales_are_trained_after_observing(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True, activation="asymmetric"), learn_scale=True)
    train(model, x, torch.arange(5), steps=2)
    model(x)  # what the optimizer did to a scale that is still observed counts for nothing
    observed = model[0].input_range.scale.item()
    low, high = model[0].input_range.x_min, model[0].input_range.x_max
    assert observed == pytest.approx(((high - low) / 255).item(), rel=1e-5)
    qk.qat.freeze_observers(model)
    train(model, x, torch.arange(5), steps=2)
    assert model[0].input_range.scale.item() != observed


def test_schedule(mlp, x):
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True))
    schedule = qk.qat.Schedule(model, start=2, freeze=4)
    seen = []
    for _ in range(6):
        seen.append((model[0].quantizing, model[2].input_range.observing))
        model(x)
        schedule.step()
    assert seen == [(False, True)] * 2 + [(True, True)] * 2 + [(True, False)] * 2
    resumed = mlp()
    qk.prepare_qat_(resumed, qk.W8A8(static=True))
    other = qk.qat.Schedule(resumed, start=2, freeze=4)
    assert not resumed[0].quantizing
    other.load_state_dict(schedule.state_dict())
    assert resumed[0].quantizing and not resumed[0].input_range.observing
    for start, freeze in ((-1, None), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match="Schedule: start is"):
            qk.qat.Schedule(model, start, freeze)


# ---- The world around it -------------------------------------------------------------------------


@pytest.mark.parametrize("learn_scale", [False, True])
def test_compile_without_graph_breaks(mlp, scheme, x, learn_scale):
    model = mlp()
    qk.prepare_qat_(model, scheme, learn_scale=learn_scale)
    model(x)
    qk.qat.freeze_observers(model)
    target = torch.zeros(5, 18)
    want, y = gradients(model, x, target), model(x).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_tensor(compiled(x).detach(), y)
    got = gradients(compiled, x, target)
    for (name, a), b in zip(want.items(), got.values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_compile_while_observing(mlp, x):
    models = [mlp(), mlp()]
    for model in models:
        qk.prepare_qat_(model, qk.W8A8(static=True, activation="asymmetric"))
    torch._dynamo.reset()
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for i in range(3):
        batch = x * (i + 1)
        same_tensor(compiled(batch).detach(), models[1](batch).detach())
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        same_tensor(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(mlp, scheme, x, reentrant):
    models = [mlp(), mlp()]
    for model in models:
        qk.prepare_qat_(model, scheme)
    x = x.clone().requires_grad_()
    for _ in range(2):
        a = models[0](x)
        b = checkpoint(models[1], x, use_reentrant=reentrant)
        same_tensor(a.detach(), b.detach())
        for model, y in zip(models, (a, b), strict=True):
            model.zero_grad()
            y.square().sum().backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            same_tensor(p.grad, q.grad)
    for p, q in zip(models[0].buffers(), models[1].buffers(), strict=True):
        same_tensor(p, q)


def test_autocast(mlp, scheme, x):
    model = mlp()
    qk.prepare_qat_(model, scheme, learn_scale=True)
    wide = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        F.mse_loss(y.float(), torch.zeros_like(wide)).backward()
    assert ((y.float() - wide).norm() / wide.norm()) < 0.03
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype


def test_gradients_may_be_accumulated_while_observing(mlp, x):
    """A second forward pass moves the ranges before the backward pass of the first."""
    model = mlp()
    qk.prepare_qat_(model, qk.W8A8(static=True, activation="asymmetric"), learn_scale=True)
    (model(x).sum() + model(2 * x).sum()).backward()
    assert model[0].input_range.scale.grad.isfinite()


def test_optimizers_made_before_go_on_working(mlp, x):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    qk.prepare_qat_(model, qk.W8A8())
    before = model[0].weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 3, 70)])
def test_any_batch(mlp, scheme, shape):
    model = mlp()
    qk.prepare_qat_(model, scheme)
    model(torch.randn(4, 70))
    y = model(torch.randn(shape))
    assert y.shape == (*shape[:-1], 18)
    y.sum().backward()
