"""embedding on CUDA: the same bits as on the CPU."""

from typing import Any

import pytest
import torch

from helpers.check import same_tensor
from helpers.data import FLOATS, KINDS, Kind, rng, strided, weight

cpu = torch.ops.qkernels


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows(ops: Any, kind: Kind) -> None:
    for i, (n, k, group_size) in enumerate(
        [(1, 1, -1), (15, 3, 1), (16, 8, 8), (17, 24, 7), (49, 127, 32), (33, 136, 40), (3, 0, -1)]
    ):
        w = weight(kind, n, k, group_size)
        indices = torch.from_numpy(rng("indices", n).integers(0, n, (2, 9)))
        stored = (w.data, w.scale_tensor, w.zero_tensor)
        packed = ops.pack(*stored, kind.cuda_layout, k, group_size)
        for dtype in (FLOATS[i % 3], FLOATS[(i + 1) % 3]):
            got = ops.embedding(indices, packed, kind.cuda_layout, n, k, group_size, dtype)
            same_tensor(got, cpu.embedding(indices, w.packed, w.layout, n, k, group_size, dtype))


def test_indices(ops: Any) -> None:
    w = weight(KINDS[4], 40, 24, 8)
    stored = (w.data, w.scale_tensor, w.zero_tensor)
    packed = ops.pack(*stored, w.kind.cuda_layout, 24, 8)
    rest = (w.kind.cuda_layout, 40, 24, 8, torch.float32)
    indices = torch.arange(35).reshape(5, 7)
    want = ops.embedding(indices, packed, *rest)
    same_tensor(ops.embedding(indices.int(), packed, *rest), want)
    for _, view in strided(indices):
        same_tensor(ops.embedding(view, packed, *rest), want)
    assert ops.embedding(indices[:0], packed, *rest).shape == (0, 7, 24)


def test_indices_out_of_range_end_the_kernel(emulator: Any) -> None:
    """An assertion on the device, after which no process can go on using a GPU."""
    w = weight(KINDS[4], 40, 24, 8)
    stored = (w.data, w.scale_tensor, w.zero_tensor)
    packed = emulator.pack(*stored, w.kind.cuda_layout, 24, 8)
    rest = (w.kind.cuda_layout, 40, 24, 8, torch.float32)
    for wrong in (-1, 40):
        with pytest.raises(RuntimeError, match="an index is out of range"):
            emulator.embedding(torch.tensor([0, wrong]), packed, *rest)
