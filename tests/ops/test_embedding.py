"""embedding: rows of the weight that linear reads, dequantized."""

import numpy as np
import pytest
import torch

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.data import FLOATS, GROUPS, KINDS, Kind, strided, weight

ops = torch.ops.qkernels


def rows_of(w, indices: torch.Tensor) -> np.ndarray:
    scale, zero = (ref.spread(part, w.k, w.group_size) for part in (w.scale, w.zero))
    return ref.decode(w.codes, w.kind.form, scale, zero)[indices.numpy()]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows(kind: Kind, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate([(1, 1), (15, 3), (16, 8), (17, 9), (49, 127), (100, 130), (3, 0)]):
        w = weight(kind, n, k, GROUPS[i])
        indices = torch.from_numpy(np.random.default_rng(i).integers(0, n, 53))
        layout, _, _, group_size = w.sizes
        got = ops.embedding(indices, w.packed, layout, n, k, group_size, dtype)
        assert got.dtype == dtype
        assert got.shape == (53, k)
        same_bits(got, rows_of(w, indices))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_shapes_of_indices(shape: tuple[int, ...], index_dtype: torch.dtype) -> None:
    w = weight(KINDS[4], 40, 24, 8)
    indices = torch.arange(int(np.prod(shape))).reshape(shape) * 3 % 40
    got = ops.embedding(indices.to(index_dtype), w.packed, w.layout, 40, 24, 8, torch.float32)
    assert got.shape == (*shape, 24)
    same_bits(got, rows_of(w, indices))


def test_any_strides() -> None:
    w = weight(KINDS[3], 40, 24, 8)
    indices = torch.arange(35).reshape(5, 7)
    want = ops.embedding(indices, w.packed, w.layout, 40, 24, 8, torch.float32)
    for name, view in strided(indices):
        assert torch.equal(view, indices), name
        got = ops.embedding(view, w.packed, w.layout, 40, 24, 8, torch.float32)
        same_tensor(got, want)
    for _, packed in strided(w.packed):
        same_tensor(ops.embedding(indices, packed, w.layout, 40, 24, 8, torch.float32), want)
    one = torch.tensor(3).expand(4, 5)
    got = ops.embedding(one, w.packed, w.layout, 40, 24, 8, torch.float32)
    assert (got == got[0, 0]).all()


def test_an_empty_table_gives_empty_results() -> None:
    w = weight(KINDS[0], 0, 24)
    none = torch.zeros(0, 3, dtype=torch.int64)
    got = ops.embedding(none, w.packed, w.layout, 0, 24, -1, torch.float32)
    assert got.shape == (0, 3, 24)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_agrees_with_dequantize(kind: Kind) -> None:
    w = weight(kind, 33, 40, 16)
    for dtype in FLOATS:
        got = ops.embedding(torch.arange(33), w.packed, w.layout, 33, 40, 16, dtype)
        arguments = (w.scale_tensor, w.zero_tensor, w.kind.form.code, 16, 40, dtype)
        same_tensor(got, ops.dequantize(w.data, *arguments))
