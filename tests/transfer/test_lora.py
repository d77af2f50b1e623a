"""Adapters: outputs and gradients against dense float64, and the life of a model that has them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.nn import QLinear
from qkernels.transfer import LoRALinear, add_lora_, remove_


def randomized(model, seed=3):
    """With other than zero updates."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for parameter in (module.lora_a, module.lora_b):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def float64_weight(base):
    weight = base.float_weight() if isinstance(base, QLinear) else base.weight
    return weight.detach().double()


@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_against_dense_float64(mlp, scheme, x, rslora):
    model = mlp(scheme)
    add_lora_(model, rank=5, alpha=7, targets="0", rslora=rslora)
    layer = randomized(model)[0]
    scaling = 7 / 5**0.5 if rslora else 7 / 5
    a, b = layer.lora_a.detach().double(), layer.lora_b.detach().double()
    weight, bias = float64_weight(layer.base), layer.base.bias.detach().double()
    x.requires_grad_(True)
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(grad)

    inner, outer = x.detach().double(), grad.double()
    expected = inner @ (weight + scaling * b @ a).T + bias
    # Integer schemes quantize x for the base, by less than half a step of amax / 127.
    integer = scheme is not None and scheme.activation != "float"
    atol = (inner.abs().amax(1, True) / 254 * weight.abs().sum(1)).max().item() if integer else 2e-5
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=atol)
    if integer:
        narrow = y.detach() - layer.base(x).detach()
        torch.testing.assert_close(narrow.double(), scaling * inner @ a.T @ b.T, rtol=0, atol=1e-4)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(x.grad.double(), outer @ (weight + scaling * b @ a), **close)
    torch.testing.assert_close(layer.lora_a.grad.double(), scaling * (outer @ b).T @ inner, **close)
    torch.testing.assert_close(
        layer.lora_b.grad.double(), scaling * outer.T @ (inner @ a.T), **close
    )
    assert layer.base.bias.grad is None


def test_a_new_adapter_changes_nothing(mlp, scheme, x):
    model = mlp(scheme)
    expected = model(x)
    table = add_lora_(model, rank=3)
    assert torch.equal(model(x), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.lora_{c}" for i in (0, 2) for c in "ab"
    }
    assert table.trainable == 3 * (70 + 33 + 33 + 18)
    assert model[0].lora_a.std() > 0.01


def test_training_moves_adapters_only(mlp, scheme, x):
    model = mlp(scheme)
    add_lora_(model, rank=4)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = torch.randn(5, 18, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_dropout_is_on_the_adapters_input_alone(mlp, x):
    model = mlp(qk.W8A16())
    add_lora_(model, rank=4, targets="0", dropout=0.5)
    layer = randomized(model)[0]
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    kept = F.dropout(x, 0.5)
    expected = layer.base(x) + layer.scaling * (kept @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(y, expected)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_default_targets_are_the_quantized_layers(mlp):
    model = mlp(None)
    qk.quantize_(model, qk.W8A8(), ignore="2")
    add_lora_(model)
    assert isinstance(model[0], LoRALinear) and type(model[2]) is nn.Linear
    assert not model[2].weight.requires_grad


def test_modules_to_save_train_in_full(mlp, x):
    model = mlp(None)
    qk.quantize_(model, qk.W8A8(), ignore="2")
    add_lora_(model, targets="*", modules_to_save="2")
    assert type(model[2]) is nn.Linear and model[2].weight.requires_grad
    model(x).sum().backward()
    assert model[2].weight.grad is not None


def test_hooks_fire_once_on_the_whole_output(mlp, x):
    model = mlp(qk.W8A8())
    seen = []
    handle = model[0].register_forward_hook(lambda _, __, y: seen.append(y))
    add_lora_(model, targets="0")
    y = randomized(model)[0](x)
    assert len(seen) == 1 and torch.equal(seen[0], y)
    remove_(model)
    model(x)
    assert len(seen) == 2
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_remove_gives_the_layers_back(mlp, scheme, x):
    model = mlp(scheme).eval()
    expected, layer = model(x), model[0]
    add_lora_(model, dropout=0.1)
    randomized(model)
    assert not torch.allclose(model(x), expected)
    remove_(model)
    assert model[0] is layer and torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="has no adapters"):
        remove_(model)


def test_shared_layers_share_their_adapter(x):
    shared = nn.Linear(70, 70)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    qk.quantize_(model, qk.W4A8(16))
    add_lora_(model)
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)
    assert len(list(model.parameters())) == 4
    remove_(model)
    assert model[0] is model[2] and isinstance(model[0], QLinear)


# ---- life ----------------------------------------------------------------------------------------


def test_state_dict_deepcopy_and_pickle(mlp, scheme, x):
    model = mlp(scheme)
    add_lora_(model, rank=3)
    expected = randomized(model)(x)
    other = mlp(scheme)
    add_lora_(other, rank=3)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        twin[0].lora_b.data.zero_()
    assert torch.equal(model(x), expected)


def test_whole_model_files(mlp, scheme, x, tmp_path):
    model = mlp(scheme)
    add_lora_(model, rank=3)
    qk.save_model(randomized(model), tmp_path / "all.safetensors")
    other = mlp(None)
    add_lora_(other, rank=3)
    qk.load_model(other, tmp_path / "all.safetensors")
    assert torch.equal(other(x), model(x))


def test_quantizing_after_adding_leaves_the_adapters(mlp, x):
    model = mlp(None)
    add_lora_(model, rank=3)
    randomized(model)
    update = model[0].update()
    qk.quantize_(model, qk.W8A16())
    assert isinstance(model[0].base, QLinear) and torch.equal(model[0].update(), update)
    model(x).sum().backward()
    assert model[0].lora_a.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(mlp, scheme, x, dtype):
    model = mlp(scheme)
    add_lora_(model, rank=4)
    expected = randomized(model)(x).double()
    half = copy.deepcopy(model).to(dtype)
    assert half[0].lora_a.dtype == dtype
    y = half(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.1)


def test_autocast(mlp, scheme, x):
    model = mlp(scheme)
    add_lora_(model, rank=4)
    expected = randomized(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert model[0].lora_a.dtype == model[0].lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients(mlp, scheme, x):
    model = mlp(scheme)
    add_lora_(model, rank=4, dropout=0.2)
    randomized(model)
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(11)
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiles_as_one_graph(mlp, scheme, x):
    torch._dynamo.reset()
    model = mlp(scheme)
    add_lora_(model, rank=4)
    randomized(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    found = torch.autograd.grad(compiled(x).square().sum(), trained)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("quantized", [False, True])
def test_torchs_transformer_layers_run_with_adapters(quantized):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2
    ).eval()
    if quantized:
        qk.quantize_(encoder, {"linear1": qk.W8A16(), "linear2": qk.W8A16()})
    x = torch.randn(2, 3, 16)
    with torch.inference_mode():
        expected = encoder(x)
    add_lora_(encoder, targets=("linear1", "linear2"))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)
        randomized(encoder)
        assert not torch.allclose(encoder(x), expected, atol=1e-2)
        remove_(encoder)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank is 0; expected an integer of 1 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": "encoder"}, "targets names 'encoder', which matches no"),
        ({"targets": "1"}, "targets='1' matches no linear or convolution layer"),
        ({"modules_to_save": "2"}, "2 (QLinear), whose quantized weight cannot train"),
    ],
)
def test_bad_settings_change_nothing(mlp, options, sentence):
    model = mlp(qk.W8A8())
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError) as caught:
        add_lora_(model, **options)
    assert str(caught.value).startswith("add_lora_: ") and sentence in str(caught.value)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


def test_two_adapters_on_one_layer_are_refused(mlp):
    model = mlp(qk.W8A8())
    add_lora_(model, targets="0")
    with pytest.raises(ValueError, match="0: it has an adapter already"):
        add_lora_(model, targets="0")
    add_lora_(model)  # the layer that has none gets one
    assert isinstance(model[2], LoRALinear) and type(model[0].base) is QLinear
    with pytest.raises(ValueError, match="has adapters already; call merge_ or remove_ first"):
        add_lora_(model)


def test_a_layer_alone_cannot_be_wrapped_in_place():
    with pytest.raises(ValueError, match="no linear or convolution layer that could have"):
        add_lora_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="base is ReLU"):
        LoRALinear(nn.ReLU())
    with pytest.raises(ValueError, match="itself a LoRALinear"):
        remove_(LoRALinear(nn.Linear(4, 4)))


def test_attention_that_reads_a_weight_is_refused():
    model = nn.TransformerEncoderLayer(16, 2, 24)
    with pytest.raises(ValueError, match="self_attn.out_proj: it is a NonDynamically"):
        add_lora_(model, targets="out_proj")
