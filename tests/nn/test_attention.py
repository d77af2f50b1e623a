"""QMultiheadAttention against torch's module with the float weights that it computes with."""

import copy
import itertools

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QLinear, QMultiheadAttention
from qkernels.nn.attention import PROJECTIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:enable_nested_tensor")

LENGTH, KEYS, BATCH, HEADS, EMBED = 5, 7, 3, 2, 12
SCHEME = qk.W8A16()  # float arithmetic, so that nothing but the order of sums differs


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(seed=0, **options):
    torch.manual_seed(seed)
    made = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:  # which torch sets to zero
                parameter.normal_()
    return made


def pair(scheme=SCHEME, **options):
    """A quantized module, and torch's with the weights that it computes with."""
    quantized = QMultiheadAttention.from_float(attention(**options), scheme)
    model = nn.ModuleList([copy.deepcopy(quantized)])
    qk.dequantize_(model)
    assert type(model[0]) is nn.MultiheadAttention
    return quantized, model[0]


def inputs(batch_first=False, batched=True, kdim=None, vdim=None):
    sizes = ((LENGTH, EMBED), (KEYS, kdim or EMBED), (KEYS, vdim or EMBED))
    given = []
    for i, (length, features) in enumerate(sizes):
        x = drawn(BATCH, length, features, seed=i + 1)
        given.append(x[0] if not batched else x if batch_first else x.transpose(0, 1))
    return given


def same(got, expected, **tolerance):
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


def masks(kind, batched):
    """attn_mask and key_padding_mask of a kind, in which no row is masked all over."""
    causal = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    padding = torch.arange(KEYS).expand(BATCH, KEYS) >= torch.tensor([[7], [5], [2]])
    heads = (drawn((BATCH if batched else 1) * HEADS, LENGTH, KEYS) > 0.5) & (
        torch.arange(KEYS) > 0
    )
    padding = padding if batched else padding[1]
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "hint": {"attn_mask": causal, "is_causal": True},
        "float": {"attn_mask": drawn(LENGTH, KEYS)},
        "heads": {"attn_mask": heads},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        "both float": {
            "attn_mask": drawn(*heads.shape),
            "key_padding_mask": drawn(*padding.shape),
        },
    }[kind]


KINDS = ("none", "causal", "hint", "float", "heads", "padding", "both", "both float")
WEIGHTS = (
    {"need_weights": False},
    {},
    {"average_attn_weights": False},
)


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 20, "vdim": 9}, {"vdim": 9}], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_all_options_compute_what_torch_does(batch_first, batched, sizes, mask):
    given = inputs(batch_first, batched, **sizes)
    said = masks(mask, batched)
    for bias, bias_kv, zero in itertools.product((True, False), repeat=3):
        if mask == "hint" and (bias_kv or zero):
            continue  # torch then hides the added keys from some rows; see the test below
        options = {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero}
        quantized, whole = pair(batch_first=batch_first, **options, **sizes)
        quantized.eval()
        whole.eval()
        for wanted in WEIGHTS:
            with torch.no_grad():
                same(quantized(*given, **said, **wanted), whole(*given, **said, **wanted))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_the_causal_hint_does_not_hide_keys_that_the_module_adds(options):
    quantized, whole = pair(**options)
    given, said = inputs(), masks("hint", True)
    with torch.no_grad():
        expected = whole(*given, attn_mask=said["attn_mask"], need_weights=False)
        same(quantized(*given, **said, need_weights=False), expected)


@pytest.mark.parametrize("wanted", WEIGHTS, ids=str)
def test_self_attention_in_every_mode(wanted):
    quantized, whole = pair(batch_first=True, dropout=0.25)
    x, padding = drawn(BATCH, KEYS, EMBED), masks("padding", True)
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            results = []
            for module in (quantized, whole):
                torch.manual_seed(7)  # of the dropout
                results.append(module.train(training)(x, x, x, **padding, **wanted))
        same(*results)


def test_gradients_reach_inputs_and_biases():
    quantized, whole = pair(add_bias_kv=True)
    results = []
    for module in (quantized, whole):
        given = [x.clone().requires_grad_() for x in inputs()]
        y, weights = module(*given)
        (y.square().sum() + weights.square().sum()).backward()
        results.append([x.grad for x in given] + [module.bias_k.grad, module.bias_v.grad])
    same(*results, rtol=1e-3, atol=1e-4)
    mine = torch.cat([getattr(quantized, name).bias.grad for name in PROJECTIONS[:3]])
    torch.testing.assert_close(mine, whole.in_proj_bias.grad, rtol=1e-3, atol=1e-4)


def test_half_precision():
    quantized, whole = pair(batch_first=True)
    x = drawn(BATCH, KEYS, EMBED).bfloat16()
    padding = masks("padding", True)
    with torch.no_grad():
        expected = whole.bfloat16()(x, x, x, **padding)
        got = quantized.bfloat16()(x, x, x, **padding)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    same(got, expected, rtol=0.05, atol=0.05)


def test_the_constructor_takes_torchs_arguments():
    for scheme in (None, qk.W8A16()):
        made = QMultiheadAttention(
            32, 4, 0.1, add_bias_kv=True, kdim=20, batch_first=True, scheme=scheme
        )
        kind = QLinear if scheme else nn.Linear
        assert all(type(getattr(made, name)) is kind for name in PROJECTIONS)
        assert (made.kdim, made.vdim, made.batch_first, made.dropout) == (20, 32, True, 0.1)
        x, keys = drawn(2, 3, 32), drawn(2, 4, 20)
        y = made.eval()(x, keys, drawn(2, 4, 32))[0]
        assert y.isfinite().all()
    made = QMultiheadAttention(32, 4, scheme=qk.W4A16(group_size=16), bias=False, device="meta")
    assert all(p.is_meta for p in made.parameters()) and made.q_proj.bias is None


def test_float_layers_start_as_torchs_do():
    torch.manual_seed(3)
    made = QMultiheadAttention(32, 4, add_bias_kv=True).to_float()
    limit = (6 / (32 + 3 * 32)) ** 0.5  # Glorot's, for the joined weight
    assert 0.9 * limit < made.in_proj_weight.abs().max() <= limit
    assert not made.in_proj_bias.any() and made.bias_k.any()


# ---- in models -----------------------------------------------------------------------------------


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


X = drawn(3, KEYS, 32)
PADDING = torch.arange(KEYS).expand(3, KEYS) >= torch.tensor([[7], [5], [2]])


def test_quantize_and_back():
    model = encoder()
    reference = copy.deepcopy(model)
    names = list(model.state_dict())
    summary = qk.quantize_(model, {"*": qk.W8A8(), "*.v_proj": qk.W8A16()})
    assert [row.name for row in summary.converted][:4] == [
        f"layers.0.self_attn.{name}" for name in PROJECTIONS
    ]
    assert model.layers[0].self_attn.v_proj.scheme == qk.W8A16()
    assert summary.bytes_after < 0.4 * summary.bytes_before
    held = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in held.values())
    with torch.no_grad():
        quantized = model(X)
    assert 0 < (quantized - reference(X)).norm() < 0.02 * reference(X).norm()
    summary = qk.dequantize_(model)
    assert len(summary.converted) == 12
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    assert list(model.state_dict()) == names
    model.load_state_dict(reference.state_dict())


def test_what_is_not_wanted_stays_the_very_same_module():
    for arguments in (
        {"scheme": qk.W8A8(), "ignore": "self_attn"},
        {"scheme": {"linear1": qk.W8A8()}},
    ):
        model = encoder()
        before = model.layers[0].self_attn
        weight = before.in_proj_weight
        qk.quantize_(model, **arguments)
        assert model.layers[0].self_attn is before and before.in_proj_weight is weight
        assert type(model.layers[0].linear1) is QLinear


def test_one_projection_alone():
    model = encoder()
    qk.quantize_(model, {"layers.0.self_attn.out_proj": qk.W8A8()})
    found = model.layers[0].self_attn
    assert [type(getattr(found, name)) for name in PROJECTIONS] == [nn.Linear] * 3 + [QLinear]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in found.parameters())
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    qk.dequantize_(model)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_an_error_changes_nothing():
    model = encoder()
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight[40, 3] = float("nan")  # in k_proj
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj: .*NaN"):
        qk.quantize_(model, qk.W8A8())
    with pytest.raises(ValueError, match="'w_proj'"):
        qk.quantize_(model, {"w_proj": qk.W8A8()})
    assert dict(model.named_modules()) == before


def test_modules_that_are_one_stay_one_and_weights_that_are_one_are_packed_once():
    one = attention(batch_first=True)
    model = nn.ModuleDict({"a": one, "b": one, "c": attention(1, batch_first=True)})
    model["c"].in_proj_weight = one.in_proj_weight
    qk.quantize_(model, qk.W8A8())
    assert model["a"] is model["b"] and isinstance(model["a"], QMultiheadAttention)
    assert model["c"].k_proj.packed is model["a"].k_proj.packed
    assert model["c"].out_proj.packed is not model["a"].out_proj.packed
    qk.dequantize_(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.MultiheadAttention


def test_hooks_go_along():
    model, seen = nn.ModuleList([attention()]), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    qk.quantize_(model, qk.W8A8())
    model[0](*inputs())
    handle.remove()
    model[0](*inputs())
    assert seen == [1]


class Subclass(nn.MultiheadAttention):
    pass


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = attention()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.attention(x, x, x)[0] + self.attention.in_proj_weight.sum()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.ModuleDict({"attention": Subclass(12, 2)}), "a subclass"),
        (Reader, "code around it reads its in_proj_weight"),
    ],
)
def test_attention_that_other_code_knows_stays(make, said):
    model = make()
    model.more = nn.Linear(4, 4)
    before = model.get_submodule("attention")
    summary = qk.quantize_(model, qk.W8A8())
    assert model.get_submodule("attention") is before
    assert said in {row.name: row.note for row in summary}["attention"]


def test_transformers_with_every_mask():
    torch.manual_seed(0)
    reference = nn.Transformer(32, 4, 2, 2, 64, dropout=0, batch_first=True).eval()
    model = copy.deepcopy(reference)
    assert len(qk.quantize_(model, qk.W8A8()).converted) == 2 * 6 + 2 * 10
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    said = {
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
        "tgt_mask": causal,
    }
    for grad, hint in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            got = model(X, X[:, :4], **said, tgt_is_causal=hint)
            expected = reference(X, X[:, :4], **said, tgt_is_causal=hint)
        assert (got - expected).norm() < 0.03 * expected.norm()


def test_a_stack_of_clones_of_a_quantized_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    qk.quantize_(layer, qk.W8A8())
    with torch.no_grad():
        stack = nn.TransformerEncoder(layer, 2).eval()
        assert torch.equal(stack(X, src_key_padding_mask=PADDING).isnan(), torch.zeros(X.shape) > 0)
        assert torch.equal(stack(X), layer(layer(X)))


def test_files(tmp_path):
    path = tmp_path / "m.safetensors"
    model = encoder()
    qk.quantize_(model, {"*": qk.W8A8(), "=layers.1.self_attn.k_proj": qk.W4A8(group_size=16)})
    qk.save_model(model, path)
    for fresh in (encoder(), copy.deepcopy(model), encoder().to("meta")):
        loaded = qk.load_model(fresh, path).eval()
        with torch.no_grad():
            assert torch.equal(
                loaded(X, src_key_padding_mask=PADDING), model(X, src_key_padding_mask=PADDING)
            )
    # Partly quantized, and taken apart without being quantized.
    for scheme in ({"layers.0.self_attn.q_proj": qk.W8A8()}, {"linear1": qk.W8A8()}):
        model = encoder()
        qk.split_attention_(model)
        qk.quantize_(model, scheme)
        qk.save_model(model, path)
        loaded = qk.load_model(encoder(), path)
        with torch.no_grad():
            assert torch.equal(loaded(X), model(X))
        assert loaded.state_dict().keys() == model.state_dict().keys()


def test_files_of_whole_attention_still_load(tmp_path):
    path = tmp_path / "m.safetensors"
    model = encoder()
    qk.quantize_(model, qk.W8A8(), ignore="self_attn")
    qk.save_model(model, path)
    loaded = qk.load_model(encoder(), path)
    assert type(loaded.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    model = encoder()
    qk.quantize_(model, qk.W8A8())
    qk.save_model(model, path)
    wide = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 80, batch_first=True), 2)
    before = dict(wide.named_modules())
    with pytest.raises(qk.io.ModelFileError, match="does not fit"):
        qk.load_model(wide, path)
    assert dict(wide.named_modules()) == before


def test_state_dicts_fit_strictly():
    model = encoder()
    qk.quantize_(model, qk.W4A8(group_size=16))
    other = encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    qk.quantize_(other, qk.W4A8(group_size=16))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


# ---- with the rest -------------------------------------------------------------------------------


def test_static_ranges_are_calibrated():
    model = encoder()
    reference = copy.deepcopy(model)
    calibration = qk.calibrate(model, [X, drawn(3, KEYS, 32, seed=1)])
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert calibration["layers.0.self_attn.k_proj"].calls == 2
    qk.quantize_(model, qk.W8A8(static=True), calibration=calibration)
    with torch.no_grad():
        assert (model(X) - reference(X)).norm() < 0.05 * reference(X).norm()


def test_projections_of_one_input_are_computed_together():
    model = encoder()
    qk.quantize_(model, qk.W8A8())
    with torch.inference_mode():
        before = model(X)
        qk.fuse_(model, run=lambda model: model(X))
        found = model.layers[0].self_attn
        assert found.q_proj.shared is found.k_proj.shared is found.v_proj.shared is not None
        assert torch.equal(model(X), before)


def test_training_for_quantization():
    model = encoder(dropout=0.0)
    x = X.clone().requires_grad_()
    before = model(x)
    assert qk.split_attention_(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert qk.split_attention_(model) == []
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.train()
    assert len(qk.prepare_qat_(model, qk.W8A8()).converted) == 12
    model(x).square().sum().backward()
    assert model.layers[0].self_attn.q_proj.weight.grad.any()
    with torch.no_grad():
        trained = model.eval()(X)
        assert len(qk.convert_(model).converted) == 12
        torch.testing.assert_close(model(X), trained, rtol=1e-3, atol=5e-3)


def test_adapters_on_projections():
    model = encoder()
    qk.quantize_(model, qk.W8A16())
    with torch.no_grad():
        expected = model(X)
    qk.transfer.add_lora_(model, targets=("q_proj", "v_proj", "out_proj"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_a_comparison_has_the_projections_as_layers():
    reference = encoder()
    model = copy.deepcopy(reference)
    qk.quantize_(model, qk.W8A8())
    before = dict(reference.named_modules())
    report = qk.compare(model, reference, [X], latency_budget=0.05)
    assert dict(reference.named_modules()) == before
    layers = {layer.name: layer for layer in report.layers}
    found = layers["layers.1.self_attn.v_proj"]
    assert found.sqnr_db > 20 and found.own_sqnr_db > 30 and found.share is not None
    assert found.reference_bytes == 4 * (32 * 32 + 32)
    assert report.reference_bytes == sum(p.nbytes for p in reference.parameters())


def test_compiled_and_exported():
    quantized, _ = pair(qk.W8A8(), batch_first=True)
    quantized.eval()
    x, padding = drawn(BATCH, KEYS, EMBED), masks("padding", True)
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(quantized, (x, x, x), padding).module()
    with torch.no_grad():
        expected = quantized(x, x, x, **padding)
        same(compiled(x, x, x, **padding), expected)
        same(exported(x, x, x, **padding), expected)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        ({"query": drawn(12)}, ValueError, r"query, key and value have shapes \(12,\)"),
        ({"value": drawn(6, 3, 12)}, ValueError, "key and value of one length"),
        ({"query": drawn(5, 2, 12)}, ValueError, "all with a batch or all without"),
        ({"query": drawn(5, 3, 10)}, RuntimeError, "x has 10 features"),
        ({"attn_mask": torch.zeros(5, 6)}, ValueError, r"attn_mask has shape \(5, 6\)"),
        ({"key_padding_mask": torch.zeros(7, 3)}, ValueError, r"expected \(3, 7\)"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "expected torch.bool"),
        ({"is_causal": True}, ValueError, "pass nn.Transformer.generate_square"),
        ({"query": torch.nested.nested_tensor([drawn(2, 12)] * 3)}, TypeError, "nested"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_calls(call, kind, said):
    quantized, _ = pair()
    query, key, value = inputs()
    with pytest.raises(kind, match=said):
        quantized(**{"query": query, "key": key, "value": value, **call})


def test_bad_modules():
    with pytest.raises(ValueError, match="embed_dim is 12 and num_heads is 5"):
        QMultiheadAttention(12, 5)
    with pytest.raises(TypeError, match="got Subclass.*a subclass"):
        QMultiheadAttention.from_float(Subclass(12, 2), qk.W8A8())
    strange = attention()
    nn.utils.parametrizations.weight_norm(strange, "in_proj_weight")
    with pytest.raises((TypeError, ValueError), match="cannot be replaced"):
        QMultiheadAttention.from_float(strange, qk.W8A8())
    with pytest.raises(ValueError, match="q_proj is a QLinear.*dequantize_"):
        pair()[0].to_float()
    for function in (qk.split_attention_, lambda m: qk.quantize_(m, qk.W8A8())):
        with pytest.raises(ValueError, match="itself a MultiheadAttention.*from_float"):
            function(attention())
