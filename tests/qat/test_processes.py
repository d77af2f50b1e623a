"""Two processes that train a prepared model give what one gives on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMON = """
import os
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
import qkernels as qk

rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    scheme = qk.W8A8(static=True) if kind == "static" else qk.W4A8(8)
    qk.prepare_qat_(model, scheme, learn_scale=kind == "learned")
    return model

def sgd(model):
    # Scales get a hundredth of the learning rate, so that none becomes negative.
    scales = [p for name, p in model.named_parameters() if "scale" in name]
    rest = [p for name, p in model.named_parameters() if "scale" not in name]
    return torch.optim.SGD([{"params": rest}, {"params": scales, "lr": 0.0005}], lr=0.05)

x = torch.randn(64, 24, generator=torch.Generator().manual_seed(7))
target = torch.randn(64, 4, generator=torch.Generator().manual_seed(8))

def step(model, optimizer, x, target):
    loss = F.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

def steps(model, x, target, count=20):
    optimizer = sgd(model)
    return [step(model, optimizer, x, target) for _ in range(count)]
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel

model = prepared()
ddp = DistributedDataParallel(model)
schedule = qk.qat.Schedule(ddp, freeze=10)
optimizer = sgd(ddp)
losses = []
for _ in range(20):
    losses.append(step(ddp, optimizer, x[rank::2], target[rank::2]))
    schedule.step()
for tensor in (*model.parameters(), *model.buffers()):
    if tensor.is_floating_point():
        gathered = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(gathered, tensor.detach())
        assert torch.equal(*gathered), "the processes have drifted apart"
dist.barrier()
dist.destroy_process_group()
alone = prepared()
schedule = qk.qat.Schedule(alone, freeze=10)
optimizer = sgd(alone)
for _ in range(20):
    last = step(alone, optimizer, x, target)
    schedule.step()
assert last < losses[0]
for (name, p), q in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
    assert torch.allclose(p, q, atol=1e-4), f"{name}: {(p - q).abs().max()}"
try:
    qk.convert_(ddp)
except ValueError as error:
    assert "DistributedDataParallel" in str(error)
else:
    raise AssertionError("convert_ took a wrapped model")
model.eval()
with torch.no_grad():
    expected = model(x)
    qk.convert_(model)
    assert torch.allclose(model(x), expected, atol=1e-4)
print("ok", flush=True)
os._exit(0)  # Gloo's threads abort the interpreter's own exit once in many runs.
"""

FSDP = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

alone = prepared()
model = prepared()
mesh = init_device_mesh("cpu", (2,))
for layer in (model[0], model[2]):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
losses = steps(model, x[rank::2], target[rank::2])
assert losses[-1] < losses[0], losses
options = StateDictOptions(full_state_dict=True)
whole = get_model_state_dict(model, options=options)
if rank == 0:
    dist_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    steps(alone, x, target)
    for (name, p), q in zip(alone.state_dict().items(), whole.values(), strict=True):
        assert torch.allclose(p, q, atol=1e-4), f"{name}: {(p - q).abs().max()}"
    dist.is_initialized = dist_initialized
    fresh = prepared()
    fresh.load_state_dict(whole)
    fresh.eval()
    qk.convert_(fresh)
    assert fresh(x).isfinite().all()
dist.barrier()
print("ok", flush=True)
os._exit(0)  # Gloo's threads abort the interpreter's own exit once in many runs.
"""


def run_two(script: str, folder: Path, kind: str) -> None:
    path = folder / "script.py"
    path.write_text(COMMON + script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(folder), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip().endswith("ok"), err


@pytest.mark.parametrize("kind", ["dynamic", "learned", "static"])
def test_distributed_data_parallel(tmp_path: Path, kind: str) -> None:
    run_two(DDP, tmp_path, kind)


@pytest.mark.parametrize("kind", ["dynamic", "learned"])
def test_fully_sharded(tmp_path: Path, kind: str) -> None:
    run_two(FSDP, tmp_path, kind)
