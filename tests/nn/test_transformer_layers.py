"""torch's transformer layers, whose fused inference paths read float weights directly."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:enable_nested_tensor")


def encoder(activation="gelu", norm_first=False, batch_first=True, dropout=0.1):
    torch.manual_seed(0)
    options = {"activation": activation, "batch_first": batch_first, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)


X = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [2]])


def close(got, expected, mask=None):
    if mask is not None:
        got, expected = got[~mask], expected[~mask]
    return ((got - expected).norm() / expected.norm()) < 0.02


def fused_layers(model, *args, **kwargs):
    """How many encoder layers took the fused path."""
    with torch.profiler.profile() as profile:
        model(*args, **kwargs)
    names = [event.name for event in profile.events()]
    return names.count("aten::_transformer_encoder_layer_fwd")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("activation", ["gelu", "relu", nn.functional.silu])
def test_an_encoder_computes_the_same_in_every_mode(training, grad, padding, activation):
    # Without dropout, which draws numbers in the order of memory: torch's result is a view.
    reference = encoder(activation, dropout=0.0).train(training)
    model = copy.deepcopy(reference)
    summary = qk.quantize_(model, qk.W8A8())
    layers = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["linear1", "linear2"]
    assert [row.name for row in summary.converted] == [
        f"layers.{i}.{layer}" for i in (0, 1) for layer in layers
    ]
    with torch.set_grad_enabled(grad):
        expected = reference(X, src_key_padding_mask=padding)
        got = model(X, src_key_padding_mask=padding)
    assert close(got, expected, padding)


def test_the_fused_path_ran_before_and_runs_again_afterwards():
    model = encoder().eval()
    with torch.no_grad():
        expected = model(X, src_key_padding_mask=PADDING)
        assert fused_layers(model, X, src_key_padding_mask=PADDING) == 2
        qk.quantize_(model, qk.W8A16())
        assert fused_layers(model, X, src_key_padding_mask=PADDING) == 0
        clone = copy.deepcopy(model)
        qk.dequantize_(model)
        assert fused_layers(model, X, src_key_padding_mask=PADDING) == 2
        assert close(model(X, src_key_padding_mask=PADDING), expected, PADDING)
        qk.dequantize_(clone)
        assert fused_layers(clone, X) == 2


def test_one_quantized_layer_leaves_the_others_fused():
    model = encoder().eval()
    reference = copy.deepcopy(model)
    qk.quantize_(model, {"layers.1.linear2": qk.W8A8()})
    with torch.no_grad():
        assert fused_layers(model, X) == 1
        assert close(model(X), reference(X))
        assert close(
            model(X, src_key_padding_mask=PADDING),
            reference(X, src_key_padding_mask=PADDING),
            PADDING,
        )


def test_attention_is_left_whole_and_says_why():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "other": nn.Linear(4, 4)})
    before = copy.deepcopy(attention)
    # Training must not change the names of parameters.
    notes = {row.name: row.note for row in qk.prepare_qat_(model, qk.W8A8())}
    assert "call qk.split_attention_(model) first" in notes["attention"]
    assert notes["attention.out_proj"] == "MultiheadAttention reads out_proj.weight directly"
    for training in (True, False):
        for module in (attention, before):
            module.train(training)
        with torch.no_grad():
            assert torch.equal(attention(X, X, X)[0], before(X, X, X)[0])
            padded = {"key_padding_mask": PADDING}
            assert torch.equal(attention(X, X, X, **padded)[0], before(X, X, X, **padded)[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_whole_transformer(training):
    torch.manual_seed(0)
    reference = nn.Transformer(32, 4, 2, 2, 64, dropout=0, batch_first=True).train(training)
    model = copy.deepcopy(reference)
    summary = qk.quantize_(model, qk.W8A8())
    assert len(summary.converted) == 2 * 6 + 2 * 10
    with torch.no_grad():
        masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
        got = model(X, X[:, :4], **masks)
        expected = reference(X, X[:, :4], **masks)
    assert close(got, expected)


def test_norm_first_and_sequence_first():
    for options in ({"norm_first": True}, {"batch_first": False}):
        model = encoder(**options).eval()
        reference = copy.deepcopy(model)
        qk.quantize_(model, qk.W8A8())
        with torch.no_grad():
            assert close(model(X), reference(X))


def test_loading_a_file_turns_the_fused_path_off(tmp_path):
    model = encoder().eval()
    qk.quantize_(model, qk.W8A8())
    qk.save_model(model, tmp_path / "m.safetensors")
    fresh = qk.load_model(encoder().eval(), tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(
            fresh(X, src_key_padding_mask=PADDING), model(X, src_key_padding_mask=PADDING)
        )


def test_a_layer_replaced_by_hand_fails_with_a_way_out():
    model = encoder().eval()
    model.layers[0].linear1 = QLinear.from_float(model.layers[0].linear1)
    with torch.no_grad(), pytest.raises(AttributeError, match="no float `weight`"):
        model(X)
