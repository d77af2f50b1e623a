"""What compare says about single layers, and the advice that comes of it."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.report import plots
from qkernels.report.advice import advice, error_start_text

INT4, INT8 = qk.W4A16(group_size=16), qk.W8A8()


def network(depth=8, seed=0):
    """Layers that let the signal through, so that each adds about as much to the error."""
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        layer = nn.Linear(64, 64)
        nn.init.orthogonal_(layer.weight)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers).eval()


def batches(count=2):
    return [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def compared(reference, scheme, **options):
    model = copy.deepcopy(reference)
    qk.quantize_(model, scheme)
    return model, qk.compare(model, reference, batches(), **{"latency": False, **options})


@pytest.fixture(scope="module")
def one_bad():
    """int8 everywhere but in one layer, which gets a scale for whole rows at 4 bits."""
    reference = network()
    scheme = {"*": INT8, "=6": qk.W4A8(group_size=64)}
    return (reference, *compared(reference, scheme))


def noise(model, reference, batch):
    with torch.no_grad():
        return np.square(model(batch).double().numpy() - reference(batch).double().numpy()).sum()


def test_shares_are_those_of_models_with_one_quantized_layer(one_bad):
    reference, model, report = one_bad
    first = batches()[0]
    expected = {}
    for name in (layer.name for layer in report.layers):
        alone = copy.deepcopy(reference)
        alone.set_submodule(name, model.get_submodule(name))
        expected[name] = noise(alone, reference, first)
    total = sum(expected.values())
    assert len(expected) == 8
    for layer in report.layers:
        assert layer.share == pytest.approx(expected[layer.name] / total, rel=1e-9)
    assert all("forward" not in m.__dict__ for m in reference.modules())


def test_one_bad_layer_is_named_and_the_advice_helps(one_bad):
    reference, _, report = one_bad
    (sentence,) = report.advice
    assert re.match(r"6 costs \d\d\.\d % of the error: keep it at 8 bits", sentence)
    call = re.search(r"qk\.quantize_\(model, .*\)", sentence)[0]
    better = copy.deepcopy(reference)
    eval(call, {"qk": qk, "model": better})
    assert better[6].scheme == qk.W8A8()
    assert better[0].scheme == INT8
    again = qk.compare(better, reference, batches(), latency=False)
    assert again.sqnr_db > report.sqnr_db + 7  # 80 % of the noise are 7 dB
    assert again.advice == ()


def test_a_good_model_gets_no_advice():
    _, report = compared(network(), qk.W8A16())
    assert report.sqnr_db > 35
    assert report.advice == ()
    assert "What to do" not in str(report)


def test_an_error_from_everywhere_names_no_layer():
    _, report = compared(network(), INT4)
    (sentence,) = report.advice
    assert sentence.startswith("The error comes from many layers")
    assert max(layer.share for layer in report.layers) < 0.5


def test_where_the_error_starts(one_bad):
    _, _, report = one_bad
    assert report.error_starts_at == "6"
    assert "starts at 6" in error_start_text(report)
    assert "starts at 6" in " ".join(str(report).split())


def test_outliers_against_numpy():
    reference = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Conv1d(4, 4, 1)).eval()
    reference[1] = nn.Unflatten(1, (4, 4))
    data = [torch.randn(8, 16) for _ in range(3)]
    for x in data:
        x[:, 5] *= 50
        x[:, 7] = 0
    model = copy.deepcopy(reference)
    qk.quantize_(model, INT8)
    linear, conv = qk.compare(model, reference, data, latency=False).layers
    amax = np.sort(np.concatenate([x.numpy() for x in data]).__abs__().max(0))[1:]
    assert linear.input_outlier == pytest.approx(amax.max() / amax[(len(amax) - 1) // 2])
    assert linear.input_outlier > 20
    weight = reference[0].weight.detach().numpy().astype(np.float64)
    expected = np.abs(weight).max() / np.sqrt(np.square(weight).mean())
    assert linear.weight_outlier == pytest.approx(expected, rel=1e-5)
    assert conv.input_outlier < 20


def test_layers_are_timed_in_both_models():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 8)).eval()
    model = copy.deepcopy(reference)
    qk.quantize_(model, INT8)
    report = qk.compare(model, reference, [torch.randn(64, 64)], latency_budget=0.1)
    for layer in report.layers:
        assert 0 < layer.seconds < 1
        assert 0 < layer.reference_seconds < 1
    assert "→" in str(report)
    without = qk.compare(model, reference, [torch.randn(64, 64)], latency=False)
    assert without.layers[0].seconds is None


def test_shares_within_their_seconds_or_not_at_all(one_bad):
    reference, model, _ = one_bad
    report = qk.compare(model, reference, batches(), latency=False, share_budget=0)
    assert all(layer.share is None for layer in report.layers)
    assert any("share_budget=0 seconds for 8 layers" in note for note in report.notes)


def changed(report, **layers):
    """The report with other values in some layers, by index."""
    rows = list(report.layers)
    for index, values in layers.items():
        i = int(index.removeprefix("at"))
        rows[i] = dataclasses.replace(rows[i], **values)
    return dataclasses.replace(report, layers=tuple(rows))


def test_large_channels_are_blamed_where_they_cost_something(one_bad):
    _, _, report = one_bad
    assert not [s for s in advice(changed(report, at0={"input_outlier": 60.0})) if "channels" in s]
    said = advice(changed(report, at3={"input_outlier": 60.0}))
    assert any("input of 6 has channels up to 60.0×" in s and "smoothquant" in s for s in said)


def test_layers_that_became_slower_are_named():
    _, report = compared(network(2), qk.W8A16(), latency=True, latency_budget=0.05)
    median = report.latency.model.median
    report = changed(
        report, at0={"seconds": 0.6 * median, "reference_seconds": 0.2 * median},
        at1={"seconds": 0.1 * median, "reference_seconds": 0.3 * median},
    )  # fmt: skip
    (sentence,) = advice(report)
    assert sentence.startswith("0 is slower than in float")
    assert "qk.W8A8()" in sentence
    little = changed(report, at0={"seconds": 0.01 * median, "reference_seconds": 0.005 * median})
    assert advice(little) == ()


def test_what_is_float_and_large_is_named():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Embedding(5000, 16), nn.Linear(16, 16)).eval()
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A16(), ignore="0")
    report = qk.compare(model, reference, [torch.randint(5000, (4, 9))], latency=False)
    (sentence,) = report.advice
    assert re.match(r"0 is still float and holds 99.\d % of the bytes", sentence)
    qk.quantize_(model, eval(re.search(r"\{.*\}", sentence)[0]))


def test_nan_is_traced_to_its_layer(one_bad):
    reference, model, _ = one_bad
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[4].bias[0] = torch.nan
    report = qk.compare(broken, reference, batches(), latency=False)
    assert report.advice[0] == "NaN or Inf first come out of 4: leave it float, ignore=['4']."


@pytest.fixture(scope="module")
def planned():
    reference = network(3)
    plan = qk.search(reference, batches(), {"sqnr": 25}, "size", (INT8, INT4), latency_seconds=0.05)
    model = copy.deepcopy(reference)
    qk.quantize_(model, plan)
    return plan, qk.compare(model, reference, batches(), latency_budget=0.05, plan=plan)


def test_the_search_is_shown_everywhere(planned, tmp_path):
    plan, report = planned
    assert "the plan, measured" in str(report)
    report.save_json(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert qk.PrecisionPlan.from_dict(values["plan"]) == plan
    assert values["error_starts_at"] == report.error_starts_at
    assert values["advice"] == list(report.advice)
    assert values["layers"][0]["scheme"] == repr(plan.schemes["0"])
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The search that the model comes from" in page
    assert page.count("<svg") == (6 if plots.available() else 0)
    assert not re.search(r"(?:src|href)=\"(?!#)", page)


def test_the_page_has_the_advice(one_bad, tmp_path):
    _, _, report = one_bad
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>What to do</h2>" in page
    assert "6 costs" in page
    assert "The error starts at 6" in page
