"""pack and unpack on CUDA: the bytes that the layout describes, and everything back."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers import layout as packed_layout
from helpers.check import same_tensor
from helpers.data import KINDS, Kind, Weight, strided, weight
from qkernels import _C

SHAPES = [(0, 5, -1), (1, 0, -1), (3, 0, 8), (1, 1, -1), (15, 7, 3), (16, 32, -1), (17, 33, 1)]
SHAPES += [(33, 64, 32), (20, 72, 8), (47, 100, 40), (16, 130, 64), (5, 257, 128), (2, 90, 5000)]


def expected(w: Weight) -> torch.Tensor:
    stored = w.scale_tensor
    scale_bytes = stored.flatten().view(torch.uint8).reshape(*stored.shape, stored.element_size())
    zero = None if w.kind.symmetric else w.zero
    arguments = (w.data.numpy(), w.scale, scale_bytes.numpy(), zero, w.kind.form, w.k)
    return torch.from_numpy(packed_layout.pack_cuda(*arguments, w.group_size))


def pack(ops: Any, w: Weight) -> torch.Tensor:
    arguments = (w.data, w.scale_tensor, w.zero_tensor, w.kind.cuda_layout, w.k, w.group_size)
    return ops.pack(*arguments)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bytes_and_inverse(ops: Any, kind: Kind) -> None:
    for n, k, group_size in SHAPES:
        w = weight(kind, n, k, group_size)
        packed = pack(ops, w)
        assert packed.shape[1] == _C.block_bytes(kind.cuda_layout, k, group_size)
        assert torch.equal(packed, expected(w)), (n, k, group_size)
        data, scale, zero = ops.unpack(packed, kind.cuda_layout, k, n, group_size)
        same_tensor(data, w.data)
        same_tensor(scale, w.scale_tensor)
        if w.zero_tensor is None:
            assert zero.shape == (0,)
        else:
            same_tensor(zero, w.zero_tensor)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_a_packed_weight_are_weights(ops: Any, kind: Kind) -> None:
    whole = weight(kind, 64, 40, 16)
    zero = None if whole.zero_tensor is None else whole.zero_tensor[16:48]
    arguments = (whole.data[16:48], whole.scale_tensor[16:48], zero, kind.cuda_layout, 40, 16)
    assert torch.equal(ops.pack(*arguments), pack(ops, whole)[1:3])


def test_any_strides(ops: Any) -> None:
    w = weight(KINDS[3], 21, 40, 8)
    want = pack(ops, w)
    for _, data in strided(w.data):
        got = ops.pack(data, w.scale_tensor, None, w.kind.cuda_layout, 40, 8)
        assert torch.equal(got, want)
    # Rows of codes that start on no vector.
    shifted = torch.cat([w.data.new_zeros(1), w.data.flatten()])[1:].view(w.data.shape)
    assert torch.equal(ops.pack(shifted, w.scale_tensor, None, w.kind.cuda_layout, 40, 8), want)


def test_nothing_is_lost_from_odd_scales(ops: Any) -> None:
    w = weight(KINDS[0], 17, 8)
    scale = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45] * 3)[:17, None]
    scale.view(torch.int32)[0] = 0x7FC12345
    packed = ops.pack(w.data, scale, None, w.kind.cuda_layout, 8, -1)
    back = ops.unpack(packed, w.kind.cuda_layout, 8, 17, -1)[1]
    assert torch.equal(back.view(torch.int32), scale.view(torch.int32))


def test_weights_of_another_device_are_refused(ops: Any) -> None:
    w = weight(KINDS[0], 16, 32)
    with pytest.raises(RuntimeError, match="packed for another device"):
        ops.unpack(w.packed, *w.sizes)
    with pytest.raises(RuntimeError, match="packed for another device"):
        torch.ops.qkernels.unpack(pack(ops, w), w.kind.cuda_layout, 32, 16, -1)
