"""search: what it measures, what it chooses, and that the model stays as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.mixed import measure
from qkernels.mixed import search as module

SCHEMES = (qk.W8A8(), qk.W4A16(group_size=16))
FAST = {"latency_seconds": 0.02}


class Mixed(nn.Module):
    """All kinds of layers; a head that shares the embedding's weight; one that never runs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.embed.weight
        self.never = nn.Linear(8, 8)

    def forward(self, input_ids):
        x = self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = x + torch.relu(block(self.norm(x)))
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (4, 9 + i // 2), generator=generator) for i in range(4)]


@pytest.fixture(scope="module")
def plan(model, batches):
    return qk.search(model, batches, {"sqnr": 24}, "size", SCHEMES, **FAST)


def answers(model, batches):
    with torch.no_grad():
        return [model(batch).double().numpy() for batch in batches]


def sqnr(model, reference, batches):
    """In numpy, from whole outputs."""
    pairs = list(zip(answers(model, batches), answers(reference, batches), strict=True))
    noise = sum(np.square(out - ref).sum() for out, ref in pairs)
    return 10 * math.log10(sum(np.square(ref).sum() for _, ref in pairs) / noise)


def quantized(model, scheme, **options):
    made = copy.deepcopy(model)
    qk.quantize_(made, scheme, **options)
    return made


def test_damage_is_that_of_a_model_with_one_layer_quantized(model, batches, plan):
    assert [layer.names for layer in plan.layers] == [
        ("embed", "head"), ("conv",), ("blocks.0",), ("blocks.1",), ("blocks.2",),
    ]  # fmt: skip
    for layer in plan.layers:
        as_it_is, *options = layer.options
        assert (as_it_is.scheme, as_it_is.damage) == (None, 0.0)
        for option in options:
            alone = quantized(model, {f"={name}": option.scheme for name in layer.names})
            expected = 10 ** (-sqnr(alone, model, batches) / 10)
            assert option.damage == pytest.approx(expected, rel=1e-9)


def test_the_plan_is_what_quantize_makes_of_it(model, batches, plan):
    made = copy.deepcopy(model)
    summary = qk.quantize_(made, plan)
    found = {n: m.scheme for n, m in made.named_modules(remove_duplicate=False)
             if isinstance(m, qk.nn.QModule)}  # fmt: skip
    assert found == {name: s for name, s in plan.schemes.items() if s is not None}
    assert len(set(found.values())) > 1
    assert made.embed.packed is made.head.packed
    assert summary.bytes_after == plan.measured.bytes == plan.predicted.bytes
    assert plan.measured.quality == pytest.approx(sqnr(made, model, batches), rel=1e-9)
    assert plan.measured.quality >= 24


def test_predicted_and_measured_are_both_there(plan):
    damage = sum(layer.choice.damage for layer in plan.layers)
    assert plan.predicted.quality == pytest.approx(-10 * math.log10(damage))
    assert plan.predicted.quality == pytest.approx(plan.measured.quality, abs=2)
    assert plan.correction == pytest.approx(10 ** (-plan.measured.quality / 10) / damage)


def test_uniform_models_are_measured_too(model, batches, plan):
    for name, cost in plan.uniform:
        scheme = next(scheme for scheme in SCHEMES if repr(scheme) == name)
        made = quantized(model, scheme, ignore="never")
        assert cost.bytes == qk.report.model_bytes(made)
        assert cost.quality == pytest.approx(sqnr(made, model, batches), rel=1e-9)
        assert cost.seconds > 0


def test_the_model_is_not_changed(model, batches):
    before = copy.deepcopy(model.state_dict())
    expected = answers(model, batches)
    model.train()
    model.norm.eval()
    qk.search(model, batches, {"size": 0.4}, "accuracy", SCHEMES, **FAST)
    assert model.training
    assert not model.norm.training
    model.eval()

    def broken(output, batch):
        raise RuntimeError("no metric today")

    with pytest.raises(RuntimeError, match="no metric today"):
        qk.search(model, batches, {"size": 0.4}, "accuracy", SCHEMES, metric=broken, **FAST)
    for m in model.modules():
        assert "forward" not in m.__dict__
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(np.array_equal(a, b) for a, b in zip(answers(model, batches), expected, strict=True))


def test_every_objective_keeps_its_budget(model, batches, plan):
    smallest = min(cost.bytes for _, cost in plan.uniform)
    share = (smallest + plan.reference.bytes) / 2 / plan.reference.bytes
    for objective, budget in (
        ("accuracy", {"size": share}),
        ("accuracy", {"bytes": share * plan.reference.bytes, "latency": 5.0}),
        ("latency", {"sqnr": 26, "size": 0.9}),
        ("size", {"sqnr": 30}),
    ):
        found = qk.search(model, batches, budget, objective, SCHEMES, **FAST)
        cost = found.measured
        assert cost.bytes <= share * plan.reference.bytes or "sqnr" in budget
        assert cost.quality >= budget.get("sqnr", 0)
        assert found.objective == objective


def test_more_accurate_than_every_uniform_scheme_of_its_size(model, batches, plan):
    for _, cost in plan.uniform:
        found = plan.replan({"bytes": cost.bytes}, "accuracy")
        made = quantized(model, found) if len(found) else model
        assert qk.report.model_bytes(made) <= cost.bytes
        assert sqnr(made, model, batches) >= cost.quality


def test_errors_that_do_not_add_up_are_corrected(batches):
    """Two layers whose errors are the same error: amplitudes add, so the noise is twice the sum."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = nn.Parameter(self.a.weight.detach().clone())

        def forward(self, x):
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    model, data = Twice().eval(), [torch.randn(32, 64)]
    scheme = qk.W4A16(group_size=16)
    one = quantized(model, {"=a": scheme})
    alone = sqnr(one, model, data)
    # Both at 4 bits: 3 dB less than one by the sum of powers, 6 dB less in truth.
    found = qk.search(model, data, {"sqnr": alone - 4.5}, "size", (scheme, qk.W8A16()), **FAST)
    assert found.measured.quality >= alone - 4.5
    assert sorted(map(repr, found.schemes.values())) == [repr(scheme), "W8A16()"]
    loose = qk.search(model, data, {"sqnr": alone - 6.5}, "size", (scheme, qk.W8A16()), **FAST)
    assert set(loose.schemes.values()) == {scheme}
    assert loose.predicted.quality == pytest.approx(alone - 3, abs=0.1)
    assert loose.measured.quality == pytest.approx(alone - 6, abs=0.1)
    assert loose.correction == pytest.approx(2, rel=0.02)


def test_time_is_that_of_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 32))
    plan = qk.search(
        model.eval(), [torch.randn(64, 32)], {"sqnr": 20}, schemes=(qk.W8A8(),), latency_seconds=0.2
    )
    small, wide, back = ([o.seconds for o in layer.options] for layer in plan.layers)
    for k in range(2):
        assert 0 < small[k] < wide[k]
        assert small[k] < back[k]
    total = plan.rest_seconds + sum(layer.options[0].seconds for layer in plan.layers)
    assert total == pytest.approx(plan.reference.seconds, rel=0.9)


def test_layers_of_one_shape_have_one_time(plan):
    times = [[o.seconds for o in x.options] for x in plan.layers if x.names[0].startswith("blocks")]
    assert times[0] == times[1] == times[2]


def test_shapes_count_by_how_often_they_come(batches):
    first, shares = measure.by_shape([*batches, batches[0]])
    assert [batch.shape for batch in first] == [(4, 9), (4, 10)]
    assert shares == [3 / 5, 2 / 5]


def test_a_metric_in_place_of_sqnr(model, batches):
    def loss(output, batch):
        return float(nn.functional.cross_entropy(output.flatten(0, 1), batch.flatten()))

    with torch.no_grad():
        base = np.mean([loss(model(batch), batch) for batch in batches])
    found = qk.search(
        model, batches, {"metric": base + 0.5}, "size", SCHEMES,
        metric=loss, lower_is_better=True, **FAST,
    )  # fmt: skip
    assert found.reference.quality == pytest.approx(base)
    assert found.measured.quality <= base + 0.5
    conv = found.layers[1]
    alone = quantized(model, {"=conv": conv.options[2].scheme})
    with torch.no_grad():
        worse = np.mean([loss(alone(batch), batch) for batch in batches]) - base
    assert conv.options[2].damage == pytest.approx(max(worse, 0), abs=1e-6)
    assert "loss" in str(found)


def test_a_scheme_that_answers_nan_is_not_chosen():
    torch.manual_seed(0)

    class Brittle(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("weight", self.linear.weight.detach().clone())

        def forward(self, x):  # NaN as soon as anything is rounded
            y = self.linear(x)
            expected = nn.functional.linear(x, self.weight, self.linear.bias)
            return torch.where(y == expected, y, torch.nan)

    model, data = Brittle().eval(), [torch.randn(4, 16)]
    found = qk.search(model, data, {"sqnr": 1}, "size", (qk.W8A8(),), **FAST)
    assert found.layers[0].options[1].damage == math.inf
    assert len(found) == 0
    assert qk.PrecisionPlan.from_dict(found.to_dict()).to_dict() == found.to_dict()
    assert not qk.quantize_(model, found).converted


def test_never_called_and_ignored_layers_stay(model, batches, plan):
    assert any("never" in note for note in plan.notes)
    assert "never" not in plan.schemes
    found = qk.search(
        model, batches, {"sqnr": 20}, "size", SCHEMES, ignore=("conv", "head"), **FAST
    )
    assert set(found.schemes) == {"blocks.0", "blocks.1", "blocks.2"}


def test_without_float(model, batches):
    found = qk.search(
        model, batches, {"latency": 50}, "accuracy", SCHEMES, keep_float=False, **FAST
    )
    assert None not in found.schemes.values()
    assert all(len(layer.options) == 2 for layer in found.layers)


def test_schemes_that_fit_nothing_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    data = [torch.randn(2, 8, 8, 8)]
    grouped = qk.W4A8(group_size=32)
    found = qk.search(model, data, {"sqnr": 20}, "size", (qk.W8A8(), grouped), **FAST)
    assert any(str(grouped) in note for note in found.notes)
    assert set(found.schemes.values()) == {qk.W8A8()}
    with pytest.raises(ValueError, match=r"fits no layer.*Offer other schemes"):
        qk.search(model, data, {"sqnr": 20}, "size", (grouped,), **FAST)


def test_static_schemes_need_ranges():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(32, 16)]
    static = (qk.W8A8(static=True),)
    with pytest.raises(ValueError, match=r"calibration=qk.calibrate\(model, batches\)"):
        qk.search(model, data, {"sqnr": 20}, "size", static, **FAST)
    calibration = qk.calibrate(model, data, observer="minmax")
    found = qk.search(model, data, {"sqnr": 20}, "size", static, calibration=calibration, **FAST)
    made = copy.deepcopy(model)
    qk.quantize_(made, found, calibration=calibration)
    assert found.measured.quality == pytest.approx(sqnr(made, model, data), rel=1e-9)


def test_a_transformer_of_torch_and_half_precision():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(torch.bfloat16).eval()
    data = [torch.randn(2, 5, 32, dtype=torch.bfloat16)]
    found = qk.search(model, data, {"sqnr": 20}, "size", SCHEMES, **FAST)
    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert {x.names[0].rpartition(".")[2] for x in found.layers} == attention | {
        "linear1",
        "linear2",
    }
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    qk.quantize_(model, found)
    assert all(layer.dtype == "bfloat16" for layer in found.layers)
    assert all(option.damage > 0 for layer in found.layers for option in layer.options[1:])


def test_an_interrupted_search_goes_on(model, batches, tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    original, calls = measure.Answers.damage, []

    def counting(self, pairs):
        calls.append(len(pairs))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pairs)

    monkeypatch.setattr(measure.Answers, "damage", counting)
    arguments = (model, batches, {"sqnr": 24}, "size", SCHEMES)
    with pytest.raises(KeyboardInterrupt):
        qk.search(*arguments, checkpoint=path, **FAST)
    found = qk.search(*arguments, checkpoint=path, **FAST)
    assert len(calls) == 4 + 10 - 3
    assert found.schemes == qk.search(*arguments, **FAST).schemes
    with pytest.raises(ValueError, match="other batches or other settings"):
        qk.search(model, batches[:2], *arguments[2:], checkpoint=path, **FAST)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no state of a search"):
        qk.search(*arguments, checkpoint=path, **FAST)


def test_a_budget_that_nothing_keeps(model, batches, plan):
    with pytest.raises(
        ValueError, match=r"no choice of schemes has size ≤ 0.02.*nearest has .*size"
    ):
        qk.search(model, batches, {"size": 0.02}, "accuracy", SCHEMES, **FAST)
    with pytest.raises(ValueError, match=r"SQNR ≥ 60.0 dB and size ≤ 0.2 .*Raise the budget"):
        plan.replan({"sqnr": 60, "size": 0.2}, "latency")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.6}, r'expected a dict of limits such as \{"latency": 0.6\}'),
        ({"budget": {"speed": 2}}, "names 'speed'; expected 'latency'"),
        ({"budget": {"latency": "fast"}}, "expected a number"),
        ({"budget": {"latency": 0}}, "expected more than 0"),
        ({"budget": {"size": 0.5}}, "limits nothing but the objective, 'size'"),
        ({"budget": {}}, "limits nothing but the objective"),
        ({"budget": {"metric": 1}}, "'metric', which is not measured here; pass metric="),
        ({"metric": len}, "'sqnr', which is not measured here"),
        ({"objective": "speed"}, "objective is 'speed'; expected one of 'latency'"),
        ({"schemes": ()}, r"expected schemes such as \[qk.W8A8"),
        ({"schemes": ("w8a8",)}, r"expected schemes such as \[qk.W8A8"),
        ({"batches": []}, "batches is empty"),
        ({"batches": torch.zeros(2, 3)}, r"pass \[batch\]"),
        ({"latency_batches": []}, "latency_batches is empty"),
        ({"optimize": "best"}, "optimize is 'best'"),
        ({"ignore": "encoder"}, "search: ignore names 'encoder', which matches no module"),
        ({"model": 3}, "search: model is int"),
        ({"checkpoint": "no/such/folder/state.json"}, "folder 'no/such/folder' does not exist"),
    ],
)
def test_what_cannot_be_searched(model, batches, change, message):
    arguments = {"model": model, "batches": batches, "budget": {"sqnr": 20}, "objective": "size",
                 "schemes": SCHEMES, **change}  # fmt: skip
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        qk.search(**arguments, **FAST)


def test_compiled_models_are_refused(model, batches):
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="the model is compiled"):
        qk.search(compiled, batches, {"sqnr": 20}, "size", **FAST)


def test_without_scipy_nothing_is_measured(model, batches, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    monkeypatch.setattr(module, "find_units", lambda *_: pytest.fail("work was started"))
    with pytest.raises(ImportError, match=r"pip install qkernels\[search\]"):
        qk.search(model, batches, {"sqnr": 20}, "size")
