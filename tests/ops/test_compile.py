"""torch.compile, torch.export and autocast: no graph break, no recompilation, the same numbers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.check import same_tensor
from helpers.data import FLOATS, KINDS, floats, weight

ops = torch.ops.qkernels

W8 = weight(KINDS[0], 37, 70)
W4 = weight(KINDS[4], 16, 37, 16)
NF4 = weight(KINDS[6], 37, 16, 8)
BIAS = floats((16,))


def network(x: Tensor) -> Tensor:
    """Every kind of op on a packed weight, one after the other."""
    hidden = W8.linear(x, activation=1, epilogue=2)
    small = W4.linear(hidden, BIAS, activation=2)
    data, scale, _ = ops.quantize(small, 1, 8)
    back = ops.dequantize(data, scale, None, 1, 8, 16, x.dtype)
    codes = ops.quantize_with(back, torch.tensor(0.1), None, 0, None)
    product = ops.int_mm(codes, codes.t())
    table = ops.embedding(product.abs().argmax(1) % 37, NF4.packed, NF4.layout, 37, 16, 8, x.dtype)
    return NF4.linear(table + back)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compile_without_a_break(dtype: torch.dtype) -> None:
    x = floats((5, 70), dtype)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    same_tensor(compiled(x), network(x))


def test_dynamic_batch_compiles_once() -> None:
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counted = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 17, 48):
        x = floats((rows, 70))
        same_tensor(compiled(x), network(x))
        same_tensor(counted(x), network(x))
    assert counter.frame_count == 1


def test_weights_may_be_packed_inside_a_graph() -> None:
    def repack(x: Tensor, w: Tensor) -> Tensor:
        data, scale, zero = ops.quantize(w, 1, 16, False, torch.bfloat16)
        packed = ops.pack(data, scale, zero, W4.layout, 37, 16)
        again = ops.unpack(packed, *W4.sizes)
        packed = ops.pack(*again, W4.layout, 37, 16)
        extra = (None, None, None, None, None)
        return ops.linear(x, packed, *extra, *W4.sizes, 0, 0)

    x, w = floats((5, 37)), floats((16, 37), seed="w")
    same_tensor(torch.compile(repack, backend="aot_eager", fullgraph=True)(x, w), repack(x, w))


def test_out_forms_survive_functionalization() -> None:
    def write(x: Tensor) -> tuple[Tensor, ...]:
        data, scale = torch.zeros(5, 70, dtype=torch.int8), torch.zeros(5, 1)
        zero, again = torch.zeros(0, dtype=torch.int8), torch.zeros(5, 70, dtype=torch.int8)
        ops.quantize.out(x, 0, data=data, scale=scale, zero_point=zero)
        ops.quantize_with.out(x, scale, None, 0, out=again)
        y = torch.zeros(5, 70)
        ops.dequantize.out(data, scale, None, 0, -1, out=y)
        return data, scale, again, y

    x = floats((5, 70))
    for got, want in zip(
        torch.compile(write, backend="aot_eager", fullgraph=True)(x), write(x), strict=True
    ):
        same_tensor(got, want)
    assert torch.equal(write(x)[0], write(x)[2])


def test_training_step_compiles() -> None:
    def loss(x: Tensor, bias: Tensor) -> Tensor:
        hidden = torch.relu(W8.linear(x, bias, activation=1, differentiable=True))
        return W4.linear(hidden, activation=2, differentiable=True).square().mean()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, bias = floats((5, 70)).requires_grad_(), floats((37,)).requires_grad_()
        function(x, bias).backward()
        gradients.append((x.grad, bias.grad))
    for got, want in zip(*reversed(gradients), strict=True):
        same_tensor(got, want)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_inductor() -> None:
    x = floats((5, 70))
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    for rows in (5, 18):
        x = floats((rows, 70))
        torch.testing.assert_close(compiled(x), network(x))


class Network(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return network(x)


def test_export_with_a_dynamic_batch() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Network(), (floats((5, 70)),), dynamic_shapes=({0: rows},))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("qkernels.linear" in name for name in called) == 3
    for rows in (5, 2, 31):
        x = floats((rows, 70))
        same_tensor(program.module()(x), network(x))


def test_fakes_refuse_what_kernels_refuse() -> None:
    """So that compiling says it in a sentence, and not at some later run."""
    meta = floats((5, 71)).to("meta")
    with pytest.raises(RuntimeError, match="x has 71 features but the weight has in_features=70"):
        ops.linear(meta, W8.packed.to("meta"), *[None] * 5, *W8.sizes, 0, 0)


def test_autocast_casts_x_and_nothing_else() -> None:
    x, bias, scale = floats((5, 70)), floats((37,)), torch.tensor(0.1)
    for dtype in (torch.bfloat16, torch.float16):
        want = W8.linear(x.to(dtype), bias, activation=1, x_scale=scale)
        for differentiable in (False, True):
            for given in (x, x.to(dtype)):
                with torch.autocast("cpu", dtype):
                    got = W8.linear(
                        given, bias, activation=1, x_scale=scale, differentiable=differentiable
                    )
                same_tensor(got, want)
            with torch.autocast("cpu", dtype, enabled=False):
                got = W8.linear(x, bias, activation=1, x_scale=scale, differentiable=differentiable)
            assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        data, new_scale, _ = ops.quantize(x, 0)
        assert new_scale.dtype == torch.float32
        same_tensor(data, ops.quantize(x, 0)[0])


def test_gradients_under_autocast() -> None:
    x, bias = floats((5, 70)).requires_grad_(), floats((37,)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = W8.linear(x, bias, differentiable=True)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == torch.float32
    want = ops.linear_backward_input(torch.ones(5, 37, dtype=torch.bfloat16), W8.packed, *W8.sizes)
    same_tensor(x.grad, want.float())


def test_compile_under_autocast() -> None:
    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return W8.linear(x, activation=1)

    x = floats((5, 70))
    same_tensor(torch.compile(cast, backend="aot_eager", fullgraph=True)(x), cast(x))
    assert cast(x).dtype == torch.bfloat16
