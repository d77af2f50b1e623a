"""What one of several processes does: `python workers.py TASK RANK COUNT FOLDER`."""

import copy
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk
from qkernels.transfer import QColwiseParallel, QRowwiseParallel, add_lora_, save_adapters

# 40 outputs make three packed rows, which neither two nor four processes share evenly.
SIZES = (24, 40, 40, 5)


def make_model(seed=0, scheme=None):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    qk.quantize_(model, scheme or qk.W4A8(16), ignore="4")
    add_lora_(model, rank=3, modules_to_save="4")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def data():
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(12, n, generator=generator) for n in (SIZES[0], SIZES[-1]))


def train(model, x, target, steps=4):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


def trained_alone(model):
    twin = copy.deepcopy(model)
    train(twin, *data())
    return twin


def assert_like(model, expected):
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            torch.testing.assert_close(
                whole.detach(), expected.get_parameter(name).detach(), rtol=1e-4, atol=1e-5
            )


def ddp(rank, count, folder):
    model = make_model()
    expected = trained_alone(model)
    wrapped = DistributedDataParallel(model)
    x, target = data()
    train(wrapped, x[rank::count], target[rank::count])
    assert_like(model, expected)
    if rank == 0:
        save_adapters(wrapped, folder / "adapters.safetensors")
        loaded = qk.transfer.load_adapters(make_model(), folder / "adapters.safetensors")
        assert torch.equal(loaded(x), model(x))


def sharded(model, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(rank, count, folder):
    model = make_model()
    expected = trained_alone(model)
    whole = model[0].base.packed.shape[0]
    sharded(model)
    mine = model[0].base.packed.to_local().shape[0]
    assert mine < whole, "the packed weight was not cut"
    x, target = data()
    train(model, x[rank::count], target[rank::count])
    assert_like(model, expected)
    packed = model[0].base.packed.full_tensor()
    assert torch.equal(packed, expected[0].base.packed), "the frozen weight changed"

    state = model.state_dict()
    assert "0.base.packed" in state and "0.base.weight" not in state
    dcp.save({"model": state}, checkpoint_id=folder / "checkpoint")
    save_adapters(model, folder / "adapters.safetensors")
    qk.save_model(model, folder / "model.safetensors")
    with torch.no_grad():
        y = model(x)
    if rank == 0:
        torch.save(y, folder / "y.pt")
    # A checkpoint of one process, in storage layout, loads into shards.
    other = sharded(make_model(seed=5))
    from_one = {
        key: value for key, value in expected.state_dict().items() if key.startswith("0.base")
    }
    other.load_state_dict(from_one, strict=False)
    assert torch.equal(other[0].base.packed.full_tensor(), packed)


def fsdp_again(rank, count, folder):
    model = sharded(make_model(seed=rank + 20))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    x, _ = data()
    with torch.no_grad():
        assert torch.equal(model(x), torch.load(folder / "y.pt"))

    other = sharded(make_model(scheme=qk.NF4(16)))
    try:
        other.load_state_dict(state["model"])
    except RuntimeError as error:
        assert "packed rows are" in str(error) and "format nf4" in str(error), error
    else:
        raise AssertionError("packed rows of another format were loaded")


def fsdp_bfloat16(rank, count, folder):
    model = sharded(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x, target = data()
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), make_model()(x), rtol=0.05, atol=0.1)
    F.mse_loss(y.float(), target).backward()
    assert model[0].lora_a.grad.dtype == torch.float32


TP_SCHEMES = (qk.W8A16(), qk.W4A16(group_size=16), qk.NF4(16), qk.W8A8(), None)


def tp_model(scheme, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 96), nn.GELU(), nn.Linear(96, 40))
    qk.quantize_(model, scheme)
    return model


def in_parts(model, mesh):
    plan = {"0": QColwiseParallel(), "2": QRowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def tensor_parallel(rank, count, folder):
    mesh = init_device_mesh("cpu", (count,))
    for scheme in TP_SCHEMES[:-1]:
        whole = tp_model(scheme)
        model = in_parts(copy.deepcopy(whole), mesh)
        assert model[0].packed.shape[0] == 6 // count
        assert model[2].packed.nbytes < whole[2].packed.nbytes
        found = []
        for m in (whole, model):
            x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), requires_grad=True)
            y = m(x)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            found.append((y.detach(), x.grad))
        tolerance = 0.02 if scheme.activation != "float" else 1e-5
        for got, want in zip(found[1], found[0], strict=True):
            assert (got - want).norm() <= tolerance * want.norm(), scheme
        mine = whole[0].bias.grad.chunk(count)[rank]
        assert (model[0].bias.grad - mine).norm() <= tolerance * mine.norm()
        torch.testing.assert_close(model[2].reduced_bias.grad, whole[2].bias.grad)
        name = f"{type(scheme).__name__}-{count}"
        dcp.save(model.state_dict(), checkpoint_id=folder / name)

        alone = tp_model(scheme, seed=9)
        state = alone.state_dict()
        dcp.load(state, checkpoint_id=folder / name)
        alone.load_state_dict(state)
        for key, value in whole.state_dict().items():
            assert torch.equal(alone.state_dict()[key], value), key
        # What one process saved, whole, is cut where it is loaded.
        other = in_parts(tp_model(scheme, seed=8), mesh)
        other.load_state_dict(whole.state_dict())
        assert torch.equal(other(x.detach()), model(x.detach()))

    gathered = parallelize_module(
        tp_model(qk.W8A8()),
        mesh,
        {"0": QColwiseParallel(gather_output=True), "2": QRowwiseParallel(split_input=True)},
    )
    y = tp_model(qk.W8A8())[0](x)
    assert torch.equal(gathered[0](x), y), "columns alone give the bits of one process"
    assert (gathered(x) - whole(x)).norm() < 0.05 * whole(x).norm()

    uneven, long = nn.Linear(20, 40), nn.Linear(40, 16)
    for layer, style, sentence in (
        (
            qk.nn.QLinear.from_float(uneven),
            QColwiseParallel(),
            "out_features is 40; expected a mul",
        ),
        (qk.nn.QLinear.from_float(long, qk.NF4(32)), QRowwiseParallel(), "in_features is 40"),
        (uneven, QColwiseParallel(), "the module is a Linear"),
    ):
        try:
            parallelize_module(layer, mesh, style)
        except (ValueError, TypeError) as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(sentence)


if __name__ == "__main__":
    task, rank, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    meet = f"file://{folder}/meet-{task}-{count}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count)
    globals()[task](rank, count, Path(folder))
    dist.barrier()
    print("ok", flush=True)
    # Everything is checked. Gloo's threads abort the interpreter's own exit once in many runs.
    os._exit(0)
