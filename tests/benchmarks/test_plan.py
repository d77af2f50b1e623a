"""Picking cases, and how many copies of a weight are rotated."""

import pytest
import torch

from qkernels.bench import plan
from qkernels.bench.groups.products import copies
from qkernels.bench.plan import CONVS, Conv, Only, Shape
from qkernels.bench.results import last_level_cache


def test_words_are_read() -> None:
    only = Only.parse(["group=linear,quantize", "m=1,16", "scheme=W4A8*", "peer=torch *"])
    assert only.groups(plan.GROUPS) == ["linear", "quantize"]
    assert only.m == (1, 16)
    assert only.engine("W4A8 g128", own=True) and not only.engine("W8A8", own=True)
    assert only.engine("torch fp32", own=False) and not only.engine("ggml q4_0", own=False)


def test_nothing_chosen_is_everything() -> None:
    only = Only.parse([])
    assert only.groups(plan.GROUPS) == list(plan.GROUPS)
    assert only.shapes(plan.LINEAR_SHAPES) == list(plan.LINEAR_SHAPES)
    assert only.engine("anything", own=False) and only.has_model("minilm")


@pytest.mark.parametrize(
    "word", ["linear", "group=", "group=linaer", "shape=4096", "shape=0x4", "m=one", "size=3"]
)
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="--only: "):
        Only.parse([word])


def test_a_shape_of_ones_own() -> None:
    only = Only.parse(["shape=100x60,4096x4096", "m=3"])
    assert [str(s) for s in only.shapes(plan.LINEAR_SHAPES, others=True)] == ["4096x4096", "100x60"]
    assert {s.rows for s in only.shapes(plan.LINEAR_SHAPES, others=True)} == {(3,)}
    assert only.shapes(plan.BACKWARD_SHAPES) == []


def test_rows_are_picked_from_those_of_the_shape() -> None:
    assert Only.parse(["m=1,64"]).shapes([Shape(8, 8, (1, 2))]) == [Shape(8, 8, (1,))]


def test_convolutions_are_picked_by_name() -> None:
    assert Only.parse([]).convs(CONVS) == list(CONVS)
    assert Only.parse(["conv=*groups,*batch 8"]).convs(CONVS) == list(CONVS[-2:])
    assert len({str(conv) for conv in CONVS}) == len(CONVS) == 10
    assert str(Conv(3, 64, 224, 7, stride=2)) == "7x7/2 3-64 224x224"


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_operations_of_a_convolution(conv: Conv) -> None:
    layer = torch.nn.Conv2d(
        conv.channels,
        conv.out,
        conv.kernel,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        device="meta",
    )
    x = torch.empty(conv.batch, conv.channels, conv.size, conv.size, device="meta")
    assert conv.operations == 2 * layer(x).numel() * layer.weight[0].numel()


def test_large_weights_are_rotated_past_the_cache() -> None:
    shape = Shape(4096, 4096)
    for bits in (4, 8, 32):
        together = copies(shape, bits) * 4096 * 4096 * bits / 8
        assert together >= 2.5 * last_level_cache()
    assert copies(Shape(384, 384), 4) == 1
