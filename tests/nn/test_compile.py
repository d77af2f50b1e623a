"""torch.compile without graph breaks, torch.export, and training through a compiled model."""

import pytest
import torch
from torch import nn

import qkernels as qk


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(30, 32),
        nn.Linear(32, 48),
        nn.GELU(),
        nn.Linear(48, 16),
        nn.Linear(16, 16, bias=False),
    )
    qk.quantize_(model, scheme)
    return model


TOKENS = torch.tensor([[1, 2, 29]])


def test_compiles_as_one_graph(scheme):
    model = model_of(scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(TOKENS), model(TOKENS))
    body, tail = model[1:], torch.compile(model[1:], fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 32, requires_grad=True)
    expected = torch.autograd.grad(body(x).sum(), [x, model[1].bias])
    got = torch.autograd.grad(tail(x).sum(), [x, model[1].bias])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_many_sizes_do_not_exhaust_the_compiler():
    model = nn.Sequential(*(nn.Linear(8 + i, 9 + i) for i in range(12)))
    qk.quantize_(model, qk.W8A8())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 2, 3, 5):
            x = torch.randn(rows, 8)
            assert torch.equal(compiled(x), model(x))


def test_inductor_and_dynamic_shapes():
    model = model_of(qk.W8A8())[1:]
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(compiled(x), model(x))


def test_exports_with_a_dynamic_batch(scheme, tmp_path):
    model = model_of(scheme).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (TOKENS.expand(2, 3),), dynamic_shapes=({0: batch},))
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert {"qkernels.embedding.default", "qkernels.linear.default"} <= targets
        for rows in (1, 5):
            tokens = TOKENS.repeat(rows, 1)
            assert torch.equal(program.module()(tokens), model(tokens))
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2")
        assert torch.equal(again.module()(TOKENS), model(TOKENS))


def test_export_in_grad_mode_works_too():
    model = model_of(qk.W8A8())
    program = torch.export.export(model, (TOKENS,))
    assert torch.equal(program.module()(TOKENS), model(TOKENS))


def test_a_static_scheme_compiles():
    torch.manual_seed(0)
    layer = qk.nn.QLinear.from_float(nn.Linear(32, 8), qk.W8A8(static=True), x_scale=0.02)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_float64_compiles():
    model = model_of(qk.W8A8())[1:].double()
    x = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert got.dtype == torch.float64
        assert torch.equal(got, model(x))


def test_symbolic_tracing(scheme):
    model = model_of(scheme)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(TOKENS), model(TOKENS))
    traced(TOKENS).sum().backward()
    assert model[1].bias.grad is not None


def test_a_compiled_model_converts_and_saves(tmp_path):
    model = nn.Sequential(nn.Linear(32, 8))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 32)
    compiled(x)
    summary = qk.quantize_(compiled, qk.W8A8())
    assert len(summary.converted) == 1
    assert torch.equal(compiled(x), model(x))
    qk.save_model(compiled, tmp_path / "m.safetensors")
    loaded = qk.load_model(nn.Sequential(nn.Linear(32, 8)), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), model(x))
