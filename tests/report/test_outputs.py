"""How batches reach a model, and which output is compared."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qkernels.report.outputs import (
    Caller,
    evaluating,
    main_output,
    real_tokens,
    shape_text,
    without_padding,
)


class TwoInputs(nn.Module):
    def forward(self, x, scale=None):
        return x if scale is None else x * scale


class AnyInputs(nn.Module):
    def forward(self, *args, **kwargs):
        return len(args), sorted(kwargs)


X = torch.arange(6.0).reshape(2, 3)


def test_tensor_tuple_list_and_mapping():
    call = Caller(TwoInputs())
    assert torch.equal(call(X), X)
    assert torch.equal(call((X, 2.0)), 2 * X)
    assert torch.equal(call([X, 2.0]), 2 * X)
    assert torch.equal(call({"x": X, "scale": 3.0}), 3 * X)
    assert not call.left_out


def test_what_forward_has_no_parameter_for_is_left_out_and_named():
    call = Caller(TwoInputs())
    assert torch.equal(call((X, 2.0, "label")), 2 * X)
    assert torch.equal(call({"x": X, "labels": 1}), X)
    assert call.left_out == {"element 2", "'labels'"}


def test_variadic_forward_gets_everything():
    call = Caller(AnyInputs())
    assert call((X, X, X)) == (3, [])
    assert call({"a": X, "b": X}) == (0, ["a", "b"])


def test_named_tuples_survive_the_move_to_a_device():
    batch = namedtuple("Batch", "x scale")(X, 2.0)
    assert torch.equal(Caller(TwoInputs())(batch), 2 * X)


def test_own_way_to_call():
    assert torch.equal(Caller(TwoInputs(), lambda model, b: model(b["in"]))({"in": X}), X)


def test_batches_that_are_not_understood():
    with pytest.raises(ValueError, match=r"no key of the batch \(y\).*call=lambda"):
        Caller(TwoInputs())({"y": X})
    with pytest.raises(TypeError, match="got int"):
        Caller(TwoInputs())(3)


@dataclass
class Answer:
    last_hidden_state: torch.Tensor


@pytest.mark.parametrize(
    ("output", "name"),
    [
        (X, "output"),
        ({"loss": torch.tensor(1.0), "logits": X}, "logits"),
        ({"pooled": X, "last_hidden_state": X}, "last_hidden_state"),
        ({"loss": torch.tensor(1.0), "ids": X.long(), "features": X}, "features"),
        ((torch.tensor(1.0), X.long(), X), "output[2]"),
        (Answer(X), "last_hidden_state"),
    ],
)
def test_main_output(output, name):
    chosen = main_output(output)
    assert chosen.name == name
    assert torch.equal(chosen.tensor, X)


@pytest.mark.parametrize("output", [None, {"ids": X.long()}, (), X.long()])
def test_no_output_to_compare(output):
    with pytest.raises(TypeError, match="without a floating-point tensor"):
        main_output(output)


def test_padding_is_dropped_where_the_shape_fits():
    tokens = real_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    assert without_padding(hidden, tokens).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert without_padding(X, tokens) is X  # [batch, classes] is no sequence
    assert without_padding(hidden, None) is hidden
    assert real_tokens(X) is None
    assert real_tokens({"attention_mask": torch.ones(2, 3)}) is None


def test_shape_text():
    assert shape_text({"ids": X, "n": 3}) == "ids 2×3"
    assert shape_text((X, X)) == "2×3, 2×3"
    assert shape_text("text") == "str"


def test_evaluating_restores_every_flag():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, False, True]
