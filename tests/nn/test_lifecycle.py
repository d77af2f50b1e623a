"""Moving, casting, copying, pickling, sharing and tying quantized modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import qkernels as qk
from qkernels.nn import QEmbedding, QLinear


@pytest.fixture
def quantized(mlp, scheme):
    model = mlp()
    qk.quantize_(model, scheme)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_leaves_the_weight(quantized, dtype, x):
    packed, before = quantized[0].packed, quantized[0].packed.clone()
    expected = quantized(x)
    quantized.to(dtype)
    y = quantized(x.to(dtype))
    assert y.dtype == quantized[0].bias.dtype == quantized[0].dtype == dtype
    assert ((y.float() - expected).norm() / expected.norm()) < 0.03
    assert quantized[0].packed is packed
    assert torch.equal(packed, before)
    assert quantized[0].dequantize().weight.dtype == dtype


def test_module_type_leaves_the_weight(quantized, x):
    quantized.type(torch.bfloat16)
    assert quantized[0].packed.dtype == torch.uint8
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


def test_named_casts(quantized, x):
    for cast, dtype in (
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("double", torch.float64),
        ("float", torch.float32),
    ):
        getattr(quantized, cast)()
        assert quantized(x.to(dtype)).dtype == dtype


def test_devices_without_kernels_are_refused_before_anything_moves():
    with FakeTensorMode():
        layer = QLinear(8, 4)
        layer.qualified_name = "head"
        with pytest.raises(RuntimeError, match=r"QLinear 'head': .*no kernels for device 'xpu'"):
            layer.to_empty(device="xpu")
        assert layer.packed.device.type == layer.bias.device.type == "cpu"
        with pytest.raises(RuntimeError, match="no kernels for device 'xpu'"):
            QLinear(8, 4, device="xpu")
    assert QLinear(8, 4).to("meta").packed.is_meta


def test_deepcopy_is_independent(quantized, x):
    clone = copy.deepcopy(quantized)
    expected = quantized(x)
    assert torch.equal(clone(x), expected)
    clone[0].reset_parameters()
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(clone(x), expected)


def test_shallow_copy_shares(quantized, x):
    twin = copy.copy(quantized[0])
    assert twin.packed is quantized[0].packed
    assert torch.equal(twin(x), quantized[0](x))


def test_pickle_is_in_storage_layout(quantized, scheme, x):
    data = pickle.dumps(quantized)
    loaded = pickle.loads(data)
    assert torch.equal(loaded(x), quantized(x))
    assert not loaded[0].packed.requires_grad
    state = quantized.state_dict()
    stored = sum(t.nbytes for t in state.values())
    assert len(data) < stored + 6000
    stream = io.BytesIO()
    torch.save(quantized, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), quantized(x))


def test_pickle_keeps_mode_hooks_and_names(mlp, x):
    model = mlp().eval()
    qk.quantize_(model, qk.W8A8())
    loaded = pickle.loads(pickle.dumps(model))
    assert not loaded[0].training
    assert loaded[0].qualified_name == "0"


class Tied(nn.Module):
    """A language model in miniature."""

    def __init__(self, bias=False):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 40, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.body(self.embed(tokens))))


@pytest.fixture
def tied(scheme):
    torch.manual_seed(0)
    model = Tied()
    qk.quantize_(model, scheme)
    return model


TOKENS = torch.tensor([[1, 2, 39]])


def is_tied(model):
    return model.embed.packed is model.head.packed


def test_tied_modules_share_one_packed_weight(tied):
    assert is_tied(tied)
    assert len(list(tied.parameters())) == 3
    expected = tied.head.dequantize().weight
    assert torch.equal(tied.embed(torch.arange(40)), expected)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.bfloat16).float(),
    ],
    ids=["deepcopy", "pickle", "to"],
)
def test_ties_survive(tied, duplicate):
    expected = tied(TOKENS)
    other = duplicate(tied)
    assert is_tied(other)
    torch.testing.assert_close(other(TOKENS), expected, rtol=0.02, atol=0.02)


def test_tied_state_dict_holds_the_weight_once(tied):
    state = tied.state_dict()
    for key in ("weight", "weight_scale"):
        a, b = state[f"embed.{key}"], state[f"head.{key}"]
        assert a.data_ptr() == b.data_ptr()
    state["embed.weight"].zero_()
    assert tied.state_dict()["embed.weight"].count_nonzero()
    other = copy.deepcopy(tied)
    other.embed.reset_parameters()
    other.load_state_dict(tied.state_dict())
    assert is_tied(other)
    assert torch.equal(other(TOKENS), tied(TOKENS))


def test_tied_pickle_holds_the_weight_once(scheme):
    torch.manual_seed(0)
    model = Tied()
    model.embed, model.head = QEmbedding(999, 512, scheme=scheme), QLinear(512, 999, False, scheme)
    apart = len(pickle.dumps(model))
    model.head.packed = model.embed.packed
    together = len(pickle.dumps(model))
    assert apart - together > 0.9 * sum(t.nbytes for t in model.embed.state_dict().values())


def test_share_memory(quantized):
    quantized.share_memory()
    assert all(p.is_shared() for p in quantized.parameters())
    assert quantized[0].dtype == torch.float32


def test_functional_call_takes_packed(quantized, x):
    other = copy.deepcopy(quantized)
    other[0].reset_parameters()
    parameters = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(quantized, parameters, (x,)), other(x))
