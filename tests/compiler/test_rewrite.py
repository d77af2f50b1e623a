"""What torch.compile(backend="qkernels") does to a graph, and that results stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import qkernels as qk
from qkernels.compiler import rewrite


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """An encoder layer of 40 features and 5 heads, with its norms behind or in front."""

    def __init__(self, norm_first=False, causal=False):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(40, 40) for _ in range(4))
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 40)
        self.norm1, self.norm2 = nn.LayerNorm(40), nn.LayerNorm(40)
        self.norm_first, self.causal = norm_first, causal

    def attend(self, x, mask):
        q, k, v = (
            layer(x).unflatten(-1, (5, 8)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1, self.training)

    def forward(self, x, mask=None):
        if self.norm_first:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def quantized(module, scheme=None, dtype=torch.float32):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    qk.quantize_(module.eval().to(dtype), scheme or qk.W8A8(), ignore=())
    return module


def through(module, *args, dynamic=None):
    """The result of the rewritten graph, what was done to it, and the ops that it calls."""
    done, ops = [], []

    def compiler(graph, _):
        done.append(rewrite(graph))
        ops.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])

        def run(given):
            return graph(*given)

        run._boxed_call = True
        return run

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        y = compiled(*args)
    return y, done[-1], ops[-1]


NOTHING = {"activation": 0, "norm": 0, "attention": 0, "shared": 0, "sequence": 0}
SCHEMES = (
    qk.W8A8(),
    qk.W8A8(activation="asymmetric"),
    qk.W4A8(group_size=8),
    qk.W4A16(group_size=8),
    qk.NF4(group_size=8),
)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_is_one_call(scheme, norm_first):
    block = quantized(Block(norm_first), scheme)
    x = torch.randn(3, 7, 40)
    mask = torch.rand(3, 1, 1, 7) > 0.3
    y, done, ops = through(block, x, mask)
    norms = 1 if norm_first else 2  # the first norm of the layer reads no sum
    assert done == {"activation": 1, "norm": norms, "attention": 1, "shared": 1, "sequence": 1}
    left = [op for op in ops if "getitem" not in op]
    if norm_first:  # a norm in front, and an addition behind
        assert left[0].startswith("aten.native_layer_norm") and left[-1].startswith("aten.add")
        left = left[1:-1]
    assert left == ["qkernels.op_sequence.default"]
    with torch.no_grad():
        torch.testing.assert_close(y, block(x, mask), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    block = quantized(Block(), dtype=dtype)
    x = torch.randn(2, 5, 40, dtype=dtype)
    y, done, _ = through(block, x)
    assert done["attention"] == 1 and done["norm"] == 2
    with torch.no_grad():
        assert F.mse_loss(y, block(x)) < 1e-3 * y.square().mean()


def test_causal_and_a_mask_to_add():
    block = quantized(Block(causal=True))
    x = torch.randn(2, 9, 40)
    y, done, _ = through(block, x)
    assert done["attention"] == 1
    with torch.no_grad():
        torch.testing.assert_close(y, block(x), rtol=2e-3, atol=2e-3)
    block = quantized(Block())
    bias = torch.randn(1, 5, 9, 9)
    y, done, _ = through(block, x, bias)
    assert done["attention"] == 1
    with torch.no_grad():
        torch.testing.assert_close(y, block(x, bias), rtol=2e-3, atol=2e-3)


def test_sizes_that_vary():
    block = quantized(Block())
    for rows in (2, 3):
        x = torch.randn(rows, 4 + rows, 40)
        y, done, _ = through(block, x, dynamic=True)
        assert done["attention"] == 1 and done["shared"] == 1
        with torch.no_grad():
            torch.testing.assert_close(y, block(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU6(), nn.Hardswish()],
    ids=str,
)
def test_every_activation_of_a_kernel(activation):
    model = quantized(nn.Sequential(nn.Linear(24, 16), activation))
    x = torch.randn(3, 24)
    y, done, ops = through(model, x)
    assert done == {**NOTHING, "activation": 1}
    assert len(ops) == 1
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


class Calls(nn.Module):
    """Two layers of 24 features, and a function that calls them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (F.gelu(y := m.a(x)), y),  # something else reads what the layer gives
        lambda m, x: F.hardtanh(m.a(x), -1, 1),
        lambda m, x: m.b(m.a(x)),  # layers of different inputs
        lambda m, x: (m.a(x), m.b(x + 1)),
        lambda m, x: m.norm(x),
        lambda m, x: m.norm(x + x[:1]),  # the sum has another shape than one of its terms
        lambda m, x: m.norm(torch.add(x, m.a(x), alpha=2)),
        lambda m, x: m.norm(x.double() + 1.0).float() if False else m.norm(x * 2),
    ],
)
def test_what_is_left_alone(function):
    model = quantized(Calls(function))
    x = torch.randn(3, 24)
    y, done, _ = through(model, x)
    assert {**done, "sequence": 0} == NOTHING
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda m, x: (m.a(x), m.b(x)), "shared"),
        (lambda m, x: (m.norm(y := x + m.a(x)), y * 2, y), "norm"),  # the sum is kept
        (lambda m, x: m.norm(x + m.a(x)).clone(), "norm"),
        (lambda m, x: F.relu(m.a(x)) + m.b(x), "activation"),
    ],
)
def test_what_is_put_together(function, what):
    model = quantized(Calls(function))
    x = torch.randn(3, 24)
    got, done, _ = through(model, x)
    assert done[what] == 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(-1), lambda y: y.t()])
def test_results_do_not_share_memory(view):
    model = quantized(Calls(lambda m, x: (y := m.a(x), view(y.clone()))))
    (a, b), _, _ = through(model, torch.randn(3, 24))
    assert a.data_ptr() != b.data_ptr()


def test_a_copy_of_what_is_written_to_stays():
    def function(m, x):
        before = x.clone().view(-1)
        x.add_(1)
        return before, m.a(x)

    x = torch.randn(3, 24)
    wanted = x.clone().view(-1)
    (before, _), _, _ = through(quantized(Calls(function)), x)
    assert torch.equal(before, wanted)


def test_heads_that_were_moved_keep_torchs_attention():
    def attend(m, x):
        q = torch.roll(m.a(x).unflatten(-1, (3, 8)).transpose(1, 2), 1, -1)
        return F.scaled_dot_product_attention(q.contiguous(), q, q)

    _, done, ops = through(quantized(Calls(attend)), torch.randn(2, 5, 24))
    assert done["attention"] == 0
    assert any("dot_product" in op for op in ops)
