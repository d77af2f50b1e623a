"""SmoothQuant's formula and AWQ's grid, written out in numpy."""

import numpy as np
import pytest
import torch

import qkernels as qk
from helpers import data
from helpers import reference as ref
from qkernels.ptq.scaling import awq_factors, smoothquant_factors


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_is_its_formula(alpha):
    weight = data.floats((20, 33), seed="w")
    x_amax = data.floats((33,), seed="x").abs() * 10
    got = smoothquant_factors(weight, x_amax, alpha)
    w, x = weight.double().numpy(), x_amax.double().numpy()
    expected = x**alpha / np.abs(w).max(0) ** (1 - alpha)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_smoothquant_leaves_zeros_alone():
    weight = torch.tensor([[1.0, 0.0, 2.0]])
    assert smoothquant_factors(weight, torch.tensor([0.0, 3.0, 8.0])).tolist() == [1, 1, 2]


def literal_awq(weight, x, size):
    """The grid search of the paper's code on the layer's output, rounding to nearest."""
    w, best, least = weight.numpy(), None, np.inf
    magnitude = np.abs(x).mean(0)
    for i in range(20):
        s = np.maximum(magnitude / magnitude.mean(), 1e-4) ** (i / 20)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        scaled = w * s
        codes = ref.quantize(scaled, ref.INT4, size, False, torch.bfloat16)
        wide = (ref.spread(p, w.shape[1], size) for p in (codes.scale, codes.zero))
        rounded = ref.decode(codes.codes, ref.INT4, *wide) / s
        loss = ((x @ (rounded - w).T.astype(np.float64)) ** 2).mean()
        if loss < least:
            best, least = s, loss
    return best


def test_awq_is_the_grid_of_the_paper():
    weight = data.floats((24, 70), seed="awq")
    x = data.floats((400, 70), seed="x").double() * torch.logspace(-1.5, 1, 70).double()
    moments = x.T @ x / len(x)
    got = awq_factors(weight, x.abs().mean(0), moments, qk.W4A16(group_size=16))
    expected = literal_awq(weight, x.numpy(), 16)
    assert expected.max() > 2 * expected.min()
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_awq_with_a_given_exponent_and_dead_features():
    magnitude = torch.tensor([0.0, 1.0, 4.0])
    got = awq_factors(torch.ones(1, 3), magnitude, torch.empty(0), qk.W4A16(), alpha=0.5)
    np.testing.assert_allclose(got.numpy(), [1, 2**-0.5, 2**0.5], rtol=1e-6)
    none = awq_factors(torch.ones(1, 3), torch.zeros(3), torch.empty(0), qk.W4A16(), alpha=0.5)
    assert none.tolist() == [1, 1, 1]
