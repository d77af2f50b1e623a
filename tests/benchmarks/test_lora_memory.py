"""The ways of benchmarks/lora_memory.py train the same adapters, and its page holds the numbers."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lora_memory.py"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_ways_train_the_same(
    script: ModuleType, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(needed, reason="the other way is made of these")
    monkeypatch.setattr(script, "LLAMA", script.LLAMA | SMALL)
    script.save_folder("llama", tmp_path)
    ids = torch.randint(320, (2, 7), generator=torch.Generator().manual_seed(0))
    losses, trained = [], []
    for make in script.WAYS.values():
        model = make("llama", tmp_path, checkpointing).train()
        loss = script.loss_of(model, ids)
        loss.backward()
        adapters = [p for p in model.parameters() if p.requires_grad]
        # B starts as zero, so that only its gradient is not zero.
        assert sum(bool(p.grad is not None and p.grad.any()) for p in adapters) * 2 == len(adapters)
        assert {p.dtype for p in adapters} == {torch.float32}
        losses.append(loss.item())
        trained.append(sum(p.numel() for p in adapters))
    assert len(set(trained)) == 1 and trained[0] > 0
    assert max(losses) - min(losses) < 0.05


def test_the_page(script: ModuleType) -> None:
    sizes = {"loading": 3 << 20, "model": 1 << 20, "training": 5 << 20, "process": 9 << 20}
    row = {"model_name": "llama", "checkpointing": True, "way": "qkernels", **sizes}
    page = script.markdown([row], {"cpu": "A CPU"})
    assert "| llama | yes | qkernels | 3 | 1 | 5 | 9 |" in page and "- cpu: A CPU" in page
