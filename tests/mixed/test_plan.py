"""A precision plan: as a mapping, in files, in print, and as a picture."""

import copy
import json

import pytest
import torch
from torch import nn

import qkernels as qk

SCHEMES = (qk.W8A8(), qk.W4A16(group_size=16))


@pytest.fixture(scope="module")
def model():
    """Names of which one is the last part of another."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return nn.Sequential(nn.Linear(32, 32), inner, nn.Linear(32, 8)).eval()


@pytest.fixture(scope="module")
def plan(model):
    data = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return qk.search(
        model, data, {"sqnr": 24}, "size", SCHEMES, optimize="mse", latency_seconds=0.05
    )


def test_file_and_back(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save_json(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    again = qk.PrecisionPlan.load_json(path)
    assert again == plan
    assert dict(again) == dict(plan)
    assert again.front("size") == plan.front("size")


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("layers"),
        lambda values: values.update(version=99),
        lambda values: values["layers"][0].update(chosen=7),
        lambda values: values["layers"][0]["options"][1].update(scheme={"scheme": "W9"}),
        lambda values: values.update(reference=None),
        lambda values: values["measure"].pop("name"),
    ],
)
def test_damaged_files_are_refused(plan, tmp_path, damage):
    values = plan.to_dict()
    damage(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"plan.json: this is not a precision plan"):
        qk.PrecisionPlan.load_json(path)


def test_names_mean_one_layer_each(plan, model):
    """Pattern "0" would also name "1.0"; the plan must not."""
    wanted = {"0": qk.W4A16(group_size=16), "1.0": None, "1.2": qk.W8A8(), "2": None}
    choice = [
        next(i for i, option in enumerate(layer.options) if option.scheme == wanted[layer.names[0]])
        for layer in plan.layers
    ]
    chosen = plan.choosing(choice, "size", {"sqnr": 1})
    assert dict(chosen) == {"=0": qk.W4A16(group_size=16), "=1.2": qk.W8A8()}
    assert len(chosen) == 2
    assert chosen["=0"] == qk.W4A16(group_size=16)
    assert "=1.0" not in chosen
    made = copy.deepcopy(model)
    qk.quantize_(made, chosen)
    assert {n: getattr(made.get_submodule(n), "scheme", None) for n in wanted} == wanted


def test_quantize_takes_optimize_from_the_plan(plan, model):
    made, plain = copy.deepcopy(model), copy.deepcopy(model)
    qk.quantize_(made, plan)
    qk.quantize_(plain, plan, optimize="minmax")
    four = next(n for n, s in plan.schemes.items() if s == qk.W4A16(group_size=16))
    weight = model.get_submodule(four).weight
    expected = qk.optimize.search_scales(weight, plan.schemes[four], "mse").dequantize()
    assert torch.equal(made.get_submodule(four).dequantize().weight, expected)
    assert not torch.equal(plain.get_submodule(four).dequantize().weight, expected)


def test_goes_wherever_schemes_by_pattern_go(plan, model):
    made = copy.deepcopy(model)
    qk.quantize_calibrated_(made, [torch.randn(16, 32) for _ in range(2)], plan)
    assert {n: getattr(made.get_submodule(n), "scheme", None) for n in plan.schemes} == plan.schemes
    trained = copy.deepcopy(model)
    qk.prepare_qat_(trained, plan)
    qk.convert_(trained)
    assert {n: getattr(trained.get_submodule(n), "scheme", None) for n in plan.schemes} == (
        plan.schemes
    )


def test_print_has_layers_totals_and_the_goal(plan):
    text = str(plan)
    assert "least size with SQNR ≥ 24.0 dB" in text
    for part in ("1.2", "W4A16(group_size=16)", "the plan, predicted", "the plan, measured"):
        assert part in text


def test_replan_needs_no_model(plan):
    small = plan.replan({"sqnr": 10})
    large = plan.replan({"sqnr": 35})
    assert small.measured is None
    assert small.predicted.bytes <= plan.predicted.bytes <= large.predicted.bytes
    assert large.predicted.quality >= 35
    assert "predicted" in str(large)
    assert "measured" not in str(large)
    fastest = plan.replan({"sqnr": 10}, "latency")
    assert fastest.objective == "latency"


def test_the_front_goes_from_the_cheapest_to_the_best(plan):
    with pytest.raises(ValueError, match="expected 'latency' or 'size'"):
        plan.front("accuracy")
    front = plan.front("size")
    assert [c.bytes for c in front] == sorted({c.bytes for c in front})
    assert [c.quality for c in front] == sorted(c.quality for c in front)
    assert front[0].bytes == plan.replan({"sqnr": -100}).predicted.bytes
    assert front[-1].quality == float("inf")  # all float


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written_whole_or_not_at_all(plan, tmp_path, suffix, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / f"front.{suffix}"
    plan.plot(path)
    assert path.stat().st_size > 5000
    before = path.read_bytes()

    def fails(*_, **__):
        raise OSError("full")

    monkeypatch.setattr(figure.Figure, "savefig", fails)
    with pytest.raises(OSError, match="full"):
        plan.plot(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_the_error_says_what_brings_it(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install qkernels\[plot\]"):
        plan.plot(tmp_path / "front.png")
