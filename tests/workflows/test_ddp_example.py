"""Two processes under torchrun train the model that one trains on the same global batches."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import qkernels as qk
from qkernels.demo.vision.model import build_folded
from qkernels.demo.vision.transfer import source_digits
from workflows.test_text_examples import load

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def options(file):
    return [str(arg) for arg in ("--steps", 6, "--source-epochs", 1, "--out", file)]


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    files = [tmp_path / f"{count}.safetensors" for count in (1, 2)]
    script = ROOT / "examples" / "ddp_qat.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options(files[0])])
    load("ddp_qat", monkeypatch).main()
    done = subprocess.run(
        [*LAUNCH, script, *options(files[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes: int4 test accuracy" in done.stdout

    one, two = (qk.load_model(build_folded(5, 0), file) for file in files)
    kinds = {type(m.scheme).__name__ for m in one.modules() if isinstance(m, qk.nn.QConv2d)}
    assert kinds == {"W4A16", "W8A8"}
    assert torch.equal(one.stem.x_scale, two.stem.x_scale), "the range was not shared"
    for name, layer in one.named_modules():
        if isinstance(layer, qk.nn.QConv2d):
            weight, other = layer.quantized_weight(), two.get_submodule(name).quantized_weight()
            # Sums in another order; now and then a weight is rounded to the code next to it.
            torch.testing.assert_close(weight.scale, other.scale, rtol=1e-3, atol=0)
            assert (weight.data != other.data).float().mean() < 0.01, name
    x = source_digits(0).test.x[:64]
    with torch.no_grad():
        torch.testing.assert_close(two(x), one(x), rtol=0.01, atol=0.02)
