"""A packed weight of another layout, version, device or size is an error, never a wrong result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.data import KINDS, floats, weight
from helpers.layout import layout_id
from qkernels import _C

ops = torch.ops.qkernels
W = weight(KINDS[0], 19, 8)  # int8, symmetric
NF4, INT16 = 2, 3

# The ops that take a layout, called with right arguments but for it.
CALLS: dict[str, Callable[[int], Any]] = {
    "pack": lambda layout: ops.pack(W.data, W.scale_tensor, None, layout, 8, -1),
    "unpack": lambda layout: ops.unpack(W.packed, layout, 8, 19, -1),
    "linear": lambda layout: ops.linear(
        floats((3, 8)), W.packed, None, None, None, None, None, layout, 8, 19, -1, 0, 0
    ),
    "linear_shared": lambda layout: ops.linear_shared(
        floats((3, 8)), [W.packed], [None], layout, 8, [19], -1, 1, [0]
    ),
    "linear_backward_input": lambda layout: ops.linear_backward_input(
        floats((3, 19)), W.packed, layout, 8, 19, -1
    ),
    "embedding": lambda layout: ops.embedding(
        torch.tensor([1]), W.packed, layout, 19, 8, -1, torch.float32
    ),
    "pack_conv": lambda layout: ops.pack_conv(W.data, W.scale_tensor, None, layout, 1, 8, 1, -1),
    "unpack_conv": lambda layout: ops.unpack_conv(W.packed, layout, 1, 8, 1, 19, -1),
    "conv": lambda layout: ops.conv(
        floats((2, 8, 3)), W.packed, *[None] * 8, layout, 19, 1, -1, [1], [1], [0], [1], False, 0, 0
    ),
}
UNKNOWN = "is not a packed layout that qkernels has written; take it from qkernels._C.layout("
VERSION = "but this build reads 1; load the model from its file again"


def test_all_ops_that_take_a_layout_are_here() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("qkernels::")]
    names = {s.name.removeprefix("qkernels::") for s in schemas if "int layout" in str(s)}
    # The same functions in C++ as linear and conv; the sequence calls conv.
    known = {"linear_differentiable", "conv_differentiable", "conv_sequence"}
    assert names - known == set(CALLS)
    for call in CALLS.values():
        call(W.layout)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (-1, UNKNOWN),
        (2**63 - 1, UNKNOWN),
        (layout_id(W.kind.form, 3, True), UNKNOWN),  # no such scale type
        (W.layout | 2 << 16, UNKNOWN),  # neither symmetric nor asymmetric
        (W.layout | NF4 << 20 | 1 << 16, UNKNOWN),  # nf4 with zero points
        (W.layout | INT16 << 20, UNKNOWN),  # does not pack
        (W.layout | 9 << 20, UNKNOWN),
        (0, "the weight is packed for another device (family 0)"),
        (layout_id(W.kind.form, 0, True, device=2), "family 2) but the call runs on the CPU"),
        (W.layout + 1, f"the weight is packed in layout version 2 {VERSION}"),
        (W.layout & ~0xFF, f"the weight is packed in layout version 0 {VERSION}"),
    ],
)
def test_forged_layouts(op: str, layout: int, sentence: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        CALLS[op](layout)
    assert str(caught.value).startswith(f"qkernels::{op}: ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("op", CALLS)
def test_layouts_of_another_size(op: str) -> None:
    for kind in (KINDS[1], KINDS[4], KINDS[6]):
        with pytest.raises(RuntimeError, match=f"qkernels::{op}: "):
            CALLS[op](kind.layout)


def test_only_the_id_tells_float16_from_bfloat16_scales() -> None:
    """The bytes have one size, so the id must travel with them."""
    sizes = {_C.block_bytes(kind.layout, 64, 16) for kind in (KINDS[4], KINDS[5])}
    assert len(sizes) == 1
    assert KINDS[4].layout != KINDS[5].layout


@pytest.mark.parametrize("symmetric", [True, False])
def test_accumulations_that_could_overflow_are_refused(symmetric: bool) -> None:
    kind = KINDS[0 if symmetric else 1]
    limit = 131_071 if symmetric else 65_793
    k = limit + 1
    w = weight(kind, 1, k)
    x = torch.zeros(1, k)
    sentence = rf"an int32 sum over {k} products can overflow \(the limit is {limit}\); quantize"
    with pytest.raises(RuntimeError, match=sentence):
        w.linear(x, activation=1)
    assert w.linear(x).shape == (1, 1)
    grouped = weight(kind, 1, k, 4096)
    assert grouped.linear(x, activation=1).shape == (1, 1)
