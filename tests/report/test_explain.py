"""explain: what it says is what the library says."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.fixture
def on_an_h100(monkeypatch):
    """Gives modules a weight on a GPU that is not there."""
    properties = SimpleNamespace(multi_processor_count=132, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def move(module):
        shape = module.packing.packed_shape("cuda")
        with FakeTensorMode():
            packed = torch.empty(shape, dtype=torch.uint8, device="cuda")
        module.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        return module

    return move


@pytest.mark.parametrize(
    ("scheme", "rows", "dtype", "kernel"),
    [
        (qk.W4A16(group_size=128), 1, torch.bfloat16, "cuda gemv"),
        (qk.W4A16(group_size=128), 16, torch.bfloat16, "cuda mma 16x128"),
        (qk.W4A16(group_size=128), 32, torch.bfloat16, "cuda mma 32x128"),
        (qk.W4A16(group_size=128), 111, torch.float16, "cuda mma 64x256"),
        (qk.W4A16(group_size=128), 112, torch.float16, "dequantize + matmul"),
        (qk.W4A16(group_size=128), 512, torch.float32, "cuda mma 64x256"),
        (qk.NF4(), 24, torch.float32, "dequantize + matmul"),
        (qk.W8A16(), 88, torch.bfloat16, "dequantize + matmul"),
        (qk.W8A8(), 16, torch.bfloat16, "cuda skinny int8 mma"),
        (qk.W8A8(), 64, torch.bfloat16, "cuda int8 mma 64x64"),
        (qk.W4A8(), 2048, torch.bfloat16, "cuda int8 mma 128x128"),
    ],
    ids=str,
)
def test_a_layer_on_a_gpu(on_an_h100, scheme, rows, dtype, kernel):
    layer = on_an_h100(qk.nn.QLinear(4096, 4096, scheme=scheme))
    x = torch.empty(rows, 4096, dtype=dtype, device="meta")
    text = qk.explain(layer, x)
    assert f"{kernel} (sm_90)" in text
    assert ("and torch multiplies" in text) == (kernel == "dequantize + matmul")
    assert f"kernel={layer.kernel_for(1, layer.dtype)}" in repr(layer)


def test_many_rows_on_hopper():
    layer = qk.nn.QLinear(8192, 8192)
    kernels = [layer.cuda_kernel_for(2048, torch.bfloat16, 132, hopper=h) for h in (False, True)]
    assert kernels == ["cuda int8 mma 128x128", "cuda int8 wgmma 128x256"]


def test_a_kernel_that_has_to_be_asked_for(monkeypatch):
    layer = qk.nn.QLinear(8192, 8192, scheme=qk.W4A8(group_size=128))
    for value, kernel in (("", "cuda int8 mma 128x128"), ("1", "cuda int8 wgmma grouped 128x128")):
        monkeypatch.setenv("QKERNELS_GROUPED_WGMMA", value)
        assert layer.cuda_kernel_for(2048, torch.bfloat16, 132, hopper=True) == kernel


def test_a_convolution_on_a_gpu(on_an_h100):
    x = torch.empty(2, 8, 9, 9)
    layer = on_an_h100(qk.nn.QConv2d(8, 16, 3, scheme=qk.W4A16(group_size=24)))
    text = qk.explain(layer, x)
    assert "turned back to float32, and torch convolves x with them" in text
    assert "dequantize + convolution (sm_90)" in text
    layer = on_an_h100(qk.nn.QConv2d(8, 16, 3))
    assert "cuda implicit gemm int8 mma (sm_90) multiplies" in qk.explain(layer, x)


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
