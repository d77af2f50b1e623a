"""The vision demo and its example from start to end, with little training."""

import argparse
import doctest
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import demo
from qkernels.demo import loop
from qkernels.demo.vision import contenders, data, model, train, transfer
from qkernels.demo.vision.job import Plan, run_vision
from qkernels.demo.vision.model import build_model
from qkernels.demo.vision.train import QUIET, accuracy, fit
from workflows.test_text_examples import load


def test_no_image_is_on_two_sides():
    found = data.load((5, 6, 7), per_class=40, seed=0)
    assert [len(part.labels) for part in (found.train, found.val)] == [120, 180]
    assert found.train.x.shape == (120, 1, 8, 8) and found.test.x.shape[1:] == (1, 16, 16)
    # Each digit has about 180 images: those that neither train nor validate test, three times.
    assert len(found.test.x) == 3 * (182 + 181 + 179 - 3 * 60)
    again = data.load((5, 6, 7), per_class=40, seed=0)
    assert torch.equal(found.test.x, again.test.x) and torch.equal(found.train.x, again.train.x)
    assert not torch.equal(found.train.x, data.load((5, 6, 7), 40, seed=1).train.x)


def test_distortion_against_sampling_by_hand():
    """One image, turned and moved by what the generator says, pixel by pixel in numpy."""
    how = data.Distortion(degrees=30, shift=0.2, zoom=0.2, noise=0.0)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    got = data.distort(image, how, torch.Generator().manual_seed(4))[0, 0].numpy()
    draws = torch.Generator().manual_seed(4)
    angle, zoom, right, down = (
        most * (2 * torch.rand(1, generator=draws).item() - 1)
        for most in (np.pi / 6, 0.2, 0.2, 0.2)
    )
    padded = np.pad(image[0, 0].numpy(), 8)
    for row, column in ((0, 0), (5, 9), (15, 7), (11, 3)):
        u, v = ((2 * i + 1) / 16 - 1 for i in (column, row))
        x = (np.cos(angle) * u - np.sin(angle) * v) / (1 + zoom) + right
        y = (np.sin(angle) * u + np.cos(angle) * v) / (1 + zoom) + down
        at_x, at_y = (8 + ((c + 1) * 8 - 1) / 2 for c in (x, y))
        i, j = int(at_y), int(at_x)
        b, a = at_y - i, at_x - j
        patch = padded[i : i + 2, j : j + 2]
        want = np.array([1 - b, b]) @ patch @ np.array([1 - a, a])
        assert got[row, column] == pytest.approx(want, abs=1e-5)


def test_the_best_epoch_is_kept_with_its_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x, seen = torch.randn(8, 3), []

    def score():
        seen.append([t.clone() for t in model.state_dict().values()])
        return (0.1, 0.2, 0.5, 0.3)[len(seen) - 1]

    def loss_of(batch):
        return model(batch).square().mean()

    loop.train(model, [model], lambda rng: [x, x], loss_of, score, QUIET, 0, epochs=3, lr=0.1)
    assert not model.training and len(seen) == 4
    kept = model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(kept, seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))


def test_frozen_parts_stand_still(monkeypatch):
    # Each epoch counts as better than the one before, so the last one is kept.
    better = itertools.count()
    monkeypatch.setattr(train, "accuracy", lambda *_: next(better))
    digits = transfer.target_digits(0)
    model = build_model(5, 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    qk.transfer.strategy(model, "partial", layers=1)
    fit(model, digits, 0, epochs=1, lr=1e-2)
    changed = {
        key.split(".")[0] + "." + key.split(".")[1] if key.startswith("blocks") else "rest"
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key]) and not key.startswith("head")
    }
    assert changed == {"blocks.2"}


def test_contenders_are_what_they_are_called():
    digits = transfer.target_digits(0)
    found, summaries = contenders.contenders(
        build_model(5, 0), data.example_batches(digits, 2, seed=0)
    )
    kinds = {name: {str(row.became) for row in s.converted} for name, s in summaries.items()}
    assert kinds["W8A8 static"] == {"QConv2d W8A8(static=True)"}
    assert kinds["W8A8 dynamic"] == {"QConv2d W8A8()"}
    assert kinds["mixed"] == {"QConv2d W8A8(static=True)", "QConv2d W4A16(group_size=32)"}
    assert all(len(s.converted) == 9 for s in summaries.values())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found["mixed"].modules())
    x = digits.test.x[:16]
    with torch.no_grad():
        exact = found["float32"](x)
        for name in ("bfloat16", "W8A8 dynamic", "W8A8 static", "W8A16"):
            assert (found[name](x) - exact).norm() < 0.05 * exact.norm(), name


def test_whole_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfer, "SOURCE_PER_CLASS", 40)
    out = tmp_path / "out"
    plan = Plan(seeds=2, source_epochs=1, epochs=1, latency_budget=0, report_batches=1)
    assert run_vision(fast=False, out=str(out), seed=0, threads=None, plan=plan) == 0
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert list(table["transfer"])[:2] == ["digits 0 to 4", "from scratch"]
    head, last, full = (table["transfer"][name]["trained"] for name in transfer.WAYS)
    assert head == 64 * 5 + 5 < last < full
    rows = {row["name"]: row for row in table["models"]}
    assert list(rows) == ["float32", "bfloat16", *contenders.SCHEMES]
    assert rows["float32"]["accuracy"] == pytest.approx(
        np.mean(table["transfer"][transfer.FULL]["test"])
    )
    assert rows["float32"]["agreement"] == 1 and rows["float32"]["spread"] is not None
    assert rows["W8A8 static"]["cosine_mean"] > 0.99
    assert rows["W4A16"]["bytes"] < rows["W8A16"]["bytes"] < 0.3 * rows["float32"]["bytes"]
    assert all(file["identical"] for file in table["files"].values())
    assert "±" in (out / "table.md").read_text(encoding="utf-8")
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!")
    assert capsys.readouterr().out.rstrip().endswith(str(out / "report.html"))


def test_example(monkeypatch):
    example = load("vision_digits", monkeypatch)
    found = example.run(example.Plan(seeds=1, source_epochs=3, epochs=3))
    assert all(len(values) == 1 for values in found.values())
    accuracies = {name: values[0] for name, values in found.items()}
    assert accuracies["digits 0 to 4"] > 0.4
    assert abs(accuracies["int8 static"] - accuracies["everything"]) < 0.03
    assert list(accuracies)[-2:] == ["int4", "int4 QAT"]
    assert all(0.15 < value <= 1 for value in accuracies.values())


def test_options(monkeypatch):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(ValueError, match="--text gives texts, but --vision is about images"):
        demo.run(parser.parse_args(["--vision", "--text", "a.csv"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'qkernels\[demo\]'"):
        demo.run(parser.parse_args(["--vision"]))


@pytest.mark.parametrize("module", [data, model])
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_accuracy_counts():
    images = data.Images(torch.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3]))
    assert accuracy(nn.Identity(), images) == 0.75
