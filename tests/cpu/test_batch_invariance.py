"""A row's result depends on that row alone: not on its place or the others in the call."""

import pytest
import torch

from helpers.check import same_tensor
from helpers.data import FLOATS, INTEGER_KINDS, KINDS, Kind, awkward, floats, weight

ops = torch.ops.qkernels

CASES = [
    pytest.param(kind, activation, id=f"{kind}-activation {activation}")
    for kind in KINDS
    for activation in ((0, 1, 2) if kind in INTEGER_KINDS else (0,))
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_rows_alone_and_in_company(kind: Kind, activation: int, dtype: torch.dtype) -> None:
    for n, k, group_size in ((50, 130, 32), (17, 77, -1), (200, 512, 128)):
        w = weight(kind, n, k, group_size)
        x, bias = awkward((70, k), dtype), floats((n,))
        options = {"activation": activation, "epilogue": 2}
        whole = w.linear(x, bias, **options)
        for row in (0, 1, 7, 15, 16, 47, 48, 69):
            same_tensor(w.linear(x[row : row + 1], bias, **options), whole[row : row + 1])
            same_tensor(w.linear(x[row], bias, **options), whole[row])
        for m in (2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 31, 32, 33, 48, 49, 64):
            same_tensor(w.linear(x[:m], bias, **options), whole[:m])
            same_tensor(w.linear(x[70 - m :], bias, **options), whole[70 - m :])


@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_rows_of_a_large_batch_with_long_groups(kind: Kind, activation: int) -> None:
    """Groups longer than what a kernel unpacks at once, more rows than it takes at once."""
    w = weight(kind, 33, 2100, 1100)
    x = awkward((230, 2100))
    whole = w.linear(x, activation=activation)
    for row in (0, 100, 191, 192, 193, 229):
        same_tensor(w.linear(x[row], activation=activation), whole[row])


@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_outputs_do_not_depend_on_the_other_outputs(kind: Kind, activation: int) -> None:
    """What a column-parallel layer counts on: a slice of blocks gives a slice of the result."""
    w = weight(kind, 112, 70, 32)
    for m in (1, 5, 18, 49):
        x = awkward((m, 70))
        whole = w.linear(x, activation=activation)
        for begin, end in ((0, 16), (16, 64), (48, 112), (96, 112)):
            packed = w.packed[begin // 16 : end // 16]
            sizes = (w.layout, 70, end - begin, 32, activation, 0)
            part = ops.linear(x, packed, None, None, None, None, None, *sizes)
            same_tensor(part, whole[:, begin:end])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(kind: Kind) -> None:
    w = weight(kind, 100, 150, 32)
    grad = floats((40, 100))
    whole = ops.linear_backward_input(grad, w.packed, *w.sizes)
    for m in (1, 2, 7, 8, 17, 33):
        part = ops.linear_backward_input(grad[:m], w.packed, *w.sizes)
        same_tensor(part, whole[:m])


def test_rows_beyond_the_workspace() -> None:
    """A call so large that its rows are taken in chunks."""
    w = weight(KINDS[3], 2, 2048, 128)
    x = floats((20_000, 2048), seed="many")
    for activation in (0, 1):
        whole = w.linear(x, activation=activation)
        for row in (0, 4095, 4096, 8191, 12_345, 16_384, 19_999):
            same_tensor(w.linear(x[row], activation=activation), whole[row])
