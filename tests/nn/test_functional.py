"""qkernels.functional: names for codes, Quantized, and which linear op runs."""

import math

import pytest
import torch
import torch.nn.functional as F

import qkernels as qk
from qkernels import functional


@pytest.mark.parametrize(
    ("format", "symmetric"),
    [(f, s) for f in ("int8", "int4", "nf4", "int16") for s in (True, False) if f != "nf4" or s],
)
@pytest.mark.parametrize("group_size", [None, -1, 1, 5, 64])
def test_quantize_and_back(format, group_size, symmetric):
    x = torch.randn(3, 4, 13)
    q = qk.quantize(x, format, group_size, symmetric)
    steps = {"int8": 127, "int4": 7.5, "nf4": 4, "int16": 32767}[format]
    assert (q.dequantize() - x).abs().max() <= x.abs().max() / steps
    assert q.shape == x.shape
    assert (q.zero_point is None) == symmetric
    again = functional.quantize_with(x, q.scale, q.zero_point, format, group_size)
    assert torch.equal(again.data, q.data)
    assert torch.equal(again.dequantize(torch.bfloat16), q.dequantize(torch.bfloat16))


def test_quantized_says_what_it_is():
    q = qk.quantize(torch.randn(3, 130), "int4", 64, False, torch.bfloat16)
    assert repr(q) == (
        "Quantized(int4 [3, 130], groups of 64, asymmetric, bfloat16 scales, 222 bytes, "
        "device='cpu')"
    )
    assert q.nbytes == 3 * 65 + 3 * 3 * 2 + 3 * 3
    with pytest.raises(AttributeError):
        q.format = "int8"
    assert "per tensor, symmetric" in repr(qk.quantize(torch.randn(3), "int8", None))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_quantize_of_little(shape):
    x = torch.randn(shape)
    q = qk.quantize(x, "int8", None)
    assert q.dequantize().shape == x.shape


def test_dequantize_of_raw_tensors():
    q = qk.quantize(torch.randn(2, 5), "int4")
    assert torch.equal(
        functional.dequantize(q.data, q.scale, format="int4", features=5), q.dequantize()
    )
    assert functional.dequantize(q.data, q.scale, format="int4").shape == (2, 6)


def test_int_mm_is_exact():
    a = torch.randint(-128, 128, (5, 33), dtype=torch.int8)
    b = torch.randint(-128, 128, (33, 7), dtype=torch.int8)
    assert torch.equal(functional.int_mm(a, b), (a.long() @ b.long()).int())


def packed_weight(scheme, rows=20, columns=48):
    weight = torch.randn(rows, columns)
    q = qk.quantize(weight, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
    sizes = {
        "layout": scheme.layout,
        "in_features": columns,
        "out_features": rows,
        "group_size": scheme.group_size,
        "activation": scheme.activation,
    }
    return q, functional.pack(q, scheme.layout), sizes


def test_pack_and_unpack(scheme):
    q, packed, _ = packed_weight(scheme)
    back = functional.unpack(packed, scheme.layout, 20, 48, scheme.group_size)
    assert torch.equal(back.data, q.data)
    assert torch.equal(back.scale, q.scale)
    assert (back.zero_point is None) == scheme.symmetric
    assert scheme.symmetric or torch.equal(back.zero_point, q.zero_point)
    assert back.format == scheme.format


def test_linear_follows_the_float_product(scheme):
    q, packed, sizes = packed_weight(scheme)
    x, bias = torch.randn(2, 3, 48), torch.randn(20)
    y = functional.linear(x, packed, bias, **sizes)
    expected = F.linear(x, q.dequantize(), bias)
    assert (y - expected).norm() / expected.norm() < (
        0.02 if scheme.activation != "float" else 1e-5
    )


@pytest.mark.parametrize("epilogue", list(functional.EPILOGUES))
def test_epilogues_with_and_without_gradient(epilogue):
    _, packed, sizes = packed_weight(qk.W8A16())
    x, bias = torch.randn(4, 48), torch.randn(20)
    with torch.no_grad():
        fused = functional.linear(x, packed, bias, epilogue=epilogue, **sizes)
    x.requires_grad_()
    y = functional.linear(x, packed, bias, epilogue=epilogue, **sizes)
    assert y.grad_fn is not None
    torch.testing.assert_close(fused, y.detach())
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("bias_grad", [True, False, None])
def test_the_differentiable_op_runs_only_when_a_gradient_is_needed(grad_mode, x_grad, bias_grad):
    _, packed, sizes = packed_weight(qk.W8A8())
    x = torch.randn(2, 48, requires_grad=x_grad)
    bias = None if bias_grad is None else torch.randn(20, requires_grad=bias_grad)
    ran = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ran.append(op)
            return op(*args, **(kwargs or {}))

    with torch.set_grad_enabled(grad_mode), Spy():
        y = functional.linear(x, packed, bias, **sizes)
    needed = grad_mode and (x_grad or bool(bias_grad))
    ops = torch.ops.qkernels
    expected = ops.linear_differentiable if needed else ops.linear
    assert expected.default in ran
    assert y.requires_grad == needed


def test_embedding_reads_the_linear_layout(scheme):
    q, packed, _ = packed_weight(scheme)
    indices = torch.tensor([[0, 19], [7, 7]])
    rows = functional.embedding(
        indices,
        packed,
        layout=scheme.layout,
        num_embeddings=20,
        embedding_dim=48,
        group_size=scheme.group_size,
    )
    assert torch.equal(rows, q.dequantize()[indices])


def vector() -> torch.Tensor:
    return torch.randn(2, 48)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, s: functional.linear(vector(), p, **{**s, "activation": "int8"}), ["int8"]),
        (lambda p, s: functional.linear(vector(), p, epilogue="tanh", **s), ["tanh", "gelu"]),
        (lambda p, s: functional.linear(vector()[:, 1:], p, **s), ["47", "48", "in_features"]),
        (lambda p, s: qk.quantize(vector(), "int5"), ["int5", "'int8'"]),
        (lambda p, s: qk.quantize(torch.arange(3), "int8"), ["int64", "x"]),
        (lambda p, s: functional.pack(qk.quantize(vector()[0], "int8"), s["layout"]), ["two"]),
        (lambda p, s: functional.pack(qk.quantize(vector(), "int8", None), s["layout"]), ["row"]),
    ],
)
def test_refusals_are_sentences(call, words):
    _, packed, sizes = packed_weight(qk.W8A8())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(packed, sizes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_static_activation_scale():
    _, packed, sizes = packed_weight(qk.W8A8())
    x = torch.randn(6, 48)
    scale = torch.tensor(x.abs().max().item() / 127)
    static = functional.linear(x, packed, x_scale=scale, **sizes)
    dynamic = functional.linear(x, packed, **sizes)
    assert (static - dynamic).norm() / dynamic.norm() < 0.02
    # The row that holds the largest value has the same scale either way.
    row = int(x.abs().amax(1).argmax())
    assert math.isclose(static[row].norm(), dynamic[row].norm(), rel_tol=1e-5)


FORWARD_MODE = "has no forward-mode derivative"


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("scheme", [qk.W8A8(), qk.W4A16(group_size=16)])
def test_forward_mode_is_refused_rather_than_zero(scheme, frozen):
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU())
    convolution = torch.nn.Sequential(torch.nn.Conv1d(16, 16, 3))
    for module, x in ((model, torch.randn(2, 32)), (convolution, torch.randn(2, 16, 8))):
        qk.quantize_(module, scheme)
        if frozen:
            for parameter in module.parameters():
                parameter.requires_grad = False
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            torch.func.jvp(module, (x,), (x,))
        assert module(x).isfinite().all()  # and nothing is left of it
    for fake in (
        lambda x: functional.fake_quantize(x, "int8"),
        lambda x: functional.fake_quantize_with(x, torch.tensor(0.1), None, "int8", None),
    ):
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            torch.func.jvp(fake, (torch.randn(4),), (torch.ones(4),))
