"""Quantization-aware training in several processes: what N give, one gives on the same batches.

The ResNet of the vision demo is pretrained, prepared for int4 weights (and one static int8 layer,
whose range all processes observe together) and trained by DistributedDataParallel. Every process
makes the same global batch and takes its share. Batch normalizations go by their running
statistics, for those of a share would differ.

    torchrun --nproc-per-node 2 examples/ddp_qat.py --out two.safetensors
    python examples/ddp_qat.py --out one.safetensors        # the same model, up to rounding
"""

from __future__ import annotations

import argparse
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk
from qkernels.demo.vision.data import MILD, distort
from qkernels.demo.vision.train import accuracy
from qkernels.demo.vision.transfer import pretrained, source_digits
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts

SCHEMES = {"*": qk.W4A16(group_size=-1), "stem": qk.W8A8(static=True)}
BATCH = 64  # in all processes together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--source-epochs", type=int, default=8, help="of training in float")
    parser.add_argument("--out", metavar="FILE", help="where to save the quantized model")
    parser.add_argument("--history", metavar="FILE", help="write the losses to this JSON file")
    options = parser.parse_args()
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        dist.init_process_group("gloo")  # torchrun says where to meet

    data = source_digits(seed=0)
    model = pretrained(data, seed=0, epochs=options.source_epochs)
    qk.prepare_qat_(model, SCHEMES, ignore="head")
    # Prepare first, then wrap. The model stays in eval mode but for the layer that observes.
    model.stem.train()
    wrapped = DistributedDataParallel(model) if count > 1 else model
    schedule = qk.qat.Schedule(wrapped, freeze=max(1, options.steps // 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(options.steps):
        chosen = torch.randint(len(data.train.x), (BATCH,), generator=generator)
        x = distort(data.train.x[chosen], MILD, generator)
        mine = slice(rank, None, count)
        loss = F.cross_entropy(wrapped(x[mine]), data.train.labels[chosen][mine])
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel averages the gradients here
        optimizer.step()
        schedule.step()
        total = loss.detach() / count
        if count > 1:
            dist.all_reduce(total)  # of the global batch, for the log
        losses.append(total.item())
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")

    if rank == 0:  # all processes hold the same weights
        model.eval()
        qk.convert_(model)
        reached = accuracy(model, data.test)
        print(f"{count} processes: int4 test accuracy {reached:.1%}")
        if options.history:
            facts = {"processes": count, "loss": losses, "test": reached}
            text = json.dumps({**facts, "machine": machine_facts()}, indent=1)
            write_atomically(options.history, text + "\n")
        if options.out:
            qk.save_model(model, options.out)
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
