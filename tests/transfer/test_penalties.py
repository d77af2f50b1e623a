"""Penalties against their formulas in numpy, and their gradients."""

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.transfer import L1, L2, L2SP, GradualUnfreezing, strategy


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def values(model, *names):
    return [model.get_parameter(n).detach().double().numpy() for n in names]


ALL = ("0.weight", "0.bias", "2.weight", "2.bias")


def test_l1(model):
    penalty = L1(model, 0.3)()
    assert penalty.item() == pytest.approx(0.3 * sum(np.abs(v).sum() for v in values(model, *ALL)))
    penalty.backward()
    for name, value in zip(ALL, values(model, *ALL), strict=True):
        np.testing.assert_allclose(model.get_parameter(name).grad, 0.3 * np.sign(value), rtol=1e-6)


def test_l2(model):
    penalty = L2(model, 0.3)()
    assert penalty.item() == pytest.approx(0.15 * sum((v**2).sum() for v in values(model, *ALL)))
    penalty.backward()
    for name, value in zip(ALL, values(model, *ALL), strict=True):
        np.testing.assert_allclose(model.get_parameter(name).grad, 0.3 * value, rtol=1e-6)


def test_only_what_trains_and_is_named_counts(model):
    strategy(model, "head")
    (weight,) = values(model, "2.weight")
    assert L2(model, 2.0, only="*.weight")().item() == pytest.approx((weight**2).sum())
    model.requires_grad_(False)
    assert L1(model, 1.0)().item() == 0 and L2SP(model, 1.0)().item() == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_l2_sp(model, dtype):
    penalty = L2SP(model, alpha=0.4, beta=0.2, new="2", dtype=dtype)
    source = {n: v.copy() for n, v in zip(ALL, values(model, *ALL), strict=True)}
    if dtype is not None:
        source = {
            n: torch.from_numpy(v).float().to(dtype).double().numpy() for n, v in source.items()
        }
    size = 2 if dtype else 4
    assert penalty.nbytes == size * (7 * 5 + 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    now = dict(zip(ALL, values(model, *ALL), strict=True))
    pulled = sum(((now[n] - source[n]) ** 2).sum() for n in ALL[:2])
    fresh = sum((now[n] ** 2).sum() for n in ALL[2:])
    loss = penalty()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.2 * pulled + 0.1 * fresh, rel=1e-6)
    (3 * loss).backward()
    for n in ALL:
        expected = 3 * (0.4 * (now[n] - source[n]) if n in ALL[:2] else 0.2 * now[n])
        np.testing.assert_allclose(model.get_parameter(n).grad, expected, rtol=1e-5, atol=1e-6)


def test_l2_sp_keeps_the_source_of_what_is_thawed_later(model):
    schedule = GradualUnfreezing(model)
    penalty = L2SP(model, alpha=1.0)
    assert penalty.nbytes == 4 * (5 * 3 + 3)
    source = values(model, *ALL)
    schedule.step()
    assert penalty().item() == 0
    with torch.no_grad():
        model[0].weight += 0.5
    assert penalty().item() == pytest.approx(0.5 * 0.25 * 35)
    assert penalty.nbytes == 4 * sum(v.size for v in source)


def test_penalties_on_a_quantized_model(model):
    qk.quantize_(model, qk.W8A8())
    (bias_0, bias_2) = values(model, "0.bias", "2.bias")
    expected = np.abs(bias_0).sum() + np.abs(bias_2).sum()
    assert L1(model, 1.0)().item() == pytest.approx(expected)


def test_penalty_follows_bfloat16_weights(model):
    model = model.bfloat16()
    penalty = L2SP(model, alpha=1.0)
    with torch.no_grad():
        model[0].weight.zero_()
    loss = penalty()
    loss.backward()
    assert loss.dtype == torch.float32 and model[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m: L1(m, -1.0), "L1: strength is -1.0; expected 0 or more"),
        (lambda m: L2(m, float("inf")), "L2: strength is inf"),
        (lambda m: L2SP(m, 1.0, beta=-2), "L2SP: beta is -2"),
        (lambda m: L2SP(m, 1.0, new="hed"), "L2SP: new names 'hed', which matches no"),
        (lambda m: L1(m, 1.0, only="nothing"), "L1: only names 'nothing'"),
    ],
)
def test_bad_penalties(model, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(model)
