"""The transfer learning example from start to end, on a few texts."""

import importlib.util
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "text_transfer.py"

TOPICS = {
    "kitchen": ("bake the bread", "chop an onion", "boil some rice", "salt the soup"),
    "garden": ("water the roses", "mow the lawn", "plant a tree", "rake the leaves"),
    "workshop": ("saw the plank", "drill a hole", "sand the table", "oil the hinge"),
}
WHENS = ("in the morning", "before noon", "after lunch", "at night", "on Sundays")


def test_the_whole_ladder(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("text_transfer", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "text_transfer", example)
    spec.loader.exec_module(example)
    rows = [f"{a} {b},{topic}" for topic, what in TOPICS.items() for a in what for b in WHENS]
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *rows]))
    found = example.run(example.Plan(epochs=1), text=str(path))
    names = [row.name for row in found]
    assert names == ["head", "last 3 layers", "everything", "int4", "int4 + LoRA"]
    head, partial, full, _, lora = (row.trained for row in found)
    assert head == 384 * 3 + 3 < lora < partial < full
    # Six layers with four linears of 384 x 384 and two of 384 x 1536 each, and the head.
    assert lora == 8 * 6 * (4 * 768 + 2 * 1920) + head
    assert all(row.test > 0.8 for row in found)
