"""The text examples from start to end, on a few texts."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

TOPICS = {
    "kitchen": ("bake the bread", "chop an onion", "boil some rice", "salt the soup"),
    "garden": ("water the roses", "mow the lawn", "plant a tree", "rake the leaves"),
    "workshop": ("saw the plank", "drill a hole", "sand the table", "oil the hinge"),
}
WHENS = ("in the morning", "before noon", "after lunch", "at night", "on Sundays")


@pytest.fixture
def texts(tmp_path):
    rows = [f"{a} {b},{topic}" for topic, what in TOPICS.items() for a in what for b in WHENS]
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *rows]))
    return path


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)
    spec.loader.exec_module(example)
    return example


def test_transfer_learning(texts, monkeypatch):
    example = load("text_transfer", monkeypatch)
    found = example.run(example.Plan(epochs=1), text=str(texts))
    names = [row.name for row in found]
    assert names == ["head", "last 3 layers", "everything", "int4", "int4 + LoRA"]
    head, partial, full, _, lora = (row.trained for row in found)
    assert head == 384 * 3 + 3 < lora < partial < full
    # Six layers with four linears of 384 x 384 and two of 384 x 1536 each, and the head.
    assert lora == 8 * 6 * (4 * 768 + 2 * 1920) + head
    assert all(row.test > 0.8 for row in found)


def test_training_for_quantization(texts, monkeypatch):
    example = load("qat_text", monkeypatch)
    plan = example.Plan(per_library=0, layers=1, epochs=1, lr=1e-4)
    found = example.run(plan, example.csv_dataset(texts, 0))
    assert list(found) == ["float", "float, trained on", "int4 PTQ", "int4 QAT"]
    assert all(accuracy > 0.7 for accuracy in found.values())
