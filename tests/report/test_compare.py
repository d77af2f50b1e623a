"""compare: what it measures, on models whose differences are known."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import qkernels as qk


class Classifier(nn.Module):
    """Executes its layers in another order than it defines them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 5)
        self.norm = nn.LayerNorm(48)
        self.first = nn.Linear(32, 48)
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.first(x))))


class Encoder(nn.Module):
    """A Hugging Face style encoder: keywords in, a mapping out."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(50, 16)
        self.dense = nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.dense(self.embeddings(input_ids))
        return {"loss": torch.tensor(0.0), "last_hidden_state": hidden}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    reference = Classifier()
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A8(), ignore=("head", "never"))
    return model, reference


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 32, generator=generator) for _ in range(count)]


def compare(model, reference, data, **options):
    return qk.compare(model, reference, data, **{"latency": False, **options})


def test_numbers_are_those_of_all_batches_at_once(pair):
    model, reference = pair
    report = compare(model, reference, iter(batches()))
    with torch.no_grad():
        x = torch.cat(batches())
        out, ref = model.eval()(x).double(), reference.eval()(x).double()
    error = out - ref
    assert (report.batches, report.rows, report.predictions) == (3, 24, 24)
    assert report.output == "output"
    assert report.agreement == float((out.argmax(1) == ref.argmax(1)).double().mean())
    cosine = torch.cosine_similarity(out, ref)
    assert report.cosine_mean == pytest.approx(float(cosine.mean()))
    assert report.cosine_min == pytest.approx(float(cosine.min()))
    assert report.sqnr_db == pytest.approx(
        10 * math.log10(float(ref.square().sum() / error.square().sum())), rel=1e-6
    )
    assert report.max_abs_error == pytest.approx(float(error.abs().max()))
    assert report.cosine_mean > 0.999
    assert (report.model, report.reference) == ("W8A8", "float32")


def test_layers_come_in_the_order_of_execution(pair):
    report = compare(*pair, batches())
    assert [layer.name for layer in report.layers] == ["first", "norm", "head", "never"]
    first, norm, head, never = report.layers
    assert (first.quantized, first.kind, norm.quantized) == (True, "QLinear W8A8", False)
    # Nothing comes before the first layer: its error is all its own.
    assert first.own_sqnr_db == pytest.approx(first.sqnr_db)
    assert first.calls == 3
    assert 20 < first.sqnr_db < 60
    # A float layer has no error of its own, but inherits.
    assert head.own_sqnr_db is None
    assert 20 < head.sqnr_db < 60
    assert report.sqnr_db == pytest.approx(head.sqnr_db)
    assert (never.calls, never.sqnr_db) == (0, None)
    assert any("never" in note for note in report.notes)
    assert first.reference_bytes == 48 * 33 * 4
    assert first.bytes == pair[0].first.packed.nbytes + 48 * 4
    assert report.bytes == qk.report.model_bytes(pair[0])


def test_own_error_is_separate_from_inherited_error():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = copy.deepcopy(reference)
    qk.quantize_(model, {"0": qk.W4A16(group_size=64), "1": qk.W8A16()})
    report = compare(model, reference, [torch.randn(32, 64)])
    coarse, fine = report.layers
    assert fine.own_sqnr_db > coarse.own_sqnr_db + 10
    assert fine.sqnr_db < coarse.own_sqnr_db + 6
    assert report.model == "W4A16+W8A16"


def test_an_inplace_module_behind_a_layer_does_not_disturb():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True))
    report = compare(copy.deepcopy(reference), reference, [torch.randn(4, 32)])
    assert report.layers[0].sqnr_db == math.inf
    assert report.sqnr_db == math.inf
    assert "identical" in report.verdict


def test_a_layer_that_runs_several_times():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    reference = nn.Sequential(layer, nn.Tanh(), layer)
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A8())
    report = compare(model, reference, batches(2))
    assert [layer.calls for layer in report.layers] == [4]
    assert report.layers[0].sqnr_db > 20


def test_padding_and_hidden_states():
    torch.manual_seed(0)
    reference = Encoder()
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A8(), ignore="embeddings")
    ids = torch.randint(50, (4, 6))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0]}
    report = compare(model, reference, [batch])
    assert (report.output, report.rows, report.agreement) == ("last_hidden_state", 16, None)
    assert report.layers[0].sqnr_db == math.inf
    assert any("padding" in note for note in report.notes)
    assert any("'labels'" in note for note in report.notes)


def test_metric_per_batch_is_weighted_by_batch_size(pair):
    def mean_of_batch(output, batch):
        assert output.shape[0] == batch.shape[0]
        return float(batch.shape[0])

    data = [torch.randn(2, 32), torch.randn(6, 32)]
    report = compare(*pair, data, metric=mean_of_batch)
    assert report.metric == qk.report.Metric("mean_of_batch", 5.0, 5.0)


def test_metric_over_the_whole_model(pair):
    def count(model, data):
        return sum(len(batch) for batch in data) + (model is pair[0])

    report = compare(*pair, batches(), evaluate=count)
    assert report.metric == qk.report.Metric("count", 25.0, 24.0)
    assert "count goes from 24 to 25" in report.verdict


def test_nan_is_said_plainly(pair):
    model, reference = pair
    with torch.no_grad():
        model.first.bias[3] = torch.nan
    report = compare(model, reference, batches())
    assert report.nonfinite == 24
    assert report.nonfinite_reference == 0
    assert report.verdict.startswith("W8A8 returns NaN or Inf in 24 of 24")
    assert report.layers[0].nonfinite == 24
    assert report.cosine_mean is None
    text, data = str(report), json.dumps(report.to_dict(), allow_nan=False)
    assert "NaN" in text
    assert "do not use it" in data


def test_latency_of_both_in_turns(pair):
    report = qk.compare(*pair, batches(1), latency_budget=0.05)
    assert report.latency.batch == "8×32"
    assert report.latency.speedup == pytest.approx(
        report.latency.reference.median / report.latency.model.median
    )
    assert report.to_dict()["latency"]["model"]["samples"] >= 5


def test_modes_gradients_and_hooks_are_left_as_they_were(pair):
    model, reference = pair
    model.train()
    reference.norm.eval()
    compare(model, reference, batches())
    assert model.training
    assert model.first.training
    assert not reference.norm.training
    assert reference.training
    assert not any(m._forward_hooks for m in (*model.modules(), *reference.modules()))


def test_hooks_are_removed_after_an_error(pair):
    model, reference = pair
    with pytest.raises(RuntimeError):
        compare(model, reference, [torch.randn(2, 31)])
    assert not any(m._forward_hooks for m in (*model.modules(), *reference.modules()))


def test_activations_of_earlier_batches_are_not_kept(pair):
    import weakref

    alive = []

    def stream():
        for batch in batches(4):
            held = batch.clone()
            alive.append(weakref.ref(held))
            yield held

    compare(*pair, stream())
    # Beyond the first batch, which latency is measured on, nothing outlives its turn.
    assert sum(ref() is not None for ref in alive) == 0


def test_compiled_models_are_compared_without_their_layers(pair):
    model, reference = pair
    compiled = torch.compile(model, backend="eager")
    report = compare(compiled, reference, batches())
    assert report.layers == ()
    assert any("torch.compile" in note for note in report.notes)
    assert report.cosine_mean > 0.999


def test_own_call_and_names(pair):
    data = [{"inputs": batch} for batch in batches()]
    report = compare(
        *pair, data, call=lambda model, batch: model(batch["inputs"]), names=("small", "large")
    )
    assert (report.model, report.reference, report.rows) == ("small", "large", 24)


def test_two_float_models_may_be_compared():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(16, 4))
    half = copy.deepcopy(reference).bfloat16()
    report = compare(half, reference, [torch.randn(4, 16)],
                     call=lambda m, x: m(x.to(m[0].weight.dtype)))  # fmt: skip
    assert (report.model, report.reference) == ("bfloat16", "float32")
    assert report.compression == 2.0
    assert 30 < report.sqnr_db < 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "same"}, "same object.*deepcopy"),
        ({"model": 3}, "model must be a torch.nn.Module, got int"),
        ({"batches": []}, "at least one batch"),
        ({"batches": torch.zeros(2, 32)}, r"pass \[batch\]"),
        ({"metric": len, "evaluate": len}, "pass one"),
        ({"batches": iter([torch.zeros(2, 32)]), "evaluate": len}, "a list or a DataLoader"),
        ({"reference": nn.Linear(32, 7)}, r"\(8, 5\).*\(8, 7\).*same architecture"),
    ],
)
def test_what_cannot_be_compared(pair, change, message):
    model, reference = pair
    arguments = {"model": model, "reference": reference, "batches": batches(), **change}
    if arguments["reference"] == "same":
        arguments["reference"] = model
    data = arguments.pop("batches")
    with pytest.raises((TypeError, ValueError), match=message):
        compare(arguments.pop("model"), arguments.pop("reference"), data, **arguments)


def test_layers_of_another_shape_are_named(pair):
    _, reference = pair
    other = Classifier()
    other.first, other.norm, other.head = nn.Linear(32, 20), nn.LayerNorm(20), nn.Linear(20, 5)
    with pytest.raises(ValueError, match=r"layer 'first' returns shape \(8, 20\).*per_layer=False"):
        compare(other, reference, batches())
    assert compare(other, reference, batches(), per_layer=False).rows == 24


def test_models_without_common_layer_names():
    report = compare(nn.Sequential(nn.Linear(8, 2)), nn.Linear(8, 2), [torch.zeros(1, 8)])
    assert report.layers == ()
    assert any("no layer has the same name" in note for note in report.notes)
