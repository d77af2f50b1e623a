"""What trains: the parts of a model, the strategies, learning rates by part, thawing, heads."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.transfer import GradualUnfreezing, parameter_groups, parts, replace_head_, strategy
from qkernels.transfer.parts import head_name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(12, 20), nn.LayerNorm(20)
        self.down = nn.Sequential(nn.GELU(), nn.Linear(20, 12))

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)))


class Encoder(nn.Module):
    """Registers its head first, as some models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.embed = nn.Embedding(30, 12)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(12)

    def forward(self, tokens):
        x = self.embed(tokens) + self.token
        for layer in self.body.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Encoder()


TOKENS = torch.tensor([[1, 2, 29], [4, 5, 6]])
PARTS = ["", "embed", "body.layers.0", "body.layers.1", "body.layers.2", "head"]


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_parts_are_blocks_from_input_to_head(model):
    found = parts(model)
    assert [part.name for part in found] == PARTS
    assert set(found[0].parameters) == {"token"}
    # The final norm has no matrix, so it goes with the block before it.
    assert {"norm.weight", "norm.bias"} < set(found[4].parameters)
    everything = [name for part in found for name in part.parameters]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())


def test_a_residual_net_is_cut_at_its_blocks():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.layer1 = nn.Sequential(Residual(), Residual())
            self.fc = nn.Linear(4, 2)

    assert [p.name for p in parts(Net())] == ["conv1", "layer1.0", "layer1.1", "fc"]


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        ("full", None, ("",)),
        ("head", None, ("head.",)),
        ("partial", 0, ("head.",)),
        ("partial", 2, ("head.", "norm.", "body.layers.2.", "body.layers.1.")),
        ("partial", "body.layers.0", ("body.layers.0.",)),
        ("partial", ("head", "body.layers.*.norm"), ("head.", "body.layers.N.norm.")),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_strategies(model, kind, layers, expected, before):
    model.requires_grad_(before)
    table = strategy(model, kind, layers)
    wanted = {
        name
        for name, _ in model.named_parameters()
        if any(
            name.startswith(prefix.replace("N", str(i))) for prefix in expected for i in range(3)
        )
    }
    assert trains(model) == wanted
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert table.trainable == sum(sizes[name] for name in wanted)
    assert table.total == sum(sizes.values())
    assert not table.advice


def test_bias_alone_can_be_named(model):
    strategy(model, "partial", "bias")
    assert trains(model) == {n for n, _ in model.named_parameters() if n.endswith(".bias")}


def test_quantized_weights_are_frozen_by_nature(model):
    qk.quantize_(model, qk.W4A16(group_size=8), ignore=("head", "embed"))
    table = strategy(model, "full")
    assert trains(model) == {n for n, p in model.named_parameters() if p.is_floating_point()}
    row = next(row for row in table if row.name == "body.layers.1")
    assert row.quantized == 2 * 12 * 20
    assert row.trainable == 20 + 20 + 20 + 12
    assert row.note == "W4A16(group_size=8)"
    assert "add_lora_" in table.advice and "quantization-aware" in table.advice
    assert "W4A16(group_size=8)" in str(table) and "add_lora_" in str(table)
    assert table.to_dict()["parts"][-1]["name"] == "head"
    assert not strategy(model, "head").advice
    model(TOKENS).sum().backward()
    assert model.head.weight.grad is not None


def test_running_statistics_of_frozen_norms_are_pointed_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert "running statistics" in next(iter(strategy(model, "head"))).note
    assert not next(iter(strategy(model, "full"))).note


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    table = strategy(model, "head")
    assert table.total == 36 + 20
    assert trains(model) == {"0.weight"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("most",), "kind is 'most'; expected one of 'full', 'partial', 'head'"),
        (("partial",), "'partial' needs layers"),
        (("full", 3), "'full' takes no layers"),
        (("partial", 6), "expected 0 to 5"),
        (("partial", -1), "expected 0 to 5"),
        (("partial", "body.leyers.1"), "near it are"),
    ],
)
def test_bad_strategies_change_nothing(model, arguments, sentence):
    model.embed.requires_grad_(False)
    before = trains(model)
    with pytest.raises(ValueError, match=sentence):
        strategy(model, *arguments)
    assert trains(model) == before


def test_nothing_that_could_train_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    qk.quantize_(model, qk.W8A8())
    with pytest.raises(ValueError, match="nothing would train.*add_lora_"):
        strategy(model, "full")


# ---- learning rates ------------------------------------------------------------------------------


def test_learning_rates_fall_by_part(model):
    groups = parameter_groups(model, lr=0.5, factor=2.6)
    assert [g["name"] for g in groups] == PARTS[::-1]
    for depth, group in enumerate(groups):
        assert group["lr"] == pytest.approx(0.5 / 2.6**depth)
        assert "weight_decay" not in group
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_one_step_of_sgd_moves_each_part_by_its_rate(model):
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, factor=4.0))
    model(TOKENS).square().sum().backward()
    optimizer.step()
    for depth, part in enumerate(reversed(parts(model))):
        for name, parameter in part.parameters.items():
            expected = before.get_parameter(name) - 0.1 / 4.0**depth * parameter.grad
            torch.testing.assert_close(parameter, expected)


def test_weight_decay_is_for_matrices(model):
    strategy(model, "head")  # frozen parameters are in the groups all the same
    for group in parameter_groups(model, lr=0.1, weight_decay=0.01):
        ranks = {p.ndim for p in group["params"]}
        assert group["weight_decay"] == (0.0 if ranks == {1} else 0.01)
        assert 1 not in ranks or ranks == {1}


def test_groups_leave_quantized_weights_out(model):
    qk.quantize_(model, qk.W8A8(), ignore="head")
    grouped = [p for group in parameter_groups(model, lr=0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.is_floating_point()}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0; expected 0 or more"),
        ({"lr": 0.1, "factor": 0.5}, "factor is 0.5; expected 1 or more"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_bad_rates(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        parameter_groups(model, **options)


def test_gradual_unfreezing_goes_down_from_the_head(model):
    schedule = GradualUnfreezing(model, every=2)
    assert trains(model) == {"head.weight", "head.bias"}
    assert not schedule.done
    counts = []
    for _ in range(4):
        table = schedule.step()
        counts.append(sum(row.trainable > 0 for row in table))
    assert counts == [3, 5, 6, 6]
    assert schedule.done and trains(model) == {n for n, _ in model.named_parameters()}
    # Howard and Ruder (2018), written out: after step n, the head and the 2n parts before it.
    names = [set(part.parameters) for part in parts(model)]
    for steps in range(4):
        schedule = GradualUnfreezing(model, every=2)
        for _ in range(steps):
            schedule.step()
        assert trains(model) == set().union(*names[max(0, len(names) - 1 - 2 * steps) :])
    other = Encoder()
    resumed = GradualUnfreezing(other, every=2)
    schedule = GradualUnfreezing(model, every=2)
    schedule.step()
    resumed.load_state_dict(schedule.state_dict())
    assert trains(other) == trains(model)
    with pytest.raises(ValueError, match="every is 0"):
        GradualUnfreezing(model, every=0)


# ---- heads ---------------------------------------------------------------------------------------


def test_the_head_is_replaced_with_its_traits(model):
    model = model.bfloat16().eval()
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    new = replace_head_(model, 7)
    assert model.head is new and new.weight.requires_grad
    assert new.weight.dtype == torch.bfloat16 and not new.training
    assert model(TOKENS).shape == (2, 7) and calls == [1]
    handle.remove()
    model(TOKENS)
    assert calls == [1]


def test_a_quantized_head_gets_a_float_successor(model):
    qk.quantize_(model, qk.W8A8())
    new = replace_head_(model, 4)
    assert type(new) is nn.Linear and new.in_features == 12
    qk.transfer.add_lora_(model, targets="head")
    assert type(replace_head_(model, 5)) is nn.Linear
    assert model(TOKENS).shape == (2, 5)


def test_heads_by_custom_and_by_place():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
            self.pooler = nn.Linear(4, 4)

    model = Named()
    assert head_name(model) == "classifier.2"
    assert [part.name for part in parts(model)][-1] == "classifier.2"
    assert head_name(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())) == "1"
    replace_head_(model, 9, name="pooler")
    assert model.pooler.out_features == 9 and model.classifier[2].out_features == 2


def test_a_transformers_head_follows_its_config():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        vocab_size=50,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    found = [part.name for part in parts(model)]
    assert found[1:3] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert found[-1] == "classifier"
    replace_head_(model, 5)
    out = model(input_ids=TOKENS, labels=torch.tensor([4, 0]))
    assert out.logits.shape == (2, 5) and model.config.num_labels == 5
    out.loss.backward()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0,), ValueError, "out_features is 0"),
        ((3, "hed"), ValueError, "no module 'hed'"),
        ((3, "norm"), TypeError, "norm is a LayerNorm"),
    ],
)
def test_bad_heads(model, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        replace_head_(model, *arguments)


def test_no_head_at_all():
    with pytest.raises(ValueError, match="holds no linear layer"):
        replace_head_(nn.Sequential(nn.Conv1d(2, 2, 1)), 3)
