"""Scale search against exhaustive search and a literal solver in numpy, and what it must not do."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from helpers import data
from helpers import reference as ref
from qkernels.optimize import OPTIMIZERS, search, search_scales
from qkernels.optimize.groups import GroupFit
from qkernels.optimize.hqq import solve_zero_point

FORMATS = {"int8": ref.INT8, "int4": ref.INT4, "nf4": ref.NF4}
SCHEMES = (
    qk.W8A8(),
    qk.W8A8(activation="asymmetric", group_size=16),
    qk.W4A16(group_size=16),
    qk.W4A16(group_size=32, symmetric=True, scale_dtype=torch.float16),
    qk.W4A8(group_size=-1),
    qk.NF4(group_size=24),
)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
searched = pytest.mark.parametrize("optimize", OPTIMIZERS[1:])


def group_errors(q, weight, importance=None):
    """Weighted squared error of each group, [N, G], in float64."""
    error = (q.dequantize().double() - weight.double()).square().numpy()
    if importance is not None:
        error = error * importance.double().numpy()
    edges = ref.group_edges(weight.shape[1], q.group_size)
    return np.stack([error[:, a:b].sum(1) for a, b in edges], 1)


def stored(scale, dtype):
    return np.unique(torch.from_numpy(np.float32(scale)).to(dtype).float().numpy())


def exhaustive(group, form, symmetric, dtype, importance, every=1):
    """The smallest error that any stored scale, of either sign, and any zero point gives.

    Zero points are those that are multiples of `every` steps.
    """
    extent = np.abs(group).max()
    scales = stored(np.geomspace(extent / 25, extent * 1.1, 1200), dtype)
    scales = np.concatenate([scales, -scales]) if symmetric and form is not ref.INT8 else scales
    low, high = form.symmetric if symmetric else form.asymmetric
    zeros = range(low * form.steps, high * form.steps + 1, every)
    best = np.inf
    for zero in [form.middle] if symmetric else zeros:
        wide = scales[:, None].astype(np.float32)
        codes = ref.encode(group[None], form, symmetric, wide, np.full_like(wide, zero, np.int64))
        error = ref.decode(codes, form, wide, np.int64(zero)).astype(np.float64) - group
        best = min(best, (error**2 * importance).sum(1).min())
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        qk.W4A16(group_size=32),
        qk.W4A16(group_size=32, symmetric=True),
        qk.NF4(group_size=32),
    ],
    ids=str,
)
def test_mse_is_close_to_the_best_there_is(scheme, weighted):
    weight = data.floats((6, 96), seed="mse")
    importance = data.floats((96,), seed="importance").square() if weighted else None
    q = search_scales(weight, scheme, "mse", importance=importance)
    got = group_errors(q, weight, importance)
    counts = np.ones(96) if importance is None else importance.double().numpy()
    best = np.array(
        [
            [
                exhaustive(
                    row[a:b], FORMATS[scheme.format], scheme.symmetric, scheme.scale_dtype,
                    counts[a:b],
                )
                for a, b in ref.group_edges(96, 32)
            ]
            for row in weight.numpy()
        ]
    )  # fmt: skip
    assert (got >= best * (1 - 1e-4)).all()
    # For all groups together 0.1 dB from the optimum, 0.33 dB where a few columns count for most.
    assert got.sum() < best.sum() * (1.08 if weighted else 1.024)


def test_parts_of_a_code_are_worth_it():
    """Whole codes are some of the stored zero points: the best of them is hardly better."""
    weight = data.floats((8, 64), seed="parts of a code")
    scheme = qk.W4A16(group_size=32)
    got = group_errors(search_scales(weight, scheme, "mse"), weight)
    groups, ones = weight.numpy().reshape(-1, 32), np.ones(32)
    every, whole = (
        np.array(
            [exhaustive(g, ref.INT4, False, scheme.scale_dtype, ones, steps) for g in groups]
        ).reshape(got.shape)
        for steps in (1, ref.INT4.steps)
    )
    assert (got >= every * (1 - 1e-4)).all()
    assert got.sum() < 1.01 * every.sum()
    assert (got <= 1.01 * whole).all()
    assert got.sum() < 0.9 * whole.sum()  # about half a dB


@each_scheme
@searched
def test_codes_are_those_of_the_kernels(scheme, optimize):
    weight = data.awkward((24, 70), seed="codes")
    q = search_scales(weight, scheme, optimize)
    form = FORMATS[scheme.format]
    scale = ref.values(q.scale)
    zero = np.full(scale.shape, form.middle)
    if q.zero_point is not None:
        zero = q.zero_point.numpy().astype(np.int64)
    wide = (ref.spread(part, 70, scheme.group_size) for part in (scale, zero))
    expected = ref.encode(weight.numpy(), form, scheme.symmetric, *wide)
    assert np.array_equal(ref.unstore(q.data.numpy(), form, 70), expected)
    assert q.scale.dtype == scheme.scale_dtype
    assert q.scale.isfinite().all()
    assert (q.scale != 0).all()


@each_scheme
def test_no_group_is_worse_than_with_minmax(scheme):
    weight = data.awkward((24, 70), seed="worse")
    nearest = group_errors(search_scales(weight, scheme, "minmax"), weight)
    found = group_errors(search_scales(weight, scheme, "mse"), weight)
    # Errors are compared in float32, where some of these rows have only subnormal squares.
    assert (found <= nearest * (1 + 1e-5) + 1e-38).all()
    assert found.sum() < nearest.sum()


def shrink(x, beta):
    with np.errstate(divide="ignore"):
        return np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (0.7 - 1) / beta, 0)


def hqq_zero_point(values, scale, zero):
    """The solver of Badri and Shaji (2023) for one group, in float64."""
    best, beta, w = np.inf, 10.0, values / scale
    for _ in range(20):
        q = np.clip(np.rint(w + zero), 0, 15)
        error = w - (q - zero)
        if np.abs(error).mean() >= best:
            break
        best = np.abs(error).mean()
        zero = (q - (w - shrink(error, beta))).mean()
        beta *= 1.01
    return zero


def hqq_scale(values, scale, zero):
    """The same for the scale: least squares of what is left when the sparse part is taken off."""
    best, beta = np.inf, 10.0
    for _ in range(20):
        q = np.clip(np.rint(values / scale + zero), 0, 15) - zero
        error = values - q * scale
        if np.abs(error).mean() >= best:
            break
        best = np.abs(error).mean()
        dense = values - scale * shrink(error / scale, beta)
        scale = (q * dense).sum() / (q * q).sum()
        beta *= 1.01
    return scale


def test_hqq_is_the_solver_of_the_paper():
    weight = data.floats((16, 70), seed="hqq") + 0.3
    scheme = qk.W4A16(group_size=32, scale_dtype=torch.float32)
    start, q = (search_scales(weight, scheme, o) for o in ("minmax", "hqq"))
    fit = GroupFit(weight[:, :64].reshape(16, 2, 32), None, scheme)
    zeros, scales = solve_zero_point(fit).double().numpy(), []
    off_by = []
    for i, g in itertools.product(range(16), range(2)):
        group = weight[i, 32 * g : 32 * g + 32].double().numpy()
        scale, zero = float(start.scale[i, g]), float(start.zero_point[i, g]) / ref.INT4.steps
        expected = hqq_zero_point(group, scale, zero)
        assert zeros[i, g] == pytest.approx(expected, abs=0.02)  # one step of the solver
        stored_zero = np.clip(np.rint(expected * ref.INT4.steps), 0, 15 * ref.INT4.steps)
        off_by.append(abs(int(q.zero_point[i, g]) - stored_zero))
        stored_zero = float(q.zero_point[i, g]) / ref.INT4.steps
        scales.append((float(q.scale[i, g]), hqq_scale(group, scale, stored_zero)))
    # Float32 may stop an iteration earlier or later where two errors are nearly equal.
    off = np.array([abs(got / expected - 1) for got, expected in scales])
    assert (off < 1e-3).mean() > 0.85
    assert off.max() < 0.05
    # And a solution between two steps may be rounded to either.
    assert (np.array(off_by) == 0).mean() > 0.9
    assert max(off_by) <= 1
    assert (zeros != start.zero_point[:, :2].numpy() / ref.INT4.steps).mean() > 0.9


def test_hqq_of_a_symmetric_weight_shrinks_the_mean_error():
    weight = data.floats((64, 128), seed="hqq symmetric")
    for scheme in (qk.W4A16(group_size=32, symmetric=True), qk.NF4(group_size=32)):
        nearest, found = (search_scales(weight, scheme, o) for o in ("minmax", "hqq"))
        assert group_errors(found, weight).sum() < 0.97 * group_errors(nearest, weight).sum()


@searched
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 7), (17, 33)])
def test_any_shape(shape, optimize):
    weight = data.floats(shape)
    for scheme, group in itertools.product((qk.W4A16, qk.W4A8, qk.NF4), (-1, 1, 5, 64)):
        q = search_scales(weight, scheme(group_size=group), optimize)
        packed = qk.functional.pack(q, scheme(group_size=group).layout)
        back = qk.functional.unpack(packed, scheme(group_size=group).layout, *shape, group)
        assert torch.equal(back.data, q.data)
        assert torch.equal(back.scale, q.scale)


@each_scheme
@searched
def test_chunks_do_not_matter(scheme, optimize, monkeypatch):
    weight = data.floats((20, 70), seed="chunks")
    whole = search_scales(weight, scheme, optimize)
    monkeypatch.setattr(search, "_CHUNK", 150)
    parts = search_scales(weight, scheme, optimize)
    assert torch.equal(whole.data, parts.data)
    assert torch.equal(whole.scale, parts.scale)


@each_scheme
@searched
def test_zero_and_broken_groups(scheme, optimize):
    weight = data.floats((4, 70), seed="broken")
    clean = search_scales(weight, scheme, optimize)
    weight[1] = 0
    weight[2, 3] = torch.nan
    q = search_scales(weight, scheme, optimize)
    assert (q.scale[1] == 1).all()
    assert not q.dequantize()[1].any()
    assert q.scale[2, 0].isnan()
    assert torch.equal(q.data[[0, 3]], clean.data[[0, 3]])
    assert torch.equal(q.scale[[0, 3]], clean.scale[[0, 3]])


@each_scheme
@searched
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e38])
def test_any_size_of_weights(scheme, optimize, size):
    weight = data.floats((4, 70)).clamp(-1, 1) * size
    q = search_scales(weight, scheme, optimize)
    assert q.scale.isfinite().all()
    assert (q.scale != 0).all()
    if scheme.scale_dtype != torch.float16:
        nearest = search_scales(weight, scheme, "minmax").dequantize().double()
        error = (q.dequantize().double() - weight.double()).norm()
        assert error <= 1.1 * (nearest - weight.double()).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types(dtype):
    weight = data.floats((8, 64)).to(dtype)
    q, same = (search_scales(w, qk.W4A16(32)) for w in (weight, weight.float()))
    assert torch.equal(q.data, same.data)


@pytest.mark.parametrize(
    "scheme",
    [
        qk.W4A16(group_size=32, symmetric=True),
        qk.W4A8(group_size=32, symmetric=True),
        qk.NF4(group_size=32),
    ],
    ids=str,
)
def test_kernels_take_negative_scales(scheme):
    linear = nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight.copy_(data.floats((40, 96), seed="negative"))
    model = nn.Sequential(linear)
    qk.quantize_(model, scheme, optimize="mse")
    assert (model[0].quantized_weight().scale < 0).any()
    x = data.floats((5, 96), seed="x")
    expected = model[0].dequantize()(x)
    tolerance = 0.01 if scheme.activation != "float" else 1e-5
    assert (model[0](x) - expected).norm() < tolerance * expected.norm()


@searched
def test_quantize_takes_it(optimize):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(40, 24), nn.Linear(24, 40, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(24, 24), head)
    expected = search_scales(head.weight, qk.W4A16(8), optimize)
    qk.quantize_(model, qk.W4A16(8), optimize=optimize)
    assert model[0].packed is model[2].packed
    assert torch.equal(model[2].quantized_weight().data, expected.data)
    assert not torch.equal(expected.data, qk.quantize(embedding.weight, "int4", 8, False).data)


def test_refusals():
    weight = torch.zeros(2, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="quantize_: optimize is 'best'; expected one of 'minmax'"):
        qk.quantize_(model, qk.W8A8(), optimize="best")
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="search_scales: optimize is None"):
        search_scales(weight, qk.W8A8(), None)
    with pytest.raises(ValueError, match="importance has shape .*3.*expected .4,"):
        search_scales(weight, qk.W8A8(), importance=torch.ones(3))
    with pytest.raises(ValueError, match="optimize is 'hqq', which has no use"):
        search_scales(weight, qk.W8A8(), "hqq", importance=torch.ones(4))
    with pytest.raises(ValueError, match="two dimensions"):
        search_scales(torch.zeros(4), qk.W8A8())
    with pytest.raises(TypeError, match="int64"):
        search_scales(torch.zeros(2, 2, dtype=torch.int64), qk.W8A8())
    with pytest.raises(TypeError, match="qk.W4A16"):
        search_scales(weight, "int4")
