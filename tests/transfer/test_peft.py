"""PEFT over quantized layers: the same numbers as our own adapters, merging, files."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear
from qkernels.transfer import LoRALinear, register_peft

peft = pytest.importorskip("peft", reason="peft is not installed")


def adapted(mlp, scheme, **options):
    model = mlp(scheme)
    config = register_peft(peft.LoraConfig(r=3, lora_alpha=5, **options), model)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(1)
            nn.init.normal_(parameter, std=0.1)
    return model


def layer_of(model, name):
    return model.base_model.model.get_submodule(name)


SCHEMES = pytest.mark.parametrize(
    "scheme", [qk.W8A8(), qk.W4A16(group_size=16), qk.NF4(16)], ids=str
)


@SCHEMES
def test_same_outputs_and_gradients_as_our_adapters(mlp, scheme, x):
    model = adapted(mlp, scheme)
    own = mlp(scheme)
    qk.transfer.add_lora_(own, rank=3, alpha=5)
    for name in ("0", "2"):
        ours, theirs = own.get_submodule(name), layer_of(model, name)
        assert isinstance(ours, LoRALinear) and isinstance(theirs.base_layer, QLinear)
        with torch.no_grad():
            ours.lora_a.copy_(theirs.lora_A.default.weight)
            ours.lora_b.copy_(theirs.lora_B.default.weight)
    y, expected = model(x), own(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("0", "2"):
        ours, theirs = own.get_submodule(name), layer_of(model, name)
        torch.testing.assert_close(theirs.lora_A.default.weight.grad, ours.lora_a.grad)
        torch.testing.assert_close(theirs.lora_B.default.weight.grad, ours.lora_b.grad)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in n for n in trained)


@SCHEMES
def test_merging_and_back(mlp, scheme, x):
    model = adapted(mlp, scheme).eval()
    expected = model(x)
    before = layer_of(model, "0").base_layer.packed.clone()
    model.merge_adapter()
    assert not torch.equal(layer_of(model, "0").base_layer.packed, before)
    assert (model(x) - expected).norm() < 0.15 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(layer_of(model, "0").base_layer.packed, before)
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), mlp(scheme)(x))
    merged = model.merge_and_unload()
    assert isinstance(merged[0], QLinear)
    assert (merged(x) - expected).norm() < 0.15 * expected.norm()


def test_files(mlp, x, tmp_path):
    model = adapted(mlp, qk.W4A8(24)).eval()
    model.save_pretrained(tmp_path)
    config = register_peft(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(mlp(qk.W4A8(24)), tmp_path, config=config).eval()
    assert torch.equal(loaded(x), model(x))


def test_targets_and_modules_to_save(mlp, x):
    model = mlp(None)
    qk.quantize_(model, qk.W8A8(), ignore="2")
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["2"])
    model = peft.get_peft_model(model, register_peft(config, model))
    assert config.target_modules == {"0"}
    model(x).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 and all(model.get_parameter(n).grad is not None for n in trained)


def test_refusals(mlp):
    with pytest.raises(TypeError, match="expected a peft.LoraConfig"):
        register_peft(peft.IA3Config())
    with pytest.raises(ValueError, match="has no quantized linear layer"):
        register_peft(peft.LoraConfig(), mlp(None))
    with pytest.raises(ValueError, match="use_dora needs float weights"):
        register_peft(peft.LoraConfig(use_dora=True))


def test_without_peft_it_says_so(monkeypatch):
    from qkernels.transfer.peft import _lora_linear

    _lora_linear.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners", None)
    with pytest.raises(ImportError, match=r"pip install 'qkernels\[peft\]'.*add_lora_"):
        register_peft(None)
    monkeypatch.undo()
