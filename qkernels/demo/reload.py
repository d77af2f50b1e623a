"""Save, reload in a fresh process, and compare to the bit: `python -m qkernels.demo.reload`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo.model import Batch

_JOB, _TENSORS = "job.json", "tensors.safetensors"


def outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Class scores of the model for every batch."""
    with torch.inference_mode():
        return [model(**batch) for batch in batches]


def save_and_reload(
    models: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    batches: Sequence[Batch],
    metadata: Mapping[str, object],
    build: Callable[[int, int], nn.Module],
    classes: int,
) -> dict[str, bool]:
    """Save models and let a new Python process load them and compute the same outputs again.

    Args:
        models: quantized models by name.
        files: where to save each.
        batches: inputs to compare on.
        metadata: to store with each model.
        build: a function of a module that makes the float model, from the classes and a seed.
        classes: of the models.

    Returns:
        By name, whether the outputs after loading equal those before saving in every bit.

    Raises:
        RuntimeError: the new process failed; the sentence holds its last words.
    """
    tensors = {
        f"{key}/{i}": value for i, batch in enumerate(batches) for key, value in batch.items()
    }
    for name, model in models.items():
        qk.save_model(model, files[name], metadata)
        for i, value in enumerate(outputs(model, batches)):
            tensors[f"{name}/{i}"] = value
    with tempfile.TemporaryDirectory(prefix="qkernels-demo-") as folder:
        save_file(tensors, Path(folder) / _TENSORS)
        job = {
            "build": [build.__module__, build.__name__],
            "classes": classes,
            "threads": torch.get_num_threads(),
            "batches": len(batches),
            "keys": list(batches[0]),
            "files": {name: str(path.resolve()) for name, path in files.items()},
        }
        (Path(folder) / _JOB).write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "qkernels.demo.reload", folder], capture_output=True, text=True
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that reloads the models failed: {last}")
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(folder: Path) -> dict[str, bool]:
    """The new process's part: load every file into a float model and compare.

    Args:
        folder: what `save_and_reload` wrote for it.
    """
    job = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    tensors = load_file(folder / _TENSORS)
    torch.set_num_threads(job["threads"])
    batches = [{key: tensors[f"{key}/{i}"] for key in job["keys"]} for i in range(job["batches"])]
    module, name = job["build"]
    build = getattr(importlib.import_module(module), name)
    found = {}
    for name, path in job["files"].items():
        model = build(job["classes"], 0)
        qk.load_model(model, path)
        pairs = zip(outputs(model, batches), range(len(batches)), strict=True)
        found[name] = all(torch.equal(value, tensors[f"{name}/{i}"]) for value, i in pairs)
    return found


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1]))))
