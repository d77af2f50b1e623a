"""The examples of docs/POST_TRAINING.md run."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs/POST_TRAINING.md"


def test_examples_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), {})
    assert "quantized with gptq" in capsys.readouterr().out
