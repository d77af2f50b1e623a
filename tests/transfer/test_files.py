"""Files of adapters: what they hold, and that a bad one changes nothing."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk
from qkernels.io import ModelFileError
from qkernels.transfer import LoRALinear, add_lora_, load_adapters, remove_, save_adapters


def adapted(mlp, scheme, **options):
    model = mlp(scheme)
    add_lora_(model, rank=3, alpha=5, **options)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.1)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapters.safetensors"


def test_adapters_alone_are_saved_and_loaded(mlp, scheme, x, path):
    model = adapted(mlp, scheme, dropout=0.1).eval()
    save_adapters(model, path, {"task": "test"})
    assert set(load_file(path)) == {f"{i}.lora_{c}" for i in (0, 2) for c in "ab"}
    assert path.stat().st_size < 4 * 3 * (70 + 33 + 33 + 18) + 2000
    assert list(path.parent.iterdir()) == [path]
    fresh = mlp(scheme).eval()
    assert load_adapters(fresh, path) is fresh
    assert torch.equal(fresh(x), model(x))
    assert fresh[0].dropout == 0.1 and fresh[0].alpha == 5
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(load_file(path))
    # Once more, into the adapters that are there now.
    for name in ("lora_a", "lora_b"):
        getattr(fresh[0], name).data.zero_()
    load_adapters(fresh, path)
    assert torch.equal(fresh(x), model(x))


def test_adapters_of_one_base_fit_another(mlp, path):
    save_adapters(adapted(mlp, qk.W4A16(group_size=16)), path)
    model = load_adapters(mlp(qk.NF4(16)), path)
    assert torch.equal(model[0].lora_a, load_file(path)["0.lora_a"])


def test_modules_to_save_are_saved_even_when_frozen(path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)))
        qk.quantize_(model, qk.W8A8(), ignore="1")
        return model

    model = make()
    add_lora_(model, rank=2, modules_to_save="1")
    model(torch.randn(6, 8)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().requires_grad_(False)
    save_adapters(model, path)
    fresh = load_adapters(make(), path).eval()
    x = torch.randn(4, 8)
    assert torch.equal(fresh(x), model(x))
    assert fresh[1][1].weight.requires_grad and not fresh[0].base.bias.requires_grad
    save_adapters(fresh.requires_grad_(False), path)
    assert "1.1.weight" in load_file(path) and "1.0.running_mean" in load_file(path)


def test_whatever_else_trains_is_saved_too(mlp, x, path):
    model = adapted(mlp, qk.W8A8())
    model[0].base.bias.requires_grad_(True).data.normal_()
    save_adapters(model, path)
    fresh = load_adapters(mlp(qk.W8A8()), path)
    assert torch.equal(fresh(x), model(x)) and fresh[0].base.bias.requires_grad


def test_compiled_models_are_seen_through(mlp, path):
    save_adapters(torch.compile(adapted(mlp, qk.W8A8())), path)
    assert "0.lora_a" in load_file(path)


def rewrite(path, change_tensors=None, change_document=None):
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["qkernels_adapters"])
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_document:
        change_document(document)
    save_file(tensors, path, {"qkernels_adapters": json.dumps(document)})


BAD = {
    "a flipped value": (
        lambda t: t["0.lora_a"].view(-1)[3:4].add_(1),
        None,
        "bytes of 0.lora_a do not have the checksum",
    ),
    "a missing tensor": (lambda t: t.pop("2.lora_b"), None, "lacks 2.lora_b"),
    "a tensor too many": (
        lambda t: t.update({"0.extra": torch.zeros(1)}),
        None,
        "no place for 0.extra",
    ),
    "another shape": (
        lambda t: t.update({"0.lora_b": torch.zeros(33, 4)}),
        None,
        r"0.lora_b has shape \(33, 4\) in the file but \(33, 3\)",
    ),
    "integers": (
        lambda t: t.update({"0.lora_b": torch.zeros(33, 3, dtype=torch.int32)}),
        None,
        "0.lora_b is torch.int32",
    ),
    "a layer too many": (
        None,
        lambda d: d["adapters"].update({"7": d["adapters"]["0"]}),
        "which has no module '7'",
    ),
    "no linear layer": (
        None,
        lambda d: d["adapters"].update({"1": d["adapters"].pop("0")}),
        "at 1: it is a Tanh",
    ),
    "a newer version": (None, lambda d: d.update(version=2), "version 2.*upgrade"),
    "a bad rank": (None, lambda d: d["adapters"]["0"].update(rank=-3), "rank is -3"),
    "an unknown setting": (None, lambda d: d["adapters"]["0"].update(dora=1), "damaged adapters"),
    "no settings": (None, lambda d: d.pop("adapters"), "damaged adapters metadata"),
}


@pytest.mark.parametrize(("tensors", "document", "sentence"), BAD.values(), ids=BAD)
def test_bad_files_change_nothing(mlp, x, path, tensors, document, sentence):
    save_adapters(adapted(mlp, qk.W8A8()), path)
    rewrite(path, tensors, document)
    model = mlp(qk.W8A8())
    expected, flags = model(x), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ModelFileError, match=sentence) as caught:
        load_adapters(model, path)
    assert str(path) in str(caught.value)
    assert torch.equal(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_files_that_are_none(mlp, path):
    model = mlp(qk.W8A8())
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_adapters(model, path)
    path.write_bytes(struct.pack("<Q", 10**9) + b"{}")
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        load_adapters(model, path)
    qk.save_model(model, path)
    with pytest.raises(ModelFileError, match="holds no adapters that save_adapters wrote"):
        load_adapters(model, path)
    save_adapters(adapted(mlp, qk.W8A8()), path)
    with pytest.raises(ModelFileError, match="no qkernels metadata"):
        qk.load_model(model, path)


def test_other_adapters_in_the_model(mlp, path):
    save_adapters(adapted(mlp, qk.W8A8(), targets="0"), path)
    model = adapted(mlp, qk.W8A8())
    with pytest.raises(ModelFileError, match="no adapter for 2; remove_"):
        load_adapters(model, path)
    remove_(model)
    add_lora_(model, rank=4, targets="0")
    with pytest.raises(ModelFileError, match="rank=4.*the file's.*rank=3"):
        load_adapters(model, path)


def test_nothing_to_save_and_nowhere_to(mlp, path):
    with pytest.raises(ValueError, match="has no adapters; add_lora_ adds them"):
        save_adapters(mlp(qk.W8A8()), path)
    with pytest.raises(FileNotFoundError, match="save_adapters: there is no folder"):
        save_adapters(adapted(mlp, qk.W8A8()), path.parent / "none" / "file")
    with pytest.raises(TypeError, match="save_adapters: metadata"):
        save_adapters(adapted(mlp, qk.W8A8()), path, {"x": object()})
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        save_adapters("model", path)


def test_a_wrapped_model_is_unwrapped(mlp, path, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        save_adapters(DistributedDataParallel(adapted(mlp, qk.W8A8())), path)
    finally:
        torch.distributed.destroy_process_group()
    load_adapters(mlp(qk.W8A8()), path)
