"""What a search promises beside one scheme for all layers, with times that are made up."""

import copy
import random

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import timing
from qkernels.mixed import measure
from qkernels.mixed.choosing import LATENCY_SLACK
from qkernels.timing import Ratio

SCHEMES = (qk.W8A8(), qk.W8A16(), qk.W4A16(group_size=16))


class Deep(nn.Module):
    """Layers of several shapes."""

    def __init__(self):
        super().__init__()
        widths = (16, 32, 16, 48, 16, 32, 24)
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Machine:
    """Made-up times: a time for every layer and scheme, and how far each measurement is off."""

    def __init__(self, monkeypatch, model, seed, *, layers_off, models_off, rounds_off):
        self.draw = random.Random(seed)
        self.layers_off, self.models_off, self.rounds_off = layers_off, models_off, rounds_off
        self.true = {layer: {None: self.draw.uniform(0.8, 1.2)} for layer in model.layers}
        for costs in self.true.values():
            costs.update({repr(s): self.draw.uniform(0.2, 0.9) for s in SCHEMES})
        self.timed = []
        monkeypatch.setattr(measure.Stopwatch, "models", self.models)
        monkeypatch.setattr(measure.Stopwatch, "layer_seconds", self.layer_seconds)
        monkeypatch.setattr(measure.Stopwatch, "compare", self.compare)
        self.names = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}

    def noisy(self, value, off):
        return value * self.draw.uniform(1 - off, 1 + off)

    def seconds(self, pairs):
        schemes = {layer: repr(other.scheme) for layer, other in pairs}
        return 0.5 + sum(costs[schemes.get(layer)] for layer, costs in self.true.items())

    def models(self, contenders, clocked=None):
        off = self.models_off
        return {name: self.noisy(self.seconds(pairs), off) for name, pairs in contenders.items()}

    def layer_seconds(self, contender, layer):
        scheme = None if contender == "float" else contender
        return self.noisy(self.true[self.names[layer]][scheme], self.layers_off)

    def compare(self, model, other):
        ratio = self.seconds(model) / self.seconds(other)
        found = Ratio.of([self.noisy(ratio, self.rounds_off) for _ in range(40)])
        self.timed.append((ratio, found))
        return found


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Deep().eval()


@pytest.fixture(scope="module")
def batches():
    return [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("seed", range(8))
def test_no_worse_than_a_scheme_for_all_layers_of_the_same_latency(
    model, batches, monkeypatch, seed
):
    """Whatever measurements are off by: layers by a fifth, whole models by 3 %, rounds by 5 %."""
    machine = Machine(monkeypatch, model, seed, layers_off=0.2, models_off=0.03, rounds_off=0.05)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    for _, cost in base.uniform:
        machine.timed.clear()
        limit = cost.seconds
        plan = qk.search(
            model, batches, {"seconds": limit}, "accuracy", SCHEMES, measured=base
        )  # fmt: skip
        assert not plan.notes
        assert plan.uniform == base.uniform
        assert plan.measured.seconds <= limit * (1 + LATENCY_SLACK)
        for _, other in plan.uniform:
            if other.seconds <= limit * (1 + LATENCY_SLACK):
                assert plan.measured.quality >= other.quality
        if len(set(plan.schemes.values())) > 1:
            # It took turns with the scheme, and all that it may take is within the tolerance.
            ratio, found = next(
                (r, f) for r, f in machine.timed if f.median * limit == plan.measured.seconds
            )
            assert found.high <= (1 + LATENCY_SLACK) / 1.01
            assert ratio <= 1 + LATENCY_SLACK  # in truth


@pytest.mark.parametrize("seed", range(4))
def test_no_slower_than_a_scheme_for_all_layers_of_the_same_accuracy(
    model, batches, monkeypatch, seed
):
    Machine(monkeypatch, model, seed, layers_off=0.2, models_off=0.03, rounds_off=0.05)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    for _, cost in base.uniform:
        for objective in ("latency", "size"):
            budget = {"sqnr": cost.quality - 1e-6}
            plan = qk.search(model, batches, budget, objective, SCHEMES, measured=base)
            assert plan.measured.quality >= cost.quality - 1e-6
            if objective == "latency":
                assert plan.measured.seconds <= cost.seconds
            else:
                assert plan.measured.bytes <= cost.bytes


def test_room_that_sums_over_layers_do_not_show_is_used(model, batches, monkeypatch):
    """Layers seem to take twice as long as inside a model: sums must not be taken at their word."""
    machine = Machine(monkeypatch, model, 3, layers_off=0.0, models_off=0.0, rounds_off=0.0)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    limit = 0.7 * base.reference.seconds
    expected = qk.search(model, batches, {"seconds": limit}, "accuracy", SCHEMES, measured=base)
    assert 0.9 * limit < expected.measured.seconds <= limit * (1 + LATENCY_SLACK)
    machine.layer_seconds, honest = None, machine.layer_seconds
    monkeypatch.setattr(measure.Stopwatch, "layer_seconds", lambda _, c, n: 2 * honest(c, n))
    doubled = qk.search(model, batches, {"seconds": limit}, "accuracy", SCHEMES)
    assert 0.9 * limit < doubled.measured.seconds <= limit * (1 + LATENCY_SLACK)
    assert doubled.measured.quality >= expected.measured.quality - 1


def test_a_scheme_for_all_layers_is_taken_where_no_mixture_is_shown_to_be_as_fast(
    model, batches, monkeypatch
):
    """Rounds so uneven that nothing can be told: what was measured to keep the limit counts."""
    Machine(monkeypatch, model, 0, layers_off=0.0, models_off=0.0, rounds_off=0.8)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    scheme, cost = base.uniform[0]
    budget = {"seconds": cost.seconds}
    plan = qk.search(model, batches, budget, "accuracy", SCHEMES, measured=base)
    assert set(map(repr, plan.schemes.values())) == {scheme}
    assert plan.measured == cost
    with pytest.raises(ValueError, match="no choice of schemes has at most 0.1 seconds"):
        qk.search(model, batches, {"seconds": 0.1}, "accuracy", SCHEMES, measured=base)


def test_measured_must_be_of_the_same_search(model, batches, monkeypatch):
    Machine(monkeypatch, model, 0, layers_off=0.0, models_off=0.0, rounds_off=0.0)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    other = nn.Sequential(nn.Linear(16, 16)).eval()
    for arguments in (
        (other, batches, {"sqnr": 20}, "size", SCHEMES),
        (model, batches, {"sqnr": 20}, "size", SCHEMES[:2]),
    ):
        with pytest.raises(ValueError, match="measured is the plan of a search with another model"):
            qk.search(*arguments, measured=base)
    for options in ({"keep_float": False}, {"optimize": "mse"}, {"ignore": "layers.0"}):
        with pytest.raises(ValueError, match="measured is the plan of a search with another model"):
            qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES, measured=base, **options)
    with pytest.raises(TypeError, match="measured is dict; expected the plan of an earlier search"):
        qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES, measured={})


def test_a_plan_from_a_file_has_its_measurements(model, batches, monkeypatch):
    Machine(monkeypatch, model, 1, layers_off=0.1, models_off=0.02, rounds_off=0.0)
    base = qk.search(model, batches, {"sqnr": 20}, "size", SCHEMES)
    read = qk.PrecisionPlan.from_dict(base.to_dict())
    budget = {"latency": 0.6}
    plans = [
        qk.search(model, batches, budget, "accuracy", SCHEMES, measured=p) for p in (base, read)
    ]
    assert plans[0].schemes == plans[1].schemes
    made = copy.deepcopy(model)
    qk.quantize_(made, plans[1])


# ---- The stopwatch, with a clock that is made up ------------------------------------------------


class Runner:
    """A model that takes as long as it is told, longer after some, on a machine that slows down."""

    def __init__(self, monkeypatch, seconds, after):
        self.now, self.calls, self.last = 0.0, 0, None
        self.seconds, self.after = seconds, after
        self.standing = None
        monkeypatch.setattr(measure, "clock", lambda: self.now)
        monkeypatch.setattr(timing, "clock", lambda: self.now)
        monkeypatch.setattr(measure, "standing_in", self.standing_in)

    def standing_in(self, pairs):
        runner = self

        class Standing:
            def __enter__(self):
                runner.standing = pairs

            def __exit__(self, *_):
                pass

        return Standing()

    def __call__(self, batch):
        seconds = self.seconds[self.standing] * self.after.get(self.last, 1.0)
        self.last = self.standing
        self.calls += 1
        self.now += seconds * (1 + self.calls / 100)


def test_a_ratio_does_not_depend_on_who_runs_before(monkeypatch):
    """Whoever follows the float model pays for the caches that it emptied."""
    runner = Runner(monkeypatch, {"f": 3.0, "a": 1.0, "b": 1.0, "c": 1.5}, {"f": 1.3})
    watch = measure.Stopwatch(runner, [None], [1.0], seconds=1e9)
    times = watch.models({"f": "f", "a": "a", "b": "b", "c": "c"})
    assert times["a"] == pytest.approx(times["b"], rel=0.04)
    assert times["c"] == pytest.approx(1.5 * times["a"], rel=0.06)
    found = watch.compare("a", "c")
    assert found.median == pytest.approx(1 / 1.5, rel=0.01)
    assert found.low <= found.median <= found.high
    assert found.high - found.low < 0.02


def test_time_is_spent_as_told(monkeypatch):
    runner = Runner(monkeypatch, {"a": 1.0, "b": 1.0}, {})
    measure.Stopwatch(runner, [None], [1.0], seconds=0.0).compare("a", "b")
    assert runner.calls == 2 * (1 + 3)
    runner = Runner(monkeypatch, {"a": 1.0, "b": 1.0}, {})
    measure.Stopwatch(runner, [None], [1.0], seconds=30.0).compare("a", "b")
    assert 20 < runner.calls < 32


def test_ninety_five_intervals_of_a_hundred_hold_the_median():
    draw = random.Random(0)
    for rounds in (25, 60):
        found = [
            Ratio.of([draw.lognormvariate(0, 0.3) for _ in range(rounds)]) for _ in range(2000)
        ]
        inside = sum(f.low <= 1 <= f.high for f in found) / len(found)
        assert 0.93 < inside < 0.98
    assert Ratio.of([2.0]) == Ratio(2.0, 2.0, 2.0)
