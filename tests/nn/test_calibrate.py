"""calibrate: what is seen, how models are run, what results say; and static layers made from it."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import qkernels as qk
from helpers import reference as ref
from qkernels.calibration import OBSERVERS, Calibration
from qkernels.nn import QLinear


def batches(count=3, shape=(5, 70), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + i) for i in range(count)]


def sqnr(got, expected):
    return float(20 * torch.log10(expected.norm() / (got - expected).norm()))


def check(tensor, values, channels=None, chosen=True):
    """A TensorRange against the values [channels, n] that it is about."""
    assert tensor.count == values.size
    assert tensor.nonfinite == 0
    assert (tensor.min, tensor.max) == (values.min(), values.max())
    assert tensor.channel_amax == tuple(np.abs(values).max(1))
    for symmetric in (True, False):
        scale, zero = ref.choose(values.reshape(1, -1), ref.INT8, symmetric, torch.float32)
        of = tensor.symmetric if symmetric else tensor.asymmetric
        assert (of.scale, of.zero_point) == (scale[0], zero[0])


def test_ranges_are_those_of_inputs_and_outputs(mlp):
    model, data = mlp(), batches()
    calibration = qk.calibrate(model, data, "minmax")
    assert [layer.name for layer in calibration] == ["0", "2"]
    assert (calibration.model, calibration.observer, calibration.batches) == (
        "Sequential",
        "minmax",
        3,
    )
    x = torch.cat(data)
    with torch.no_grad():
        # Batch by batch: other shapes may round otherwise.
        first = torch.cat([model[0](part) for part in data])
        second = torch.cat([model(part) for part in data])
    check(calibration.input("0"), x.numpy().T)
    check(calibration.output("0"), first.numpy().T)
    check(calibration.input("2"), first.relu().numpy().T)
    check(calibration.output("2"), second.numpy().T)
    assert calibration["2"].calls == 3
    assert calibration.input("2").asymmetric.zero_point == -128
    assert not calibration.suspicious


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (6,)),
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Conv1d(6, 4, 3), (2, 6, 9)),
        (nn.Conv1d(6, 4, 3), (6, 9)),
        (nn.Conv2d(6, 4, 3), (2, 6, 9, 5)),
        (nn.Conv3d(6, 4, 1), (2, 6, 2, 3, 4)),
        (nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 4)),
    ],
)
def test_channels_of_every_layer(layer, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        y = layer(x)
    calibration = qk.calibrate(layer, [x], "minmax")
    axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
    check(calibration.input(""), x.movedim(axis, 0).reshape(6, -1).numpy())
    check(calibration.output(""), y.movedim(axis, 0).reshape(4, -1).numpy())


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_gives_its_own_range(name, mlp):
    data = batches()
    calibration = qk.calibrate(mlp(), data, name)
    observer = OBSERVERS[name]()
    for x in data:
        observer.observe(x)
    for symmetric in (True, False):
        tensor = calibration.input("0")
        chosen = tensor.symmetric if symmetric else tensor.asymmetric
        assert (chosen.min, chosen.max) == observer.range(symmetric)
        ends = np.array([[chosen.min, chosen.max]], np.float32)
        scale, zero = ref.choose(ends, ref.INT8, symmetric, torch.float32)
        assert (chosen.scale, chosen.zero_point) == (scale[0], zero[0])


def test_an_observer_may_be_made_by_the_user(mlp):
    class Fixed:
        def observe(self, x):
            assert x.isfinite().all()

        def range(self, symmetric=True):
            return (-2.0, 2.0) if symmetric else (-1.0, 3.0)

        def __repr__(self):
            return "Fixed()"

    calibration = qk.calibrate(mlp(), batches(), Fixed)
    assert calibration.observer == "Fixed()"
    assert calibration.input("0").symmetric.scale == np.float32(2) / np.float32(127)
    assert calibration.input("0").asymmetric.max == 3.0
    percentile = qk.calibrate(mlp(), batches(), lambda: qk.calibration.PercentileObserver(90))
    assert percentile.observer == "PercentileObserver(90)"
    assert percentile.input("0").symmetric.max < 0.9 * percentile.input("0").max


# ---- running the model --------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return self.linear(x * scale)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("batch", "forward", "factor"),
    [
        (X, None, 1),
        ((X, torch.tensor(2.0)), None, 2),
        ([X], None, 1),
        ((X, 3.0, "a label"), None, 3),
        ({"x": X, "scale": 2.0, "labels": 7}, None, 2),
        ({"pixels": X}, lambda model, batch: model(batch["pixels"], 4.0), 4),
    ],
)
def test_batches_of_every_kind(batch, forward, factor):
    calibration = qk.calibrate(TwoInputs(), [batch], "minmax", forward=forward)
    assert calibration.input("linear").max == float((X * factor).max())


def test_an_iterator_is_read_once(mlp):
    assert qk.calibrate(mlp(), iter(batches(4))).batches == 4


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.9)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        x = self.linear(self.drop(x))
        if x.shape[0] == 1:
            raise RuntimeError("one row")
        return x


@pytest.mark.parametrize("rows", [1, 2])
def test_the_model_is_as_before(rows):
    model = Fails().train()
    model.linear.eval()
    before = copy.deepcopy(model.state_dict())
    torch.backends.mha.set_fastpath_enabled(True)
    x = torch.ones(rows, 4)
    if rows == 1:
        with pytest.raises(RuntimeError, match="one row"):
            qk.calibrate(model, [x])
    else:
        calibration = qk.calibrate(model, [x])
        assert calibration.input("linear").max == 1.0  # no dropout
    assert model.training
    assert model.drop.training
    assert not model.linear.training
    assert not model.linear._forward_hooks
    assert not model.linear._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_inputs_are_seen_before_the_layer_changes_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    calibration = qk.calibrate(model, [X], "minmax", modules="1")
    assert calibration.input("1").min == model[0](X).min().item() < 0
    assert calibration.output("1").min == 0.0


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("padded", [False, True])
def test_the_linears_of_torchs_encoder_run(padded):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    batch = {"src": torch.randn(2, 5, 16)}
    if padded:
        batch["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    calibration = qk.calibrate(model, [batch])
    ran = {layer.name for layer in calibration if layer.calls}
    attention = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    assert ran == {f"layers.{i}.{x}" for i in (0, 1) for x in ("linear1", "linear2", *attention)}


def test_modules_are_chosen_by_pattern():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1))
    )
    found = {
        pattern: [layer.name for layer in qk.calibrate(model, [X], modules=pattern)]
        for pattern in ("2", "*", "1")
    }
    assert found == {"2": ["2.0", "2.1"], "*": ["0", "1", "2.0", "2.1"], "1": ["1", "2.1"]}
    calibration = qk.calibrate(model, [X], "minmax", modules=["2.1", "2.0"])
    assert [layer.name for layer in calibration] == ["2.0", "2.1"]
    assert calibration.output("2.1").channel_amax is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(mlp, dtype):
    data = [x.to(dtype) for x in batches()]
    calibration = qk.calibrate(mlp().to(dtype), data, "minmax")
    assert calibration.input("0").max == max(float(x.float().max()) for x in data)


def test_progress_goes_to_stderr_when_wanted(mlp, capfd):
    qk.calibrate(mlp(), batches(), progress=True)
    out, err = capfd.readouterr()
    assert "Calibrating" in err
    assert not out
    qk.calibrate(mlp(), batches())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("make", "arguments", "error", "words"),
    [
        (lambda: "model", {}, TypeError, "model is str"),
        (lambda: nn.ReLU(), {}, ValueError, "holds no Linear or convolution"),
        (lambda: nn.Sequential(QLinear(4, 4)), {}, ValueError, "quantized already"),
        (TwoInputs, {"batches": []}, ValueError, "batches is empty"),
        (TwoInputs, {"batches": X}, TypeError, "pass [batch]"),
        (TwoInputs, {"batches": [3]}, TypeError, "forward=lambda model, batch"),
        (TwoInputs, {"batches": [{"y": X}]}, ValueError, "calibrate: no key"),
        (TwoInputs, {"observer": "kl"}, ValueError, "'minmax', 'moving_average'"),
        (TwoInputs, {"observer": 3}, TypeError, "'minmax'"),
        (TwoInputs, {"observer": lambda: 3}, TypeError, "makes a new observer"),
        (TwoInputs, {"modules": "liner"}, ValueError, "near it are 'linear'"),
        (TwoInputs, {"modules": [3]}, TypeError, "patterns"),
        (TwoInputs, {"forward": lambda model, batch: None}, ValueError, "none of the 1"),
        (TwoInputs, {"forward": 3}, TypeError, "forward is 3"),
        (lambda: torch.compile(TwoInputs()), {}, ValueError, "compiled"),
    ],
)
def test_refusals(make, arguments, error, words):
    with pytest.raises(error, match="calibrate: ") as caught:
        qk.calibrate(make(), **{"batches": [X], **arguments})
    assert words in str(caught.value), str(caught.value)


# ---- what is suspicious -------------------------------------------------------------------------


class Odd(nn.Module):
    """Three layers: one gets what is given, one a constant, one nothing at all."""

    def __init__(self):
        super().__init__()
        self.first, self.constant, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.first(x) + self.constant(torch.full_like(x, 2.0))


def test_nan_nothing_and_constants_are_said_in_the_result_and_when_used():
    bad = X.clone()
    bad[0, 1], bad[1, 2], bad[2, 2] = torch.nan, torch.inf, -torch.inf
    model = Odd()
    with pytest.warns(UserWarning, match="1 of 3 layers saw NaN or Inf.*: first"):
        calibration = qk.calibrate(model, [X, bad], "minmax")
    first = calibration.input("first")
    assert (first.count, first.nonfinite) == (24, 3)
    assert first.max == max(float(X.max()), float(bad[bad.isfinite()].max()))
    assert first.channel_amax == tuple(
        torch.cat([X, bad.nan_to_num(0, 0, 0)]).abs().amax(0).tolist()
    )
    notes = {layer.name: layer.note for layer in calibration.suspicious}
    assert notes["first"].startswith("input saw 3 of 24 NaN or Inf")
    assert notes["constant"] == "input saw a constant, 2"
    assert notes["never"] == "never ran"
    text = str(calibration)
    assert all(note in text for note in notes.values())

    scheme = qk.W8A8(static=True)
    with pytest.raises(ValueError, match="never: .*in calibration it never ran.*ignore"):
        qk.quantize_(model, scheme, calibration=calibration)
    summary = qk.quantize_(model, scheme, ignore="never", calibration=calibration)
    rows = {row.name: row for row in summary}
    assert rows["first"].note == "in calibration its input saw 3 of 24 NaN or Inf"
    assert rows["constant"].note == "in calibration its input saw a constant, 2"
    assert model.constant.x_scale == np.float32(2) / np.float32(127)


def test_nothing_but_nan_and_no_values_at_all():
    class Empties(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty, self.broken = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.empty(x[:0]), self.broken(x * torch.nan)

    model = Empties()
    with pytest.warns(UserWarning, match="broken"):
        calibration = qk.calibrate(model, [X])
    assert calibration["empty"].note == "input saw nothing; output saw nothing"
    assert "input saw only NaN or Inf" in calibration["broken"].note
    assert calibration.input("broken").symmetric is None
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    str(calibration)
    with pytest.raises(ValueError, match="2 layers.*empty: .*its input saw nothing.*broken: "):
        qk.quantize_(model, qk.W8A8(static=True), calibration=calibration)
    assert isinstance(model.empty, nn.Linear)


# ---- the result ---------------------------------------------------------------------------------


@pytest.fixture
def calibration(mlp):
    return qk.calibrate(mlp(), batches())


def test_json_and_back(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.save_json(path)
    assert Calibration.load_json(path) == calibration
    assert json.loads(path.read_text())["version"] == 1
    assert hash(calibration) == hash(Calibration.load_json(path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.update(version=2), "version is 2"),
        (lambda d: d.pop("layers"), "layers"),
        (lambda d: d["layers"][0]["input"]["symmetric"].update(scale=0), "no int8 quantizer"),
        (lambda d: d["layers"][0]["input"]["symmetric"].update(scale="nan"), "no int8 quantizer"),
        (lambda d: d["layers"][0]["input"]["asymmetric"].update(zero_point=300), "no int8"),
        (lambda d: d["layers"][0].update(input=None), "not a calibration"),
    ],
)
def test_a_damaged_file_is_refused(calibration, tmp_path, damage, words):
    values = calibration.to_dict()
    damage(values)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"damaged\.json") as caught:
        Calibration.load_json(path)
    assert words in str(caught.value)
    path.write_text(json.dumps(values)[:-5])
    with pytest.raises(ValueError, match=r"damaged\.json"):
        Calibration.load_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.load_json(path)


def test_it_prints(calibration):
    text = str(calibration)
    assert "Sequential calibrated with mse on 3 batches" in text
    assert f"{calibration.input('2').symmetric.scale:.3g}" in text
    out = io.StringIO()
    Console(file=out, width=200).print(calibration)
    assert "calibrated" in out.getvalue()
    named = nn.ModuleDict({"[red]": nn.Linear(4, 4)})
    forward = lambda model, x: model["[red]"](x)  # noqa: E731
    assert "[red]" in str(qk.calibrate(named, [X], forward=forward))


def test_names_that_are_not_there(calibration):
    assert "0" in calibration
    assert "1" not in calibration
    with pytest.raises(KeyError, match="Sequential has no layer '22'; near it are '2'"):
        calibration.input("22")


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_is_a_range(ends):
    with pytest.raises(ValueError, match="not a range of float32 numbers"):
        qk.calibration.Int8Range.of(*ends, symmetric=True)


# ---- static layers ------------------------------------------------------------------------------

STATIC = (
    qk.W8A8(static=True),
    qk.W8A8(static=True, activation="asymmetric"),
    qk.W8A8(static=True, group_size=16),
)


@pytest.mark.parametrize("scheme", STATIC, ids=str)
def test_one_call_makes_static_layers(mlp, scheme, tmp_path):
    model, data = mlp(), batches()
    calibration = qk.calibrate(model, data)
    summary = qk.quantize_(model, scheme, calibration=calibration)
    assert len(summary.converted) == 2
    for name in ("0", "2"):
        of = getattr(calibration.input(name), scheme.activation)
        zero = {"x_zero_point": of.zero_point} if scheme.activation == "asymmetric" else {}
        by_hand = QLinear.from_float(mlp()[int(name)], scheme, x_scale=of.scale, **zero)
        x = torch.randn(4, model[int(name)].in_features)
        assert torch.equal(model[int(name)](x), by_hand(x))
    qk.save_model(model, tmp_path / "static.safetensors")
    loaded = qk.load_model(mlp(), tmp_path / "static.safetensors")
    assert torch.equal(loaded(data[0]), model(data[0]))


def test_layers_with_several_names_and_mixed_schemes():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 4))
    x = torch.randn(6, 8)
    calibration = qk.calibrate(model, [x], "minmax")
    assert calibration["0"].calls == 2
    qk.quantize_(model, {"*": qk.W8A8(static=True), "3": qk.W8A8()}, calibration=calibration)
    assert model[0] is model[2]
    assert model[0].x_scale.item() == calibration.input("0").symmetric.scale
    assert model[3].x_scale is None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, ["pass calibration=qk.calibrate", "2 layers"]),
        ({"calibration": "histogram"}, TypeError, ["calibration is str"]),
        ({"scheme": qk.W8A8()}, ValueError, ["no scheme uses it", "static=True"]),
        ({"only": "0"}, ValueError, ["a layer", "2: ", "no layer of this name", "ignore"]),
    ],
)
def test_what_calibration_lacks_is_said_before_any_change(mlp, arguments, error, words):
    model = mlp()
    arguments = {"scheme": qk.W8A8(static=True), **arguments}
    only = arguments.pop("only", None)
    if "calibration" not in arguments and (only or not arguments["scheme"].static):
        arguments["calibration"] = qk.calibrate(model, batches(), modules=only)
    with pytest.raises(error, match="quantize_") as caught:
        qk.quantize_(model, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(model[0]) is nn.Linear


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, activation="gelu").eval()


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("activation", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)), (64, 64)),
        (encoder, (4, 16, 64)),
    ],
    ids=["mlp", "encoder"],
)
def test_static_is_nearly_as_accurate_as_dynamic(make, shape, name, activation):
    """On Gaussian data, with a quantizer for the tensor instead of one for each row."""
    torch.manual_seed(0)
    reference = make()
    data = [torch.randn(shape) for _ in range(8)]
    x = torch.randn(shape)
    static, dynamic = copy.deepcopy(reference), copy.deepcopy(reference)
    calibration = qk.calibrate(reference, data, name)
    qk.quantize_(static, qk.W8A8(static=True, activation=activation), calibration=calibration)
    qk.quantize_(dynamic, qk.W8A8(activation=activation))
    with torch.no_grad():
        expected = reference(x)
        lost = sqnr(dynamic(x), expected) - sqnr(static(x), expected)
    assert lost < LOSES[name], lost


# In dB. Clipping by entropy pays for fine steps with large values, which SQNR counts squared.
LOSES = {"minmax": 6, "moving_average": 4, "percentile": 4, "mse": 4, "histogram": 9}
