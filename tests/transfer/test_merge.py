"""merge_: the weight it makes, and the error it reports, against the formulas."""

import math

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear
from qkernels.transfer import LoRALinear, add_lora_, merge_


def weight_of(layer):
    weight = layer.float_weight() if isinstance(layer, QLinear) else layer.weight
    return weight.detach().double()


def adapted(mlp, scheme, size=0.05):
    model = mlp(scheme)
    add_lora_(model, rank=4, alpha=6)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.data = size * torch.randn(module.lora_b.shape, generator=generator)
    return model


def test_weights_and_errors_by_formula(mlp, scheme):
    model = adapted(mlp, scheme)
    base = {i: weight_of(model[i].base) for i in (0, 2)}
    update = {
        i: 6 / 4 * model[i].lora_b.detach().double() @ model[i].lora_a.detach().double()
        for i in (0, 2)
    }
    bias = model[0].base.bias
    merged = merge_(model)
    assert [row.name for row in merged] == ["0", "2"]
    assert model[0].bias is bias
    for row, i in zip(merged, (0, 2), strict=True):
        wanted = base[i] + update[i]
        stored = weight_of(model[i])
        if scheme is None:
            torch.testing.assert_close(stored, wanted, rtol=1e-6, atol=1e-7)
            assert row.sqnr_db > 120 and row.kind == "Linear float32"
        else:
            q = qk.nn.storage.quantize_weight(wanted.float(), scheme)
            assert (stored - q.dequantize().double()).norm() < 1e-5 * stored.norm()
            noise = (stored - wanted).norm()
            assert row.sqnr_db == pytest.approx(20 * math.log10(wanted.norm() / noise), abs=0.01)
            assert row.lost == pytest.approx((noise / update[i].norm()).item(), rel=1e-3)
            assert row.kind == f"QLinear {scheme}"
        assert row.update == pytest.approx((update[i].norm() / base[i].norm()).item(), rel=1e-4)


def test_outputs_stay_close(mlp, scheme, x):
    model = adapted(mlp, scheme).eval()
    expected = model(x)
    merged = merge_(model)
    error = (model(x) - expected).norm() / expected.norm()
    worst = min(row.sqnr_db for row in merged)
    assert error < 4 * 10 ** (-worst / 20) + 0.02


def test_small_updates_drown_in_int4_and_the_table_says_so(mlp):
    merged = merge_(adapted(mlp, qk.W4A16(group_size=16), size=1e-4))
    assert all(row.lost > 0.9 for row in merged)
    text = str(merged)
    assert "lost" in text and "W4A16" in text and "undoes" in text
    assert merged.to_dict()["layers"][0]["lost"] == merged.rows[0].lost


def test_an_untrained_adapter_loses_nothing_in_a_float_layer(mlp):
    merged = merge_(adapted(mlp, None, size=0.0))
    assert [(row.update, row.lost, row.sqnr_db) for row in merged] == [(0.0, 0.0, math.inf)] * 2
    assert merged.to_dict()["layers"][0]["sqnr_db"] is None


@pytest.mark.parametrize("scheme", [None, qk.W8A8()], ids=str)
def test_a_tied_weight_is_left_to_the_other_module(scheme):
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 40, bias=False))
    model[1].weight = model[0].weight
    if scheme is not None:
        qk.quantize_(model, scheme)
    tokens = torch.arange(40)
    table = model[0](tokens)
    add_lora_(model)
    model[1].lora_b.data.normal_()
    merge_(model)
    assert torch.equal(model[0](tokens), table)
    assert (weight_of(model[1]) - table.double()).norm() > 1


def test_diverged_adapters_are_refused_and_nothing_is_merged(mlp, x):
    model = adapted(mlp, qk.W8A8())
    with torch.no_grad():
        model[2].lora_a[0, 0] = torch.nan
    before = model[0].base.packed.clone()
    with pytest.raises(ValueError, match="update of 2 is not finite"):
        merge_(model)
    assert isinstance(model[0], LoRALinear) and torch.equal(model[0].base.packed, before)


def test_no_adapters(mlp):
    with pytest.raises(ValueError, match="merge_: Sequential has no adapters"):
        merge_(mlp(qk.W8A8()))
