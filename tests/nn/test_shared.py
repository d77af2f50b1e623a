"""fuse_(run=...): layers of one input, computed together, give what they give alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear
from qkernels.nn import shared as shared_inputs

SCHEMES = (
    qk.W8A8(),
    qk.W8A8(activation="asymmetric"),
    qk.W4A8(group_size=8),
    qk.W4A16(group_size=16),
)


class Attention(nn.Module):
    """Three layers of x with 33, 16 and 80 outputs, and one of their product's input."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(40, 33), nn.Linear(40, 16), nn.Linear(40, 80)
        self.out = nn.Linear(80, 5)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return q, k, v, self.out(v)


def made(scheme=SCHEMES[0], bias=True):
    torch.manual_seed(0)
    model = Attention().eval()
    if not bias:
        model.key = nn.Linear(40, 16, bias=False)
    qk.quantize_(model, scheme, ignore=())
    return model


def run(model):
    return model(torch.randn(2, 40))


def fused(model):
    model = copy.deepcopy(model)
    qk.fuse_(model, run=run)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How many products each call of the common op computed."""
    seen = []
    call = shared_inputs._CALL

    def counting(x, packed, *args):
        seen.append(len(packed))
        return call(x, packed, *args)

    monkeypatch.setattr(shared_inputs, "_CALL", counting)
    return seen


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()
        assert x.dtype == y.dtype


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 5, 40), (0, 40), (131, 40)], ids=str)
def test_bits_stay(scheme, shape, calls):
    plain = made(scheme, bias=False)
    model = fused(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            same(model(x), plain(x))
        with torch.inference_mode():
            same(model(x.clone()), plain(x))
        assert not x.__dict__
    assert calls == [3] * 4


def test_many_rows_and_threads(calls):
    """Rows that are cut in pieces, and weights of which a thread gets a part."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(256, 300), "b": nn.Linear(256, 16)}).eval()
    qk.quantize_(plain, qk.W8A8(), ignore=())
    model = copy.deepcopy(plain)
    qk.fuse_(model, run=lambda m: [m[k](x) for x in [torch.ones(1, 256)] for k in "ab"])
    with torch.no_grad():
        for rows in (9, 500):
            x = torch.randn(rows, 256)
            same([model[k](x) for k in "ab"], [plain[k](x) for k in "ab"])
    assert calls == [2, 2]


def test_what_is_said_and_the_way_back(calls):
    model = made()
    summary = qk.fuse_(model, run=run)
    names = {row.name: row.became for row in summary.converted}
    assert names == {
        "query": "QLinear, computed together with key, value",
        "key": "QLinear, computed together with query, value",
        "value": "QLinear, computed together with query, key",
    }
    assert model.query.shared.layers == (model.query, model.key, model.value)
    assert [row.name for row in qk.unfuse_(model)] == ["query", "key", "value"]
    with torch.no_grad():
        run(model)
    assert not calls
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_ignored_and_unlike_layers_stay_alone():
    model = made()
    assert len(qk.fuse_(model, run=run, ignore="key")) == 2
    static = made()
    static.key = QLinear.from_float(nn.Linear(40, 16), qk.W8A8(static=True), x_scale=0.1)
    static.value.set_input_transform(torch.ones(40), None)
    assert not qk.fuse_(static, run=run).rows

    class Changing(Attention):
        def forward(self, x):
            x = x + 0
            q = self.query(x)
            x += 1
            return q, self.key(x), self.value(x)

    model = made()
    model.__class__ = Changing
    assert [row.name for row in qk.fuse_(model, run=run)] == ["key", "value"]


def test_other_inputs_are_computed_alone(calls):
    plain = made()
    model = fused(plain)
    x, other = torch.randn(3, 40), torch.randn(3, 40)
    with torch.no_grad():
        # Before the first layer, with another tensor, and after a write to the tensor.
        assert torch.equal(model.key(x), plain.key(x))
        model.query(x)
        assert torch.equal(model.key(other), plain.key(other))
        x += 1
        assert torch.equal(model.key(x), plain.key(x))
        model.query(x)
        model.key.set_input_transform(torch.full((40,), 2.0), None)
        plain.key.set_input_transform(torch.full((40,), 2.0), None)
        assert torch.equal(model.key(x), plain.key(x))
        assert torch.equal(model.value(x), plain.value(x))
    assert calls == [3, 3]


def test_gradients_and_compiled_models(calls):
    plain = made()
    model = fused(plain)
    x, y = (torch.ones(3, 40, requires_grad=True) for _ in range(2))
    sum(out.sum() for out in model(x)).backward()
    sum(out.sum() for out in plain(y)).backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model.key.bias.grad, plain.key.bias.grad)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        same(compiled(x.detach()), plain(x.detach()))
    assert not calls


def test_errors_name_the_layer():
    model = fused(made())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"QLinear.*has 39 features"):
        model(torch.randn(2, 39))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(way, calls):
    model = fused(made())
    other = way(model)
    assert other.query.shared.layers == (other.query, other.key, other.value)
    x = torch.randn(2, 40)
    with torch.no_grad():
        same(other(x), model(x))
        other.query.bias.zero_()
        assert not torch.equal(other.query(x), model.query(x))
    assert calls == [3] * 4
    assert type(qk.dequantize_(other) and other.query) is nn.Linear
    assert "shared" not in other.query.__dict__


def test_a_replica_computes_alone(calls):
    """As nn.DataParallel makes them: a copy of the attributes, which names the original layers."""
    model = fused(made())
    replica = model.query._replicate_for_data_parallel()
    replica.packed, replica.bias = model.query.packed.clone(), model.query.bias + 1
    x = torch.randn(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(replica(x), model.query(x) + 1)
    assert calls == [3]


def test_files_say_nothing_of_it(tmp_path, calls):
    path = tmp_path / "model.safetensors"
    model = fused(made())
    qk.save_model(model, path)
    other = Attention().eval()
    qk.load_model(other, path)
    assert other.query.shared is None
    x = torch.randn(2, 40)
    with torch.no_grad():
        same(other(x), model(x))
    assert calls == [3]


def test_bad_arguments_of_the_op():
    layer = made().query
    op = torch.ops.qkernels.linear_shared
    with pytest.raises(RuntimeError, match="one item for each weight, got 1, 0, 1 and 1"):
        op(torch.ones(1, 40), [layer.packed], [], layer.layout, 40, [33], -1, 1, [0])
    with pytest.raises(RuntimeError, match="linear_shared: packed must have shape"):
        op(torch.ones(1, 40), [layer.packed], [None], layer.layout, 40, [50], -1, 1, [0])
