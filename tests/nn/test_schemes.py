"""Schemes: values, equality, text and JSON, and what they refuse."""

import copy
import json
import pickle

import pytest
import torch

import qkernels as qk
from qkernels import _C
from qkernels.formats import FORMATS, format_of, scale_dtype_code
from qkernels.schemes import SCHEMES, Scheme


def test_defaults_are_the_documented_ones():
    assert (qk.W8A8().format, qk.W8A8().group_size, qk.W8A8().activation) == (
        "int8",
        -1,
        "symmetric",
    )
    assert qk.W8A8().scale_dtype == qk.W8A16().scale_dtype == torch.float32
    assert (qk.W4A16().group_size, qk.W4A16().symmetric, qk.W4A16().activation) == (
        128,
        False,
        "float",
    )
    assert (qk.W4A8().group_size, qk.W4A8().activation) == (128, "symmetric")
    assert (qk.NF4().group_size, qk.NF4().format, qk.NF4().symmetric) == (64, "nf4", True)
    for grouped in (qk.W4A16(), qk.W4A8(), qk.NF4(), qk.W8A16(group_size=32)):
        assert grouped.scale_dtype == torch.bfloat16


def test_equal_hashable_and_ordered_arguments():
    assert qk.W4A16(32) == qk.W4A16(group_size=32) != qk.W4A16(64)
    assert qk.W8A8() != qk.W8A16()
    assert {qk.W8A8(): 1}[qk.W8A8()] == 1
    with pytest.raises(AttributeError):
        qk.W8A8().group_size = 3


def test_text_is_the_call_that_makes_it(scheme):
    names = {**SCHEMES, "torch": torch}
    assert eval(repr(scheme), names) == scheme
    assert repr(qk.W8A8()) == "W8A8()"
    assert repr(qk.W4A16()) == "W4A16(group_size=128)"
    assert eval(repr(qk.W8A8(static=True)), names) == qk.W8A8(static=True)
    assert eval(repr(qk.W4A16(group_size=-1)), names) == qk.W4A16(group_size=-1)


def test_json_pickle_and_copy(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert pickle.loads(pickle.dumps(scheme)) == scheme
    assert copy.deepcopy(scheme) == scheme


def test_layout_says_what_the_scheme_says(scheme):
    said = _C.describe_layout(scheme.layout)
    assert said["format"] == scheme.format
    assert f"torch.{said['scale_dtype']}" == str(scheme.scale_dtype)
    assert said["symmetric"] == scheme.symmetric
    assert scheme.format_code == FORMATS[scheme.format].code


def test_schemes_that_store_alike_share_weights():
    assert qk.W8A8().shares_weight_with(qk.W8A16())
    assert not qk.W8A16().shares_weight_with(qk.W8A16(group_size=32))
    assert not qk.W4A16().shares_weight_with(qk.W4A16(symmetric=True))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: qk.W4A16(group_size=0), ValueError, ["W4A16", "group_size is 0", "-1"]),
        (lambda: qk.NF4(group_size=-2), ValueError, ["group_size is -2"]),
        (lambda: qk.W4A16(group_size=1.5), TypeError, ["group_size is 1.5", "integer"]),
        (lambda: qk.W4A16(group_size=True), TypeError, ["group_size is True"]),
        (lambda: qk.W8A8(activation="int8"), ValueError, ["activation is 'int8'", "'symmetric'"]),
        (lambda: qk.W8A8(activation="float"), ValueError, ["W8A16"]),
        (lambda: qk.W4A8(activation="float"), ValueError, ["W4A16"]),
        (lambda: qk.W8A8(static=1), TypeError, ["static is 1"]),
        (lambda: qk.W4A16(symmetric=None), TypeError, ["symmetric is None"]),
        (lambda: qk.W8A16(scale_dtype=torch.float64), ValueError, ["W8A16", "torch.float64"]),
        (lambda: qk.W8A16(scale_dtype="float32"), ValueError, ["'float32'"]),
        (lambda: Scheme(), TypeError, ["W8A8"]),
        (lambda: qk.NF4(symmetric=False), TypeError, ["symmetric"]),
        (lambda: Scheme.from_dict({"scheme": "W2A2"}), ValueError, ["W2A2", "W4A16"]),
        (lambda: Scheme.from_dict({"scheme": ["W8A8"]}), ValueError, ["names no scheme"]),
        (lambda: Scheme.from_dict(None), ValueError, ["names no scheme"]),
        (lambda: Scheme.from_dict({"scheme": "NF4", "bits": 4}), ValueError, ["no field bits"]),
        (
            lambda: Scheme.from_dict({"scheme": "NF4", "scale_dtype": "load"}),
            ValueError,
            ["scale_dtype"],
        ),
        (
            lambda: Scheme.from_dict({"scheme": "NF4", "group_size": "64"}),
            ValueError,
            ["group_size is '64'"],
        ),
        (lambda: format_of("int3"), ValueError, ["int3", "int8"]),
        (lambda: format_of(["int8"]), ValueError, ["int8"]),
        (lambda: scale_dtype_code(torch.int8), ValueError, ["torch.int8"]),
    ],
)
def test_refusals_are_sentences(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
