"""explain: what it says is what the library says."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import _C

FLOAT = [qk.W8A16(), qk.W4A16(group_size=32), qk.NF4()]
INTEGER = [qk.W8A8(), qk.W8A8(activation="asymmetric"), qk.W8A8(static=True), qk.W4A8()]


@pytest.mark.parametrize("scheme", FLOAT + INTEGER, ids=repr)
@pytest.mark.parametrize("shape", [(1, 64), (4, 33, 64), (64,), (0, 64)])
def test_kernel_and_arithmetic_of_a_layer(scheme, shape):
    layer = qk.nn.QLinear(64, 48, scheme=scheme)
    text = qk.explain(layer, torch.empty(shape))
    rows = torch.empty(shape).numel() // 64
    assert _C.kernel_name(layer.layout, scheme.activation_code, rows) in text
    assert f"({_C.isa()})" in text
    assert ("real integer arithmetic" in text) == (scheme in INTEGER)
    assert ("float arithmetic, not integer" in text) == (scheme in FLOAT)
    assert f"{8 * layer.packed.nbytes / (64 * 48):.2f} bits per weight" in text


def test_activations_and_storage():
    x = torch.empty(8, 64, dtype=torch.bfloat16)
    dynamic = qk.explain(qk.nn.QLinear(64, 32), x)
    assert "8×64 of bfloat16" in dynamic
    assert "int8 (symmetric, one scale for each row)" in dynamic
    assert "a float32 scale for each row." in dynamic
    static = qk.explain(
        qk.nn.QLinear(64, 32, scheme=qk.W8A8(static=True, activation="asymmetric")), x
    )
    assert "int8 (asymmetric, one scale for the tensor, measured beforehand)" in static
    grouped = qk.explain(qk.nn.QLinear(64, 32, scheme=qk.W4A8(group_size=32)), x)
    assert "int4 codes, a bfloat16 scale and a zero point for each group of 32." in grouped


def test_embedding():
    text = qk.explain(qk.nn.QEmbedding(100, 16, scheme=qk.W8A16()), torch.zeros(2, 3).long())
    assert "rows of 6 indices are read" in text
    assert "no product is computed" in text


def test_model_has_a_line_for_every_quantized_module():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 32)), "idle": nn.Linear(8, 8)}
    )
    model.forward = model["body"].forward
    qk.quantize_(model, {"*": qk.W8A8(), "body.1": qk.W4A16(group_size=32)})
    lines = qk.explain(model, torch.zeros(2, 5).long()).splitlines()
    assert lines[0].startswith("ModuleDict with 3 quantized modules")
    assert lines[1].startswith("body.0: QEmbedding 100 × 64")
    assert "10 rows of float32, float arithmetic by matmul_w4a16" in lines[2]
    assert lines[3] == "idle: QLinear 8 → 8 W8A8() did not run on this input."


def test_explaining_leaves_a_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    qk.quantize_(model, qk.W8A8())
    model.train()
    qk.explain(model, torch.ones(4, 8))
    assert int(model[0].num_batches_tracked) == 0
    assert model.training
    assert not model[1]._forward_pre_hooks


def test_float_models():
    assert "no quantized module" in qk.explain(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (qk.nn.QLinear(64, 32), torch.ones(2, 65), r"65 features.*in_features=64.*\(\.\.\., 64\)"),
        (qk.nn.QLinear(64, 32), torch.tensor(1.0), "0 features"),
        (qk.nn.QLinear(64, 32), torch.ones(2, 64).long(), r"int64.*x\.float\(\)"),
        (qk.nn.QLinear(64, 32), [1.0], "must be a tensor, got list"),
        (3, torch.ones(1), "must be a torch.nn.Module, got int"),
    ],
)
def test_inputs_that_a_layer_does_not_take(module, x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        qk.explain(module, x)
