"""Several processes: data parallel, sharded, tensor parallel, and checkpoints between them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import qkernels as qk

WORKERS = Path(__file__).with_name("workers.py")


def run(task, count, folder):
    """`count` processes that do one task of workers.py; all must end well."""
    root = str(Path(qk.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKERS, task, str(rank), str(count), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(count)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0 and out.strip().endswith("ok"), err[-4000:]


@pytest.fixture(scope="module")
def workers():
    spec = importlib.util.spec_from_file_location("transfer_workers", WORKERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_parallel_trains_as_one_process_on_the_whole_batch(tmp_path):
    run("ddp", 2, tmp_path)


def test_sharded_training_and_checkpoints_for_other_numbers_of_processes(tmp_path, workers):
    run("fsdp", 2, tmp_path)
    run("fsdp_again", 3, tmp_path)

    x, _ = workers.data()
    expected = torch.load(tmp_path / "y.pt")
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "whole.pt")
    alone = workers.make_model(seed=4)
    alone.load_state_dict(torch.load(tmp_path / "whole.pt")["model"])
    with torch.no_grad():
        assert torch.equal(alone(x), expected)
    adapters = qk.transfer.load_adapters(workers.make_model(), tmp_path / "adapters.safetensors")
    whole = qk.load_model(workers.make_model(seed=6), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(adapters(x), expected)
        assert torch.equal(whole(x), expected)


def test_sharding_with_mixed_precision_leaves_the_codes_alone(tmp_path):
    run("fsdp_bfloat16", 2, tmp_path)


def test_tensor_parallel_and_its_checkpoints(tmp_path):
    run("tensor_parallel", 2, tmp_path)


@pytest.mark.full
def test_tensor_parallel_over_three(tmp_path):
    run("tensor_parallel", 3, tmp_path)


def test_packed_rows_of_another_layout_are_refused_with_their_meaning():
    layer = qk.nn.QLinear(32, 16, scheme=qk.W4A16(group_size=16))
    rows = {
        "packed": layer.packed.detach().clone(),
        "layout": torch.tensor(layer.layout),
        "bias": torch.ones(16),
    }
    same = qk.nn.QLinear(32, 16, scheme=qk.W4A16(group_size=16))
    same.load_state_dict(rows)
    assert torch.equal(same.packed, layer.packed) and torch.equal(same.bias, rows["bias"])

    symmetric = qk.nn.QLinear(32, 16, scheme=qk.W4A16(16, symmetric=True))
    before = symmetric.packed.clone(), symmetric.bias.clone()
    with pytest.raises(RuntimeError, match="size mismatch for packed|packed rows are"):
        symmetric.load_state_dict(rows)
    with pytest.raises(RuntimeError, match="layout must come with the rest"):
        same.load_state_dict({k: v for k, v in rows.items() if k != "layout"})
    with pytest.raises(RuntimeError, match="packed is torch.int8 in the checkpoint"):
        same.load_state_dict({**rows, "packed": rows["packed"].to(torch.int8)})
    assert torch.equal(symmetric.packed, before[0]) and torch.equal(symmetric.bias, before[1])
    with pytest.raises(RuntimeError, match="unknown layout 12345"):
        same.load_state_dict({**rows, "layout": torch.tensor(12345)})
    assert isinstance(same.bias, nn.Parameter)
