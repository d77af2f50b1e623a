"""torch.compile(model, backend="qkernels")."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.compiler import backend


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    qk.quantize_(model, qk.W8A8(), ignore=())
    return model


def test_its_name_is_known_to_torch():
    assert "qkernels" in torch._dynamo.list_backends()


def test_inference_by_inductor():
    model = encoder()
    compiled = torch.compile(model, backend="qkernels")
    for rows in (2, 3):  # the second one makes the size vary
        x = torch.randn(rows, 6, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-3, atol=2e-3)


def test_training_is_left_to_inductor():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    qk.quantize_(model[0:1], qk.W8A8(), ignore=())
    compiled = torch.compile(model, backend="qkernels")
    x = torch.randn(3, 16, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, model[2].weight])
    got = torch.autograd.grad(compiled(x).square().sum(), [x, model[2].weight])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_options_are_inductors():
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    qk.quantize_(model, qk.W8A8(), ignore=())
    x = torch.randn(2, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"epilogue_fusion": False})
        assert torch.equal(compiled(x), model(x))
        with pytest.raises(Exception, match="no_such_option"):
            torch.compile(model, backend=backend, options={"no_such_option": 1})(x)


class BeginsACache(nn.Module):
    """Appends its keys to a cache that is empty yet, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(16, 16)

    def forward(self, x):
        key = self.key(x).view(2, 5, 4, 4).transpose(1, 2)
        return torch.cat([torch.empty(0), key], -2).reshape(8, -1, 4)


def test_strides_that_inductor_chooses_otherwise():
    model = BeginsACache().eval()
    qk.quantize_(model, qk.W8A8())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="qkernels")(x), model(x))
