"""quantize_calibrated_ on convolutions, against im2col and GPTQ written out in numpy."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from helpers import data
from helpers import reference as ref
from helpers.gptq import FORMATS, literal
from qkernels.nn.kinds import QUANTIZED
from qkernels.ptq import run
from qkernels.ptq.patches import patches

INT4 = qk.W4A16(group_size=-1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    CONVOLUTIONS = {
        "1d": (nn.Conv1d(6, 4, 3, stride=2, padding=2), (11,)),
        "2d": (nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0)), (7, 6)),
        "3d": (nn.Conv3d(2, 3, 2, padding=1, dilation=(1, 2, 1)), (4, 5, 3)),
        "groups": (nn.Conv2d(6, 9, 3, groups=3, dilation=2), (8, 7)),
        "depthwise": (nn.Conv2d(5, 10, 3, padding=1, groups=5), (5, 5)),
        "same": (nn.Conv2d(3, 4, (2, 4), padding="same"), (5, 6)),
        "valid": (nn.Conv2d(3, 4, 1, padding="valid"), (2, 3)),
        "reflect": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (5, 6)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 3)),
        "transposed groups": (nn.ConvTranspose1d(6, 4, 4, stride=3, groups=2, dilation=2), (5,)),
        "transposed, cut off": (nn.ConvTranspose2d(3, 4, 2, padding=2), (6, 5)),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_matrix_are_the_convolution(name, batch):
    conv, size = CONVOLUTIONS[name]
    shape = (conv.in_channels, *size)
    x = data.floats(shape if batch is None else (batch, *shape)).double()
    conv = copy.deepcopy(conv).double()
    matrix = QUANTIZED[type(conv)].matrix_of(conv).unflatten(0, (conv.groups, -1))
    images = [(rows @ matrix.mT).mT.flatten(0, 1) for rows in patches(conv, x)]
    assert len(images) == (batch or 1)
    y = conv(x).reshape(len(images), conv.out_channels, -1)
    torch.testing.assert_close(torch.stack(images) + conv.bias[:, None], y)


class Branches(nn.Module):
    """Two convolutions of the same input with other kernels, and what comes of both."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.narrow = nn.Conv2d(6, 8, 1, stride=2)
        self.last = nn.Conv2d(8, 5, (2, 3), dilation=(2, 1), bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.wide(x) + self.narrow(x))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


def branches():
    torch.manual_seed(0)
    return Branches().eval()


def images(count=5, size=9):
    mix = data.floats((6, 6), seed="mix")
    blur = torch.ones(6, 1, 3, 3) / 9
    return [
        F.conv2d(
            torch.einsum("bchw,cd->bdhw", data.floats((4, 6, size, size), seed=i), mix),
            blur,
            padding=1,
            groups=6,
        )
        + 0.3
        for i in range(count)
    ]


def im2col(x, conv):
    """Rows [groups][positions, taps × channels] of all images, element by element."""
    x = x.double().numpy()
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    high = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    wide = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    per = x.shape[1] // conv.groups
    return [
        np.array([
            [
                padded[image, channel, i * sh + a * dh, j * sw + b * dw]
                for a in range(kh) for b in range(kw)
                for channel in range(g * per, (g + 1) * per)
            ]
            for image, i, j in itertools.product(range(len(x)), range(high), range(wide))
        ])
        for g in range(conv.groups)
    ]  # fmt: skip


def matrix_rows(conv, group):
    """The rows of a group of output channels, channels of a tap side by side."""
    weight = conv.weight.detach().double().numpy()
    per = len(weight) // conv.groups
    return weight[group * per : (group + 1) * per].transpose(0, 2, 3, 1).reshape(per, -1)


@pytest.mark.parametrize(
    "scheme",
    [INT4, qk.W8A8(), qk.W4A16(group_size=10, symmetric=True), qk.NF4(group_size=-1)],
    ids=str,
)
@pytest.mark.parametrize("act_order", ["none", "static"])
def test_gptq_of_every_group_against_the_literal_algorithm(scheme, act_order):
    model, batches = branches(), images()
    old = copy.deepcopy(model)
    qk.quantize_calibrated_(
        model, batches, scheme, optimize="minmax", act_order=act_order, ignore="head"
    )
    x = torch.cat(batches[:-1])
    with torch.no_grad():
        between = F.relu(model.wide(x) + model.narrow(x))
    same, total = 0, 0
    for name, seen in (("wide", x), ("narrow", x), ("last", between)):
        conv, got = getattr(old, name), getattr(model, name).quantized_weight()
        expected = []
        for g, rows in enumerate(im2col(seen, conv)):
            weight = torch.from_numpy(matrix_rows(conv, g))
            moments = torch.from_numpy(rows.T @ rows / len(rows))
            codes, order = literal(weight, moments, scheme, act_order)
            assert np.array_equal(order, np.arange(len(order)))
            expected.append(codes)
        codes = ref.unstore(got.data.numpy(), FORMATS[scheme.format], got.shape[1])
        same += (codes == np.concatenate(expected)).sum()
        total += codes.size
    # Float32 may take a tie differently, and what follows in that row with it.
    assert same > 0.97 * total


@pytest.mark.parametrize("scheme", [INT4, qk.W4A16(group_size=16), qk.W8A8()], ids=str)
@pytest.mark.parametrize("method", ["gptq", ("bias_correction", "gptq")])
def test_every_layer_beats_rounding_to_nearest(scheme, method):
    model = branches()
    summary = qk.quantize_calibrated_(model, images(12), scheme, method)
    assert [row.name for row in summary.converted] == ["wide", "narrow", "last", "head"]
    for row in summary.converted:
        assert row.sqnr > row.sqnr_nearest, str(summary)
    nearest, reference = branches(), branches()
    qk.quantize_(nearest, scheme)
    x = torch.cat(images(12)[-1:])
    with torch.no_grad():
        error, before = ((m(x) - reference(x)).norm() for m in (model, nearest))
    assert error < before


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ["1d", "3d", "depthwise", "same", "transposed groups"])
def test_other_convolutions_beat_rounding_to_nearest(name):
    conv, size = CONVOLUTIONS[name]
    mix = data.floats((conv.in_channels, conv.in_channels), seed="mix")
    batches = [
        torch.einsum("bc...,cd->bd...", data.floats((8, conv.in_channels, *size), seed=i), mix)
        for i in range(10)
    ]
    model = nn.Sequential(copy.deepcopy(conv))
    (row,) = qk.quantize_calibrated_(model, batches, INT4).converted
    assert row.sqnr > row.sqnr_nearest


def test_bias_correction_is_the_lost_mean():
    model, batches = branches(), images()
    conv, before = copy.deepcopy(model.wide), model.wide.bias.detach().double().numpy().copy()
    qk.quantize_calibrated_(model, batches, INT4, "bias_correction", optimize="minmax")
    stored = model.wide.float_weight(torch.float64).numpy()
    for g, rows in enumerate(im2col(torch.cat(batches[:-1]), conv)):
        some = slice(4 * g, 4 * g + 4)
        lost = (matrix_rows(conv, g) - stored[some]) @ rows.mean(0)
        shift = model.wide.bias.detach().double().numpy()[some] - before[some]
        np.testing.assert_allclose(shift, lost, rtol=1e-4, atol=1e-7)
    assert model.last.bias is None


def test_permuted_groups_stay_where_they_are():
    results = []
    for act_order in ("static", "permute"):
        model = branches()
        scheme = qk.W4A16(group_size=8)
        qk.quantize_calibrated_(model, images(), scheme, act_order=act_order, ignore="head")
        results.append(model.last.packed)
    assert torch.equal(*results)


def test_scaling_is_for_linear_layers_only():
    model = branches()
    summary = qk.quantize_calibrated_(model, images(), INT4, ("awq", "gptq"))
    found = {row.name: row for row in summary}
    assert found["wide"].note == "without awq, which only Linear layers can have"
    assert found["head"].note == ""
    assert model.head.x_premul is not None
    plain = branches()
    qk.quantize_calibrated_(plain, images(), INT4, "gptq")
    assert torch.equal(model.last.packed, plain.last.packed)

    model = nn.Sequential(nn.Conv2d(6, 4, 3))
    with pytest.raises(ValueError, match="'smoothquant', but all layers .* are convolutions"):
        qk.quantize_calibrated_(model, images(), qk.W8A8(), "smoothquant")
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("activation", ["symmetric", "asymmetric"])
def test_static_inputs_keep_their_calibrated_ranges(activation, tmp_path):
    scheme = qk.W8A8(static=True, activation=activation)
    calibration = qk.calibrate(branches(), images(), "minmax")
    model, plain = branches(), branches()
    summary = qk.quantize_calibrated_(
        model, images(), scheme, calibration=calibration, checkpoint=tmp_path
    )
    qk.quantize_(plain, scheme, calibration=calibration)
    assert len(summary.converted) == 4
    for name in ("wide", "narrow", "last", "head"):
        layer, other = model.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(layer.x_scale, other.x_scale)
        assert layer.x_zero_point is other.x_zero_point is None or torch.equal(
            layer.x_zero_point, other.x_zero_point
        )
    assert not torch.equal(model.wide.packed, plain.wide.packed)
    again = branches()
    qk.quantize_calibrated_(again, images(), scheme, calibration=calibration, checkpoint=tmp_path)
    assert torch.equal(again(images()[0]), model(images()[0]))

    model = branches()
    with pytest.raises(ValueError, match=r"quantize_calibrated_ cannot quantize .* calibration="):
        qk.quantize_calibrated_(model, images(), scheme)
    with pytest.raises(ValueError, match="changes the input of head, but its scheme W8A8"):
        qk.quantize_calibrated_(model, images(), scheme, "smoothquant", calibration=calibration)
    with pytest.raises(ValueError, match="^quantize_calibrated_: calibration is given but no"):
        qk.quantize_calibrated_(model, images(), INT4, calibration=calibration)
    assert type(model.wide) is nn.Conv2d


def test_types_and_hooks_are_kept():
    model = branches().bfloat16()
    calls = []
    model.wide.register_forward_hook(lambda *a: calls.append(1))
    batches = [x.bfloat16() for x in images()]
    qk.quantize_calibrated_(model, batches, INT4)
    assert model.wide.dtype == torch.bfloat16
    calls.clear()
    assert model(batches[0]).dtype == torch.bfloat16
    assert calls == [1]


def test_float64_models():
    single, double = branches(), branches().double()
    rows = qk.quantize_calibrated_(single, images(), INT4)
    wide = qk.quantize_calibrated_(double, [x.double() for x in images()], INT4)
    for row, other in zip(rows.converted, wide.converted, strict=True):
        assert other.sqnr == pytest.approx(row.sqnr, abs=0.1)
    assert double(images()[0].double()).dtype == torch.float64


def test_shared_weights_see_all_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2))
    model[2].weight = model[0].weight
    old = copy.deepcopy(model)
    scheme = qk.W8A16()
    summary = qk.quantize_calibrated_(model, images(), scheme, optimize="minmax", act_order="none")
    assert model[0].packed is model[2].packed
    assert all(row.sqnr is not None for row in summary.converted)
    x = torch.cat(images()[:-1])
    with torch.no_grad():
        inside = F.relu(old[0](x))
    rows = np.concatenate([im2col(x, old[0])[0], im2col(inside, old[2])[0]])
    moments = torch.from_numpy(rows.T @ rows / len(rows))
    codes, _ = literal(torch.from_numpy(matrix_rows(old[0], 0)), moments, scheme, "none")
    assert (model[0].quantized_weight().data.numpy() == codes).mean() > 0.97


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, method = branches(), ("gptq", "bias_correction")
    expected = qk.quantize_calibrated_(whole, images(), INT4, method)
    done, solve = [], run.solve

    def interrupt(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return solve(*args)

    monkeypatch.setattr(run, "solve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_calibrated_(branches(), images(), INT4, method, checkpoint=tmp_path)
    monkeypatch.setattr(run, "solve", lambda *args: done.append(1) or solve(*args))
    model = branches()
    summary = qk.quantize_calibrated_(model, images(), INT4, method, checkpoint=tmp_path)
    assert len(done) == 4
    assert summary == expected
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
