"""GPTQ against a literal, slow version of the paper's algorithm in float64, and hard inputs."""

import numpy as np
import pytest
import torch

import qkernels as qk
from helpers import data
from helpers import reference as ref
from helpers.gptq import FORMATS, literal
from qkernels.optimize import search_scales
from qkernels.ptq.gptq import gptq, inverse_factor

SCHEMES = (
    qk.W8A8(),
    qk.W4A16(group_size=16),
    qk.W4A16(group_size=32, symmetric=True, scale_dtype=torch.float16),
    qk.W4A8(group_size=-1),
    qk.NF4(group_size=24),
)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
each_order = pytest.mark.parametrize("act_order", ["none", "static", "permute"])


def problem(n=12, k=70, rows=300, seed=0):
    """A weight, correlated inputs of different sizes, and their second moments."""
    x = data.floats((rows, k), seed=("x", seed)) @ data.floats((k, k), seed=("mix", seed))
    x *= torch.linspace(0.2, 2, k)[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    weight = data.floats((n, k), seed=("w", seed))
    return weight, x, x.double().T @ x.double() / rows


@each_scheme
@each_order
def test_against_the_literal_algorithm(scheme, act_order):
    weight, _, moments = problem()
    got = gptq(weight, moments, scheme, optimize="minmax", act_order=act_order)
    expected, order = literal(weight, moments, scheme, act_order)
    codes = ref.unstore(got.weight.data.numpy(), FORMATS[scheme.format], 70)
    if act_order == "permute" and scheme.group_size != -1:
        assert np.array_equal(got.k_perm.numpy(), order)
    else:
        assert got.k_perm is None
    # Float32 may take a tie differently, and what follows in that row with it.
    same_rows = (codes == expected).all(1)
    assert same_rows.sum() >= len(same_rows) - 1
    assert (codes == expected).mean() > 0.97


def output_error(q, weight, x, k_perm=None):
    out = q.dequantize().double()
    if k_perm is not None:
        out = torch.empty_like(out).index_copy_(1, k_perm, out)
    return ((out - weight.double()) @ x.double().T).square().mean().item()


@each_scheme
@each_order
@pytest.mark.parametrize("optimize", ["minmax", "mse"])
def test_beats_rounding_to_nearest_on_held_out_inputs(scheme, act_order, optimize):
    weight, x, _ = problem(n=32, rows=2000)
    seen, held_out = x[:1500].double(), x[1500:]
    got = gptq(weight, seen.T @ seen / 1500, scheme, optimize=optimize, act_order=act_order)
    nearest = search_scales(weight, scheme, optimize)
    error = output_error(got.weight, weight, held_out, got.k_perm)
    assert error < 0.7 * output_error(nearest, weight, held_out)


@pytest.mark.parametrize(("k", "group"), [(300, 32), (300, 200), (257, 128), (130, 7), (129, -1)])
@each_order
def test_blocks_give_what_single_columns_give(k, group, act_order, monkeypatch):
    import importlib

    module = importlib.import_module("qkernels.ptq.gptq")
    weight, _, moments = problem(n=5, k=k, rows=900)
    scheme = qk.W4A16(group_size=group)
    got = gptq(weight, moments, scheme, act_order=act_order)
    monkeypatch.setattr(module, "_BLOCK", 1 if group == -1 or act_order == "static" else k)
    one = gptq(weight, moments, scheme, act_order=act_order)
    same = got.weight.data == one.weight.data
    assert same.float().mean() > 0.98


def test_fewer_inputs_than_features():
    weight, x, _ = problem(rows=9)
    moments = x.double().T @ x.double() / 9
    scheme = qk.W4A16(group_size=16)
    got = gptq(weight, moments, scheme, damping=0.0)
    nearest = search_scales(weight, scheme)
    assert output_error(got.weight, weight, x) < 0.5 * output_error(nearest, weight, x)


@each_order
def test_dead_columns_are_rounded_to_nearest(act_order):
    weight, x, _ = problem()
    dead = [3, 17, 69]
    x[:, dead] = 0
    moments = x.double().T @ x.double() / len(x)
    scheme = qk.W8A8()
    got = gptq(weight, moments, scheme, optimize="minmax", act_order=act_order)
    nearest = search_scales(weight, scheme, "minmax")
    assert torch.equal(got.weight.data[:, dead], nearest.data[:, dead])
    assert not torch.equal(got.weight.data, nearest.data)


def test_no_input_at_all_is_rounding_to_nearest():
    weight = data.floats((6, 40))
    scheme = qk.W4A16(group_size=16)
    got = gptq(weight, torch.zeros(40, 40, dtype=torch.float64), scheme)
    assert torch.equal(got.weight.data, search_scales(weight, scheme).data)


@each_scheme
@each_order
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (2, 17), (17, 5)])
def test_tiny_layers(scheme, act_order, n, k):
    weight, _, moments = problem(n, k, rows=40)
    got = gptq(weight, moments, scheme, act_order=act_order)
    qk.functional.pack(got.weight, scheme.layout)
    assert output_error(got.weight, weight, torch.eye(k), got.k_perm) < 0.1


def test_inverse_factor():
    _, _, moments = problem()
    upper = inverse_factor(moments, 0.01).numpy()
    assert np.array_equal(upper, np.triu(upper))
    damped = moments.numpy() + 0.01 * moments.diagonal().mean().item() * np.eye(70)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(70), atol=1e-6)


def test_broken_moments_are_refused():
    moments = torch.full((4, 4), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="gptq: the second moments .* NaN"):
        gptq(torch.zeros(2, 4), moments, qk.W8A8())
