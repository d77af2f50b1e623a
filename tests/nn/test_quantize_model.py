"""quantize_ and dequantize_: what is converted, what is left and why, patterns, refusals."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

import qkernels as qk
from qkernels.nn import QEmbedding, QLinear
from qkernels.plan import matches
from qkernels.summary import Summary


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(32, 48)
        self.act = nn.GELU()
        self.linear2 = nn.Linear(48, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(x + self.linear2(self.act(self.linear1(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.encoder = nn.Sequential(Block(), Block())
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.lm_head = nn.Linear(32, 20, bias=False)

    def forward(self, tokens):
        x = self.encoder(self.embed(tokens))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.lm_head(x)


TOKENS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def rows(summary):
    return {row.name: row for row in summary}


def has_convolution(scheme):
    return scheme.activation == "float" or scheme == qk.W8A8()


def test_every_module_is_listed_with_what_it_became_or_why_not(model, scheme):
    expected = model(TOKENS)
    leaves = {n for n, m in model.named_modules() if next(m.children(), None) is None}
    summary = qk.quantize_(model, scheme)
    assert isinstance(summary, Summary)
    assert {row.name for row in summary} == leaves
    by_name = rows(summary)
    assert by_name["embed"].became == f"QEmbedding {scheme}"
    assert by_name["encoder.1.linear2"].became == f"QLinear {scheme}"
    assert by_name["encoder.0.act"].note == "has no weight"
    assert by_name["encoder.0.norm"].note == "no quantized LayerNorm in this version"
    if not has_convolution(scheme):
        assert "a convolution with int8 activations needs int8 weights" in by_name["conv"].note
    else:
        assert by_name["conv"].became == f"QConv1d {scheme}"
    assert by_name["lm_head"].note == "ignored by 'lm_head'"
    assert all(row.note for row in summary.left)
    assert [row.name for row in summary.converted] == [
        "embed",
        *(f"encoder.{i}.linear{j}" for i in (0, 1) for j in (1, 2)),
        *(["conv"] if has_convolution(scheme) else []),
    ]
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.embed, QEmbedding)
    y = model(TOKENS)
    assert ((y - expected).norm() / expected.norm()) < 0.2
    assert model.encoder[0].linear1.qualified_name == "encoder.0.linear1"


def test_bytes_are_those_of_parameters_and_buffers(model):
    def size():
        return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

    before = size()
    summary = qk.quantize_(model, qk.W8A8())
    assert summary.bytes_before == before
    assert summary.bytes_after == size() < before
    back = qk.dequantize_(model)
    assert (back.bytes_before, back.bytes_after) == (summary.bytes_after, before)


def test_summary_prints_iterates_and_becomes_json(model):
    summary = qk.quantize_(model, {"*": qk.W8A16(), "encoder.1": qk.W4A16(16)})
    text = str(summary)
    for row in summary:
        assert row.name in text
        assert row.note in text
    assert "6 of 11 converted" in text
    assert "W4A16(group_size=16)" in text
    out = io.StringIO()
    Console(file=out, width=200).print(summary)
    assert "no quantized LayerNorm in this version" in out.getvalue()
    plain = summary.to_dict()
    assert len(plain["modules"]) == len(summary) == 11
    assert plain["modules"][0]["name"] == "embed"
    assert plain["bytes_after"] == summary.bytes_after
    assert len(summary.converted) + len(summary.left) == len(summary)


def test_brackets_in_names_survive_printing():
    model = nn.ModuleDict({"[red]": nn.Linear(4, 4)})
    assert "[red]" in str(qk.quantize_(model, qk.W8A8()))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head.inner", True),
        ("lm_head", "lm_head2", False),
        ("encoder", "encoder.0.linear1", True),
        ("*.linear?", "encoder.0.linear1", True),
        ("encoder.*", "encoder.0", True),
        ("encoder.0", "encoder.0.linear1", True),
        ("encoder.0", "encoder.01", False),
        ("linear[13]", "a.b.linear3", True),
        ("Linear1", "linear1", False),
        ("*", "anything.at.all", True),
        ("a.b", "x.a.b", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_the_last_matching_pattern_counts(model):
    summary = qk.quantize_(
        model,
        {
            "encoder": qk.W8A8(),
            "*.linear2": qk.W4A8(16),
            "encoder.1.linear2": qk.NF4(16),
        },
        ignore=("encoder.0.linear1",),
    )
    by_name = rows(summary)
    assert by_name["encoder.1.linear1"].became == "QLinear W8A8()"
    assert by_name["encoder.0.linear2"].became == "QLinear W4A8(group_size=16)"
    assert by_name["encoder.1.linear2"].became == "QLinear NF4(group_size=16)"
    assert by_name["encoder.0.linear1"].note == "ignored by 'encoder.0.linear1'"
    assert by_name["embed"].note == "no pattern names it"
    assert by_name["lm_head"].note == "no pattern names it"


def test_ignore_may_be_one_pattern_and_replaces_the_default(model):
    by_name = rows(qk.quantize_(model, qk.W8A8(), ignore="embed"))
    assert by_name["embed"].note == "ignored by 'embed'"
    assert by_name["lm_head"].became == "QLinear W8A8()"
    assert rows(qk.quantize_(Model(), qk.W8A8(), ignore=()))["lm_head"].became


def test_the_default_ignore_may_match_nothing(mlp):
    assert len(qk.quantize_(mlp(), qk.W8A8()).converted) == 2


def test_a_module_with_two_names_is_converted_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    summary = qk.quantize_(model, qk.W8A8())
    assert model[0] is model[2]
    assert isinstance(model[0], QLinear)
    assert [row.name for row in summary] == ["0", "1"]
    assert rows(summary)["0"].note == "also known as 2"
    qk.dequantize_(model)
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Linear)


def test_handles_of_hooks_still_work(model):
    calls = []
    handle = model.encoder[0].linear1.register_forward_hook(lambda *a: calls.append(1))
    qk.quantize_(model, qk.W8A8())
    model(TOKENS)
    assert calls == [1]
    handle.remove()
    model(TOKENS)
    assert calls == [1]


def test_optimizers_keep_the_biases(model):
    bias = model.encoder[0].linear1.bias
    qk.quantize_(model, qk.W8A8())
    assert model.encoder[0].linear1.bias is bias
    qk.dequantize_(model)
    assert model.encoder[0].linear1.bias is bias


def test_dequantize_gives_what_was_computed_with(model, scheme):
    qk.quantize_(model, scheme)
    embedded = model.embed(TOKENS)
    summary = qk.dequantize_(model)
    assert torch.equal(model.embed(TOKENS), embedded)
    assert not any(isinstance(m, qk.nn.QModule) for m in model.modules())
    assert rows(summary)["embed"].became == "Embedding"
    assert rows(summary)["lm_head"].note == "was not quantized"
    # What is quantized again, symmetrically, is the same.
    again = qk.quantize_(model, qk.W8A16())
    first = model.encoder[0].linear1.packed.clone()
    qk.dequantize_(model)
    qk.quantize_(model, qk.W8A16())
    assert len(again.converted) == 6
    assert torch.equal(model.encoder[0].linear1.packed, first)


def test_quantizing_twice_leaves_what_is_quantized(model):
    qk.quantize_(model, qk.W8A8(), ignore=("encoder.1", "lm_head"))
    by_name = rows(qk.quantize_(model, qk.W4A16(16)))
    assert by_name["encoder.0.linear1"].note == "already quantized with W8A8()"
    assert by_name["encoder.1.linear1"].became == "QLinear W4A16(group_size=16)"
    with pytest.raises(ValueError, match=r"already quantized with W8A8\(\)"):
        qk.quantize_(model, qk.W4A16(16))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


class OwnEmbedding(nn.Embedding):
    pass


class ReadsWeight(nn.Module):
    """Uses a layer's weight without calling the layer, in a method that forward calls."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.logits(self.out(self.table(tokens)))

    def logits(self, x):
        return x @ self.table.weight.T

    def reset(self):
        self.out.weight.zero_()


def left_note(module):
    model = nn.ModuleDict({"odd": module, "even": nn.Linear(8, 8)})
    return rows(qk.quantize_(model, qk.W8A8()))["odd"].note


def test_layers_that_would_lose_something_are_left_with_the_reason():
    assert "subclass of nn.Linear" in left_note(OwnForward(8, 8))
    assert "subclass of nn.Embedding" in left_note(OwnEmbedding(8, 8))
    assert "max_norm" in left_note(nn.Embedding(8, 8, max_norm=1.0))
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: x
    assert "forward was replaced" in left_note(replaced)
    compiled = nn.Linear(8, 8)
    compiled.compile()
    assert "compiled in place" in left_note(compiled)
    hooked = nn.Linear(8, 8)
    hooked.register_state_dict_post_hook(lambda *a: None)
    assert "state_dict hooks" in left_note(hooked)
    extra = nn.Linear(8, 8)
    extra.register_buffer("mask", torch.ones(8))
    assert "mask" in left_note(extra)
    assert "no quantized Bilinear" in left_note(nn.Bilinear(3, 3, 1))
    assert "no quantized LSTM" in left_note(nn.LSTM(3, 3))
    from torch.ao.nn.quantized.dynamic import Linear as TorchAoLinear

    model = nn.Sequential(TorchAoLinear(8, 8), nn.Linear(8, 8))
    assert "torch.ao" in rows(qk.quantize_(model, qk.W8A8()))["0._packed_params"].note
    assert "no quantized EmbeddingBag" in left_note(nn.EmbeddingBag(3, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)
def test_reparametrized_layers_are_left(wrap):
    model = nn.ModuleDict({"odd": wrap(nn.Linear(8, 8)), "even": nn.Linear(8, 8)})
    before = model["odd"](torch.ones(8))
    summary = qk.quantize_(model, qk.W8A8())
    assert "computed from others" in rows(summary)["odd"].note
    torch.testing.assert_close(model["odd"](torch.ones(8)), before, rtol=0.2, atol=0.2)


def test_a_weight_that_the_parent_reads_stays():
    model = nn.Sequential(ReadsWeight())
    by_name = rows(qk.quantize_(model, qk.W8A8()))
    assert by_name["0.table"].note == "ReadsWeight reads table.weight directly"
    assert by_name["0.out"].became == "QLinear W8A8()"
    assert model(torch.tensor([1])).shape == (1, 10)


class ReadsFromAfar(nn.Module):
    """Asks layers further below for their dtype, as transformers' ViT and OpenAI's CLIP do."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.tower.stem = self.tower[0]
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    @property
    def dtype(self):
        return self.tower.stem.weight.dtype

    def forward(self, x):
        x = x.to(self.embeddings.proj.weight.dtype).to(self.dtype)
        x = self.heads[0](x) + self.heads[1].weight
        return self.tower(self.embeddings["other"](self.embeddings["proj"](x)))


def test_a_weight_that_a_module_further_above_reads_stays():
    model = nn.Sequential(ReadsFromAfar())
    by_name = rows(qk.quantize_(model, qk.W8A8()))
    assert by_name["0.embeddings.proj"].note == (
        "ReadsFromAfar reads embeddings.proj.weight directly"
    )
    assert "reads tower.stem.weight directly" in by_name["0.tower.0"].note
    assert "reads heads.1.weight directly" in by_name["0.heads.1"].note
    assert len([row for row in by_name.values() if row.became]) == 3
    assert model(torch.ones(8, 8)).shape == (8, 8)


class ReadsBySuper(ReadsWeight):
    def forward(self, tokens):
        return super().forward(tokens) * 2


class CallsTheFusedPath(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x)


def test_what_super_reads_is_read_too():
    model = nn.Sequential(ReadsBySuper())
    note = rows(qk.quantize_(model, qk.W8A8()))["0.table"].note
    assert note == "ReadsBySuper reads table.weight directly"
    model = nn.Sequential(CallsTheFusedPath(16, 2, 32, batch_first=True)).eval()
    assert len(qk.quantize_(model, qk.W8A8()).converted) == 6  # turned off there
    with torch.no_grad():
        assert model(torch.ones(1, 3, 16)).shape == (1, 3, 16)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.body = nn.Linear(16, 16)

    def forward(self, tokens):
        return self.lm_head(self.body(self.embed(tokens)))


def test_a_weight_tied_to_an_ignored_layer_stays_float():
    model = Tied()
    by_name = rows(qk.quantize_(model, qk.W8A8()))
    assert by_name["embed"].note == (
        "shares its weight with lm_head, which stays float: ignored by 'lm_head'"
    )
    assert model.embed.weight is model.lm_head.weight
    assert by_name["body"].became


def test_tied_weights_of_one_kind_share_even_if_activations_differ():
    model = Tied()
    summary = qk.quantize_(model, {"*": qk.W8A16(), "lm_head": qk.W8A8()}, ignore=())
    assert model.embed.packed is model.lm_head.packed
    assert model.lm_head.scheme == qk.W8A8()
    by_name = rows(summary)
    assert by_name["lm_head"].note == "shares its weight with embed"
    assert by_name["lm_head"].bytes_before == by_name["lm_head"].bytes_after == 0
    qk.dequantize_(model)
    assert model.embed.weight is model.lm_head.weight


def test_tied_weights_of_two_kinds_part_and_say_so():
    model = Tied()
    summary = qk.quantize_(model, {"*": qk.W8A16(), "lm_head": qk.W4A16(16)}, ignore=())
    assert model.embed.packed is not model.lm_head.packed
    assert "no longer shares its weight with embed" in rows(summary)["lm_head"].note


def test_ties_made_by_assigned_state_are_found():
    model = Tied()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.embed.weight is not model.lm_head.weight
    qk.quantize_(model, qk.W8A8(), ignore=())
    assert model.embed.packed is model.lm_head.packed


def test_a_shared_bias_is_no_tie():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    summary = qk.quantize_(model, qk.W8A8())
    assert len(summary.converted) == 2
    assert model[0].bias is model[1].bias
    assert model[0].packed is not model[1].packed


def bad(change):
    model = Model()
    change(model)
    return model


def with_nan(model):
    with torch.no_grad():
        model.encoder[1].linear2.weight[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (Model, {"ignore": "lm_haed"}, ["ignore", "'lm_haed'", "near it", "'lm_head'"]),
        (Model, {"scheme": {"*.liner1": qk.W8A8()}}, ["scheme", "'*.liner1'", "linear1"]),
        (Model, {"scheme": {"conv": qk.W4A8()}}, ["'conv'", "needs int8 weights with one scale"]),
        (
            Model,
            {"scheme": {"encoder.0.linear1": qk.NF4(), "*": qk.W8A8()}},
            ["'encoder.0.linear1' has no effect", "'*' comes later"],
        ),
        (
            Model,
            {"scheme": {"*": qk.W8A8(), "embed": qk.NF4()}, "ignore": "embed"},
            ["'embed'", "ignored by 'embed'"],
        ),
        (Model, {"scheme": {}}, ["empty dict"]),
        (lambda: nn.Linear(4, 4), {}, ["itself a Linear", "QLinear.from_float"]),
        (lambda: nn.Embedding(4, 4), {}, ["QEmbedding.from_float"]),
        (lambda: nn.Sequential(nn.PReLU(), nn.ReLU()), {}, ["0 (PReLU)", "no quantized PReLU"]),
        (lambda: nn.Sequential(), {}, ["nothing"]),
        (lambda: QLinear(4, 4), {}, ["already quantized"]),
        (lambda: bad(with_nan), {}, ["encoder.1.linear2", "NaN or Inf", "changed nothing"]),
        (lambda: bad(lambda m: m.to("meta")), {}, ["6 layers", "embed", "meta device"]),
        (lambda: bad(lambda m: m.encoder[0].to(torch.cfloat)), {}, ["encoder.0.linear1"]),
        (
            lambda: nn.Sequential(nn.Linear(131_072, 1), nn.Linear(4, 4)),
            {},
            ["0: W8A8()", "131072", "131071", "ignore"],
        ),
        (Model, {"scheme": qk.W8A8(static=True)}, ["W8A8(static=True)", "qk.calibrate"]),
        (
            lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))),
            {},
            ["ScriptModule"],
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Complex modules")
def test_refusals_come_before_any_change(make, arguments, words):
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"quantize_") as caught:
        qk.quantize_(model, **{"scheme": qk.W8A8(), **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model", qk.W8A8()), ["model is str"]),
        ((Model(), "W8A8"), ["'W8A8'", "qk.W8A8()"]),
        ((Model(), {"*": "W8A8"}), ["qk.W8A8()"]),
        ((Model(), {1: qk.W8A8()}), ["patterns"]),
        ((Model(), qk.W8A8(), (1,)), ["ignore"]),
        ((Model(), qk.W8A8(), None), ["ignore is None", "() to ignore none"]),
    ],
)
def test_wrong_types_are_said(arguments, words):
    with pytest.raises(TypeError) as caught:
        qk.quantize_(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_dequantize_refuses(mlp):
    with pytest.raises(ValueError, match="holds no quantized layer"):
        qk.dequantize_(mlp())
    with pytest.raises(ValueError, match=r"itself a QLinear.*dequantize\(\)"):
        qk.dequantize_(QLinear(4, 4))
    with pytest.raises(TypeError, match="model is int"):
        qk.dequantize_(3)


def test_a_static_scheme_converts_embeddings():
    model = nn.Sequential(nn.Embedding(5, 8))
    qk.quantize_(model, qk.W8A8(static=True))
    assert model(torch.tensor([1])).shape == (1, 8)


def test_a_lazy_layer_is_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    summary = qk.quantize_(model, qk.W8A8())
    assert "has not seen an input yet" in rows(summary)["1"].note


def test_progress_goes_to_stderr_when_wanted(model, capfd):
    qk.quantize_(model, qk.W8A8(), progress=True)
    out, err = capfd.readouterr()
    assert "Quantizing" in err
    assert not out
    qk.quantize_(Model(), qk.W8A8())
    assert capfd.readouterr() == ("", "")


def test_inside_inference_mode(model):
    with torch.inference_mode():
        qk.quantize_(model, qk.W8A8())
    model.encoder[0].linear1.bias.requires_grad_()
    model(TOKENS).sum().backward()
    assert model.encoder[0].linear1.bias.grad is not None


@pytest.mark.parametrize(
    "scheme, meant",
    [
        (qk.W4A16, "like qk.W4A16()"),
        ("w4a8", "like qk.W4A8()"),
        ({"*": "nf4"}, "like qk.NF4()"),
        (None, "like qk.W8A8()"),
    ],
)
def test_a_scheme_that_is_none_is_answered_with_what_was_meant(scheme, meant):
    with pytest.raises(TypeError) as caught:
        qk.quantize_(nn.Sequential(nn.Linear(8, 8)), scheme)
    assert meant in str(caught.value)


def test_python_can_name_what_is_spelled_alike():
    with pytest.raises(AttributeError) as caught:
        qk.W8A9  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("W8A9", qk)
