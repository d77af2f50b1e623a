"""quantize_calibrated_ on whole models: order, what is seen, ties, interruptions, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from helpers import data
from qkernels.nn import QEmbedding, QLinear
from qkernels.ptq import blocks, run
from qkernels.ptq.gptq import gptq
from qkernels.ptq.scaling import smoothquant_factors

INT4 = qk.W4A16(group_size=16)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24, bias=False)

    def forward(self, x, mask=None):
        h = self.norm(x)
        y = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), attn_mask=mask)
        return (x + self.out(y),)


class Encoder(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.first = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))
        self.head = nn.Linear(24, 5)
        self.unused = nn.Linear(24, 3)

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.first(self.embed(input_ids)))
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, :].bool()
        for block in self.blocks:
            (x,) = block(x, mask=mask)
        return self.head(x)


def encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder().eval()


def tokens(count=9, seed=0, masked=False):
    generator = torch.Generator().manual_seed(seed)
    batches = [{"input_ids": torch.randint(50, (4, 11), generator=generator)} for _ in range(count)]
    if masked:
        for batch in batches:
            batch["attention_mask"] = torch.ones(4, 11, dtype=torch.int64)
            batch["attention_mask"][1:, 7:] = 0
    return batches


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 9)
    )


def rows(count=9, features=40):
    mix = data.floats((features, features), seed="mix")
    return [data.floats((64, features), seed=i) @ mix for i in range(count)]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "scheme",
    [INT4, qk.W4A8(group_size=16), qk.NF4(group_size=16), qk.W4A16(group_size=-1, symmetric=True)],
    ids=str,
)
def test_gptq_beats_rounding_to_nearest_on_every_layer(scheme):
    model = mlp()
    summary = qk.quantize_calibrated_(model, rows(30), scheme)
    assert [row.became for row in summary.converted] == [f"QLinear {scheme}"] * 3
    for row in summary.converted:
        assert row.sqnr > row.sqnr_nearest + 1, str(summary)
    assert "to nearest" in str(summary)
    assert f"{row.sqnr:.1f} dB" in str(summary)


def test_layers_see_what_the_quantized_layers_before_them_give():
    """The whole of GPTQ on a small network, done by hand."""
    model, batches = mlp(), rows()
    expected, x = [], torch.cat(batches[:-1])
    for i, module in enumerate(copy.deepcopy(model)):
        if isinstance(module, nn.Linear):
            moments = x.double().T @ x.double() / len(x)
            rounded = gptq(module.weight, moments, INT4).weight
            expected.append((i, rounded))
            with torch.no_grad():
                module.weight.copy_(rounded.dequantize())
        x = module(x).detach()
    qk.quantize_calibrated_(model, batches, INT4)
    for i, rounded in expected:
        got = model[i].quantized_weight()
        assert (got.data == rounded.data).float().mean() > 0.995


def test_smoothquant_makes_the_factors_of_its_formula_and_a_better_w8a8():
    model, batches = mlp(), rows()
    for batch in batches:
        batch[:, 5] *= 60
    reference, x = copy.deepcopy(model), batches[-1]
    summary = qk.quantize_calibrated_(model, batches, qk.W8A8(), "smoothquant")
    amax = torch.cat(batches[:-1]).abs().amax(0)
    factors = smoothquant_factors(reference[0].weight, amax)
    torch.testing.assert_close(model[0].x_premul, 1 / factors)
    plain = copy.deepcopy(reference)
    qk.quantize_(plain, qk.W8A8())
    with torch.no_grad():
        error, nearest = ((m(x) - reference(x)).norm() for m in (model, plain))
    assert error < 0.6 * nearest
    assert summary.rows[0].sqnr > summary.rows[0].sqnr_nearest + 6


@pytest.mark.parametrize("method", ["awq", ("awq", "gptq"), ("bias_correction", "gptq")])
def test_methods_beat_rounding_to_nearest(method):
    model, batches = mlp(), rows()
    scale = torch.logspace(-1, 1, 40)
    summary = qk.quantize_calibrated_(model, [b * scale for b in batches], INT4, method)
    assert all(row.sqnr > row.sqnr_nearest for row in summary.converted)
    assert (model[0].x_premul is not None) == ("awq" in method)
    x = batches[0] * scale
    back = copy.deepcopy(model)
    qk.dequantize_(back)
    torch.testing.assert_close(model(x), back(x), rtol=1e-3, atol=1e-3)


def test_bias_correction_is_the_lost_mean():
    model, batches = mlp(), rows()
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    before = bias.detach().clone()
    qk.quantize_calibrated_(model, batches, INT4, "bias_correction", optimize="minmax")
    mean = torch.cat(batches[:-1]).double().mean(0)
    lost = weight.double() - model[0].dequantize().weight.double()
    torch.testing.assert_close(model[0].bias.double() - before.double(), lost @ mean)
    assert model[0].bias is bias
    assert torch.equal(
        model[0].quantized_weight().data,
        qk.quantize(weight, "int4", 16, False, torch.bfloat16).data,
    )


def test_act_order_by_permutation_needs_k_perm_and_computes_the_same():
    model, batches = mlp(), rows()
    summary = qk.quantize_calibrated_(model, batches, INT4, act_order="permute")
    assert model[0].k_perm is not None
    assert all(row.sqnr > row.sqnr_nearest for row in summary.converted)


def test_every_kind_of_layer_of_a_transformer():
    model, batches = encoder(), tokens(masked=True)
    summary = qk.quantize_calibrated_(model, batches, {"*": INT4, "embed": qk.W8A16()})
    found = {row.name: row for row in summary}
    assert isinstance(model.embed, QEmbedding)
    assert found["embed"].sqnr is None
    assert found["unused"].note == "not reached by any batch: no data used"
    assert found["unused"].became == f"QLinear {INT4}"
    assert found["blocks.1.out"].sqnr > found["blocks.1.out"].sqnr_nearest
    assert sum(row.sqnr is not None for row in summary) == 14
    assert all(not module.training for module in model.modules())


def test_blocks_are_found_and_linked():
    model, batches = encoder(), tokens(2)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = blocks.trace(model, batches, [(n,) for n in names], None)
    assert [(g.layers, g.block) for g in found.groups] == [
        (("first",), None),
        *(
            group
            for i in range(3)
            for group in (
                (tuple(f"blocks.{i}.{n}" for n in "qkv"), f"blocks.{i}"),
                ((f"blocks.{i}.out",), f"blocks.{i}"),
            )
        ),
        (("head",), None),
    ]
    assert found.before == {"blocks.1": "blocks.0", "blocks.2": "blocks.1"}


@pytest.mark.parametrize("masked", [False, True])
def test_running_blocks_is_running_the_model(masked, monkeypatch):
    """The same bits whether blocks run alone or the whole model does."""
    results = []
    for find in (blocks.find_blocks, lambda model, layers: []):
        monkeypatch.setattr(blocks, "find_blocks", find)
        model = encoder()
        qk.quantize_calibrated_(model, tokens(masked=masked), INT4)
        results.append(state(model))
    assert same_state(*results)


def test_padding_tokens_do_not_count():
    batches = tokens(masked=True)
    other = copy.deepcopy(batches)
    for batch in other:  # behind the mask there may be anything
        batch["input_ids"][1:, 7:] = 3
    results = []
    for given in (batches, other):
        model = encoder()
        qk.quantize_calibrated_(model, given, INT4)
        results.append(state(model))
    assert same_state(*results)


class Cache:
    """Keys of the tokens so far, as language models keep them: a second run would add to them."""

    def __init__(self):
        self.seen = 0


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        cache = Cache()
        for layer in self.layers:
            x = self.step(layer, x, cache)
        assert cache.seen == len(self.layers)
        return x

    def step(self, layer, x, cache):
        cache.seen += 1
        return layer(x) + 1


def test_the_input_of_a_block_need_not_be_the_output_of_the_one_before():
    model = Caching()
    summary = qk.quantize_calibrated_(model, rows(4, 8), qk.W4A16(group_size=8))
    assert len(summary.converted) == 2


class WithCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.seen += 1
        return self.linear(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(WithCache() for _ in range(2))

    def forward(self, x):
        cache = Cache()
        for i, layer in enumerate(self.layers):
            assert cache.seen == i
            x = layer(x, cache)
        return x


def test_blocks_that_change_their_arguments_are_not_run_again():
    model = Stack()
    found = blocks.trace(model, rows(2, 8), [("layers.0.linear",), ("layers.1.linear",)], None)
    assert [group.block for group in found.groups] == [None, None]
    assert len(qk.quantize_calibrated_(model, rows(2, 8), qk.W8A8()).converted) == 2


class Tied(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.b.weight = self.a.weight
        self.embed, self.head = nn.Embedding(30, 24), nn.Linear(24, 30, bias=False)
        self.head.weight = self.embed.weight
        self.scale = scale

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(self.embed(x))) * self.scale))


@pytest.mark.parametrize("method", ["gptq", ("smoothquant", "gptq")])
def test_shared_weights_stay_shared_and_see_all_inputs(method):
    batches = [
        torch.randint(30, (8, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    results = []
    for scale in (1, 30):
        torch.manual_seed(0)
        model = Tied(scale)
        summary = qk.quantize_calibrated_(model, batches, INT4, method)
        assert model.a.packed is model.b.packed
        assert model.embed.packed is model.head.packed
        assert model.a.x_premul is model.b.x_premul
        found = {row.name: row for row in summary}
        assert found["a"].sqnr is not None
        assert found["b"].sqnr is not None
        assert found["head"].sqnr is None
        results.append(model.a.packed.clone())
        model(batches[0])
        qk.dequantize_(model)
        assert model.a.weight is model.b.weight
    assert not torch.equal(*results)


def test_a_module_that_runs_twice():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    summary = qk.quantize_calibrated_(model, rows(4, 8), qk.W4A16(group_size=8))
    assert model[0] is model[2]
    assert isinstance(model[0], QLinear)
    assert summary.rows[0].sqnr is not None


class InterruptedRunError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("method", "after"),
    [("gptq", 0), ("gptq", 4), (("smoothquant", "gptq", "bias_correction"), 1)],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(method, after, tmp_path, monkeypatch):
    whole = encoder()
    options = {"method": method, "act_order": "permute"}
    expected = qk.quantize_calibrated_(whole, tokens(), INT4, **options)

    done, solve = [], run.solve

    def interrupt(*args):
        if len(done) == after:
            raise InterruptedRunError
        done.append(1)
        return solve(*args)

    monkeypatch.setattr(run, "solve", interrupt)
    with pytest.raises(InterruptedRunError):
        qk.quantize_calibrated_(encoder(), tokens(), INT4, checkpoint=tmp_path / "run", **options)
    solved = []
    monkeypatch.setattr(run, "solve", lambda *args: solved.append(1) or solve(*args))
    model = encoder()
    summary = qk.quantize_calibrated_(model, tokens(), INT4, checkpoint=tmp_path / "run", **options)
    assert len(solved) == 14 - after
    assert same_state(state(model), state(whole))
    assert summary == expected
    # Once more: nothing is left to do.
    solved.clear()
    model = encoder()
    qk.quantize_calibrated_(model, tokens(), INT4, checkpoint=tmp_path / "run", **options)
    assert not solved
    assert same_state(state(model), state(whole))
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_damaged_file_is_made_again(tmp_path):
    whole = mlp()
    qk.quantize_calibrated_(whole, rows(), INT4, checkpoint=tmp_path)
    (file, *_) = sorted(tmp_path.glob("unit-*"))
    file.write_bytes(file.read_bytes()[:100])
    model = mlp()
    qk.quantize_calibrated_(model, rows(), INT4, checkpoint=tmp_path)
    assert same_state(state(model), state(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    qk.quantize_calibrated_(mlp(), rows(), INT4, checkpoint=tmp_path)
    other = mlp()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    for model, batches, scheme, options in (
        (other, rows(), INT4, {}),
        (mlp(), rows(8), INT4, {}),
        (mlp(), rows(), qk.W8A8(), {}),
        (mlp(), rows(), INT4, {"damping": 0.1}),
    ):
        with pytest.raises(ValueError, match="another model, other batches or other settings"):
            qk.quantize_calibrated_(model, batches, scheme, checkpoint=tmp_path, **options)
        assert type(model[0]) is nn.Linear
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        qk.quantize_calibrated_(mlp(), rows(), INT4, checkpoint=tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="not empty"):
        qk.quantize_calibrated_(mlp(), rows(), INT4, checkpoint=tmp_path)


def test_held_out_batches_are_not_calibrated_with():
    batches = rows(9)
    a, b = mlp(), mlp()
    first = qk.quantize_calibrated_(a, batches, INT4)
    second = qk.quantize_calibrated_(b, batches[:-1], INT4, held_out=batches[-1:])
    assert same_state(state(a), state(b))
    assert first == second
    other = mlp()
    third = qk.quantize_calibrated_(other, batches[:-1], INT4, held_out=[batches[-1] * 3])
    assert same_state(state(a), state(other))
    assert third.rows[0].sqnr != first.rows[0].sqnr
    alone = qk.quantize_calibrated_(mlp(), batches[:1], INT4)
    assert all(row.sqnr is None for row in alone)


def test_modes_hooks_and_dtypes_are_kept():
    model = mlp().bfloat16().train()
    model[2].eval()
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    qk.quantize_calibrated_(model, [b.bfloat16() for b in rows()], INT4)
    assert model[0].training
    assert not model[2].training
    assert model[0].dtype == torch.bfloat16
    calls.clear()
    assert model(rows(1)[0].bfloat16()).dtype == torch.bfloat16
    assert calls == [1]
    assert not model[0]._forward_pre_hooks


def test_rows_that_are_not_finite_are_left_out():
    batches = rows()
    broken = [torch.cat([b, torch.full((1, 40), torch.inf)]) for b in batches[:-1]]
    a, b = mlp()[:1], mlp()[:1]
    qk.quantize_calibrated_(a, batches, INT4)
    qk.quantize_calibrated_(b, [*broken, batches[-1]], INT4)
    assert same_state(state(a), state(b))


def test_a_transformer_encoder_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    batches = [data.floats((4, 6, 16), seed=i) for i in range(4)]
    summary = qk.quantize_calibrated_(model, batches, qk.W4A16(group_size=16))
    layers = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["linear1", "linear2"]
    assert [row.name for row in summary if row.sqnr is not None] == [
        f"layers.{i}.{layer}" for i in (0, 1) for layer in layers
    ]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"method": "gtpq"}, ValueError, ["'gtpq'", "'gptq'"]),
        ({"method": ()}, ValueError, ["one or more"]),
        ({"method": None}, ValueError, ["method is None", "one or more"]),
        ({"method": ("awq", "smoothquant")}, ValueError, ["x_premul"]),
        ({"optimize": "best"}, ValueError, ["'best'", "'mse'"]),
        ({"act_order": "yes"}, ValueError, ["'yes'", "'static'"]),
        ({"damping": -1}, ValueError, ["damping is -1"]),
        ({"alpha": 2}, ValueError, ["alpha is 2"]),
        ({"batches": []}, ValueError, ["batches is empty"]),
        ({"batches": torch.zeros(3, 40)}, TypeError, ["Tensor", "several"]),
        ({"batches": [3]}, TypeError, ["batch must be a tensor"]),
        ({"scheme": "int4"}, TypeError, ["'int4'", "qk.W8A8()"]),
        ({"ignore": "nothing"}, ValueError, ["'nothing'"]),
        ({"model": nn.Linear(3, 3)}, ValueError, ["itself a Linear"]),
        ({"model": 3}, TypeError, ["int"]),
    ],
)
def test_refusals_change_nothing(options, kind, words):
    arguments = {"model": mlp(), "batches": rows(2), "scheme": INT4, **options}
    with pytest.raises(kind) as caught:
        qk.quantize_calibrated_(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if isinstance(arguments["model"], nn.Sequential):
        assert type(arguments["model"][0]) is nn.Linear


def test_a_batch_that_the_model_refuses_changes_nothing():
    model = mlp()
    with pytest.raises(RuntimeError):
        qk.quantize_calibrated_(model, [rows(1)[0], torch.zeros(2, 39)], INT4)
    assert type(model[0]) is nn.Linear
    assert not model[0]._forward_pre_hooks
