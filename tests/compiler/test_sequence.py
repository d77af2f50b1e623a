"""Calls that backend="qkernels" makes one op of: the same bits, whatever stands between them."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .test_rewrite import SCHEMES, Block, Calls, quantized, through

rewriting = importlib.import_module("qkernels.compiler.rewrite")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compared(monkeypatch, model, *args, **options):
    """The result, those of a graph whose calls stay apart, and how many sequences there are."""
    got, done, ops = through(model, *args, **options)
    torch._dynamo.reset()
    monkeypatch.setattr(rewriting, "join_calls", lambda graph: 0)
    wanted, _, _ = through(model, *args, **options)
    monkeypatch.undo()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    return done["sequence"], ops


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(True), Block(causal=True)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], None], ids=str)
def test_the_same_bits(scheme, monkeypatch):
    dtype = torch.float32 if scheme else torch.bfloat16
    x = torch.randn(2, 7, 40, dtype=dtype)
    # The second layer begins with a norm of no sum and ends with a sum of no norm.
    count, _ = compared(monkeypatch, quantized(Encoder(), scheme, dtype), x)
    assert count == 3


def test_sizes_that_vary(monkeypatch):
    for rows in (2, 3):
        model, x = quantized(Block()), torch.randn(rows, 4 + rows, 40)
        assert compared(monkeypatch, model, x, dynamic=True)[0] == 1


def late(m, x):
    """Something between two calls reads the first one's result, and nothing of the second's."""
    y = m.a(x)
    z = y * 2
    return m.b(y), z


def early(m, x):
    """The second call needs what was made between the two, but of neither."""
    y = m.a(x)
    return m.b(x.roll(1, 0)), y, y.sum()


def twice(m, x):
    """A result is read by two calls, and returned."""
    y = m.a(x)
    return m.norm(y + m.b(y)), y


def split(m, x):
    """A call needs what was made of the results of two that were put together."""
    y = m.b(m.a(x))
    z = m.a(y.sin())
    return m.b(z) + y


def written(m, x):
    y = m.a(x)
    x.add_(1)
    return m.b(x), y


def alone(m, x):
    return m.b(m.a(x).sin())


@pytest.mark.parametrize(
    ("function", "count"),
    [(late, 1), (early, 1), (twice, 1), (split, 2), (written, 1), (alone, 0)],
)
def test_what_stands_between(function, count, monkeypatch):
    model = quantized(Calls(function))
    x = torch.randn(3, 24)
    with torch.no_grad():
        wanted = model(x.clone())
    got, done, _ = through(model, x.clone())
    torch.testing.assert_close(got, wanted)
    assert done["sequence"] == count


def test_views_that_change_something_stay():
    def turned(m, x):
        y = m.a(x).view(2, 3, 4, 6).transpose(1, 2)
        return m.b(y.reshape(2, 3, 24))

    def turned_back(m, x):
        y = m.a(x).view(2, 3, 4, 6).transpose(1, 2)
        return m.b(y.transpose(1, 2).reshape(2, 3, 24))

    x = torch.randn(2, 3, 24)
    for function, count in ((turned, 0), (turned_back, 1)):
        model = quantized(Calls(function))
        y, done, _ = through(model, x)
        assert done["sequence"] == count
        with torch.no_grad():
            torch.testing.assert_close(y, model(x))
        torch._dynamo.reset()


def test_a_view_that_is_returned_stays_one():
    model = quantized(Calls(lambda m, x: (y := m.a(x), y.view(3, 4, 6).view(3, 24))))
    (a, b), _, _ = through(model, torch.randn(3, 24))
    assert torch.equal(a, b) and a.data_ptr() == b.data_ptr()


def test_static_scales_and_orders_of_features(monkeypatch):
    model = quantized(Calls(lambda m, x: m.norm(x + m.b(F.relu(m.a(x))))))
    for layer in (model.a, model.b):
        layer.set_input_transform(torch.rand(24) + 0.5, torch.randperm(24))
    assert compared(monkeypatch, model, torch.randn(5, 24))[0] == 1
