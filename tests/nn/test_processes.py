"""Quantized modules in several processes: shared memory, and DistributedDataParallel."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import qkernels as qk

ROOT = Path(__file__).parents[2]

SHARED = """
import sys
import torch
import torch.multiprocessing as mp
import qkernels as qk
from torch import nn


def work(model, x, queue):
    packed = model[0].packed
    queue.put((model(x).tolist(), packed.is_shared(), packed is model[1].packed))
    with torch.no_grad():
        packed.zero_()
    queue.put("done")


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    qk.quantize_(model, qk.W8A8())
    model.share_memory()
    x = torch.randn(2, 64)
    expected = model(x)
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(model, x, queue))
    process.start()
    y, is_shared, is_tied = queue.get()
    assert y == expected.tolist(), "another result in the child"
    assert is_shared, "a copy arrived in the child"
    assert is_tied, "the child lost the tie"
    assert queue.get() == "done"
    process.join()
    assert not model[0].packed.any(), "the child wrote to memory of its own"
    print("ok")
"""

TRAINED = """
import os
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import qkernels as qk

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)  # other initial weights: DDP broadcasts those of rank 0
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
qk.quantize_(model, {"0": qk.W4A8(16)})
if rank == 1:
    model[0].reset_parameters()
ddp = DistributedDataParallel(model)
packed = model[0].packed.clone()
gathered = [torch.empty_like(packed) for _ in range(2)]
dist.all_gather(gathered, packed)
assert torch.equal(*gathered), "the packed weights were not broadcast"
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.5)
x = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
target = torch.randn(64, 4, generator=torch.Generator().manual_seed(8))
x, target = x[rank::2], target[rank::2]
losses = []
for _ in range(30):
    loss = F.mse_loss(ddp(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
assert torch.equal(model[0].packed, packed), "the frozen weight changed"
for parameter in model.parameters():
    gathered = [torch.empty_like(parameter) for _ in range(2)]
    dist.all_gather(gathered, parameter.detach())
    assert torch.equal(*gathered), "the processes have drifted apart"
assert model[0].bias.grad.abs().sum() > 0
try:
    qk.quantize_(ddp, qk.W8A8())
except ValueError as error:
    assert "DistributedDataParallel" in str(error)
else:
    raise AssertionError("quantize_ took a wrapped model")
dist.barrier()
print("ok", flush=True)
# Everything is checked. Gloo's threads abort the interpreter's own exit once in many runs.
os._exit(0)
"""


def python(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ends_well(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip().endswith("ok"), err


def test_a_spawned_process_shares_the_packed_weight(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    ends_well(python(script))


def test_two_processes_train_around_a_frozen_base(tmp_path):
    script = tmp_path / "trained.py"
    script.write_text(TRAINED)
    processes = [python(script, str(rank), str(tmp_path)) for rank in (0, 1)]
    for process in processes:
        ends_well(process)


def test_threads_may_save_at_once():
    """state_dict remembers what it has written, for each thread apart."""
    models = []
    for i in range(4):
        torch.manual_seed(i)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
        qk.quantize_(model, qk.W8A8())
        models.append(model)
    expected = [model.state_dict() for model in models]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(nn.Module.state_dict, models), expected, strict=True):
                assert all(torch.equal(got[key], want[key]) for key in want)
