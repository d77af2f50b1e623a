"""state_dict of quantized modules: keys, strict loading, all or nothing, the meta device."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QEmbedding, QLinear
from qkernels.nn.storage import StorageForm


@pytest.fixture
def quantized(mlp, scheme):
    model = mlp()
    qk.quantize_(model, scheme)
    return model


def other_values(model):
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    for module in other:
        if isinstance(module, QLinear):
            module.reset_parameters()
    return other


def snapshot(model):
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.named_parameters())


def test_keys_and_types_are_the_storage_layout(quantized, scheme):
    state = quantized.state_dict()
    weight = ["0.weight", "0.weight_scale"]
    if not scheme.symmetric:
        weight.append("0.weight_zero_point")
    assert list(state)[: len(weight) + 1] == [*weight, "0.bias"]
    q = qk.quantize(
        torch.zeros(33, 70), scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
    )
    assert state["0.weight"].dtype == q.data.dtype
    assert state["0.weight"].shape == q.data.shape
    assert state["0.weight_scale"].dtype == q.scale.dtype
    assert state["0.weight_scale"].shape == q.scale.shape
    assert state._metadata["0"] == {"version": 2}


def test_zero_points_in_whole_codes_are_refused(quantized, scheme, x):
    state = quantized.state_dict()
    for about in state._metadata.values():
        about["version"] = 1
    other = other_values(quantized)
    before = snapshot(other)
    if scheme.format == "int4" and not scheme.symmetric:
        with pytest.raises(RuntimeError, match="0.weight cannot be read: .*were whole codes"):
            other.load_state_dict(state)
        assert unchanged(other, before)
    else:
        other.load_state_dict(state)
        assert torch.equal(other(x), quantized(x))


def test_pickles_with_zero_points_in_whole_codes_are_refused(quantized, scheme):
    call, arguments = StorageForm.of(quantized[0].packed, quantized[0].packing).__reduce__()
    assert torch.equal(call(*arguments), quantized[0].packed)
    if scheme.format == "int4" and not scheme.symmetric:
        with pytest.raises(ValueError, match="pickled weight .*were whole codes"):
            call(*arguments[:-1])
    else:
        assert torch.equal(call(*arguments[:-1]), quantized[0].packed)


def test_round_trip_through_bytes(quantized, x):
    stream = io.BytesIO()
    torch.save(quantized.state_dict(), stream)
    stream.seek(0)
    other = other_values(quantized)
    assert not torch.equal(other(x), quantized(x))
    kept = other[0].packed
    result = other.load_state_dict(torch.load(stream, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(x), quantized(x))
    assert other[0].packed is kept


def test_state_dict_is_a_copy(quantized, x):
    y = quantized(x)
    state = quantized.state_dict()
    for tensor in (state["0.weight"], state["0.weight_scale"]):
        tensor.zero_()
    assert torch.equal(quantized(x), y)
    assert quantized.state_dict()["0.weight"].count_nonzero()


def test_one_destination_filled_by_two_calls():
    layer = QLinear(8, 4)
    state = {}
    for name in ("before.", "after."):
        layer.state_dict(destination=state, prefix=name)
        layer.reset_parameters()
    assert not torch.equal(state["before.weight"], state["after.weight"])
    from collections import OrderedDict

    state = OrderedDict()
    for name in ("before.", "after."):
        layer.state_dict(destination=state, prefix=name)
        layer.reset_parameters()
    assert not torch.equal(state["before.weight"], state["after.weight"])


@pytest.mark.parametrize("key", ["0.weight", "0.weight_scale", "2.weight"])
def test_a_missing_key_is_reported_as_torch_does_and_leaves_the_module(quantized, key):
    state = quantized.state_dict()
    del state[key]
    other = other_values(quantized)
    before = snapshot(other)
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        other.load_state_dict(state)
    index = key[0]
    assert all(torch.equal(t, before[n]) for n, t in other.named_parameters() if n[0] == index)


def test_an_unexpected_key_is_reported(quantized):
    state = quantized.state_dict()
    state["0.weight_scales"] = torch.ones(1)
    state["0.packed"] = torch.ones(1)
    state["0.a.b"] = torch.ones(1)
    with pytest.raises(RuntimeError) as caught:
        quantized.load_state_dict(state)
    assert '"0.weight_scales", "0.packed", "0.a.b"' in str(caught.value)


@pytest.mark.parametrize("key", ["0.weight", "0.weight_scale", "0.bias"])
def test_a_wrong_shape_is_reported_and_nothing_of_the_module_is_loaded(quantized, key):
    state = quantized.state_dict()
    state[key] = state[key][1:]
    other = other_values(quantized)
    before = snapshot(other)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: copying a param with"):
        other.load_state_dict(state)
    assert torch.equal(other[0].packed, before["0.packed"])
    assert torch.equal(other[0].bias, before["0.bias"])


def test_a_float_checkpoint_is_told_apart(mlp, quantized):
    with pytest.raises(RuntimeError) as caught:
        quantized.load_state_dict(mlp().state_dict())
    text = str(caught.value)
    assert "0.weight_scale" in text
    # int8 weights have the float shape, so the type is what tells; others differ in shape already.
    assert "quantize_" in text or "size mismatch for 0.weight" in text


def test_another_scheme_is_told_apart(mlp):
    a, b = mlp(), mlp()
    qk.quantize_(a, qk.W8A16(scale_dtype=torch.bfloat16))
    qk.quantize_(b, qk.W8A16())
    with pytest.raises(RuntimeError, match=r"0.weight_scale is torch.bfloat16.*torch.float32"):
        b.load_state_dict(a.state_dict())
    qk.quantize_(a := mlp(), qk.W4A16(16, symmetric=True))
    qk.quantize_(b := mlp(), qk.W4A16(16))
    with pytest.raises(RuntimeError, match="weight_zero_point"):
        b.load_state_dict(a.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_zero_point"):
        a.load_state_dict(b.state_dict())


def test_strict_false_takes_whole_units_only(quantized, scheme):
    other = other_values(quantized)
    before = snapshot(other)
    everything_else = {k: v for k, v in quantized.state_dict().items() if k != "0.bias"}
    other.load_state_dict(everything_else, strict=False)
    assert torch.equal(other[0].packed, quantized[0].packed)
    assert torch.equal(other[0].bias, before["0.bias"])
    other = other_values(quantized)
    bias_only = {"0.bias": quantized.state_dict()["0.bias"]}
    result = other.load_state_dict(bias_only, strict=False)
    assert torch.equal(other[0].bias, quantized[0].bias)
    assert torch.equal(other[0].packed, before["0.packed"])
    assert not result.unexpected_keys
    without_scale = {k: v for k, v in quantized.state_dict().items() if k != "0.weight_scale"}
    with pytest.raises(RuntimeError, match=r"0\.weight_scale must come with"):
        other.load_state_dict(without_scale, strict=False)
    assert torch.equal(other[0].packed, before["0.packed"])


def test_load_pre_hooks_run_once():
    layer = QLinear(8, 4)
    calls = []
    layer.register_load_state_dict_pre_hook(lambda *a: calls.append(1))
    layer.load_state_dict(layer.state_dict())
    assert calls == [1]


def meta_copy(scheme):
    with torch.device("meta"):
        return nn.Sequential(
            QLinear(70, 33, scheme=scheme), nn.ReLU(), QLinear(33, 18, False, scheme)
        )


def test_meta_then_assign(quantized, scheme, x):
    model = meta_copy(scheme)
    assert model(x.to("meta")).shape == (5, 18)
    assert all(t.is_meta for t in model.state_dict().values())
    model.load_state_dict(quantized.state_dict(), assign=True)
    assert torch.equal(model(x), quantized(x))
    assert not model[0].packed.requires_grad
    assert model[0].bias.requires_grad


def test_meta_without_assign_warns_as_torch_does(quantized, scheme):
    model = meta_copy(scheme)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(quantized.state_dict())
    assert any("assign=True" in str(w.message) for w in caught)
    assert model[0].packed.is_meta


def test_meta_to_empty_then_load(quantized, scheme, x):
    model = meta_copy(scheme).to_empty(device="cpu")
    model.load_state_dict(quantized.state_dict())
    assert torch.equal(model(x), quantized(x))
    assert torch.nn.utils.skip_init(QLinear, 70, 33, scheme=scheme)(x).shape == (5, 33)


def test_embedding_round_trip(scheme):
    a, b = QEmbedding(20, 10, scheme=scheme), QEmbedding(20, 10, scheme=scheme)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.packed, b.packed)
    assert list(a.state_dict())[:2] == ["weight", "weight_scale"]


def test_swap_on_conversion(quantized, x):
    with torch.no_grad():
        expected = quantized(x)
    state = quantized.state_dict()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        quantized.to(torch.bfloat16).to(torch.float32)
        quantized.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert torch.equal(quantized(x), expected)
