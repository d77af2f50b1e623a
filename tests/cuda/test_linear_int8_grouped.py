"""linear with int8 activations and weights in groups on sm_90a: the kernel that
QKERNELS_GROUPED_WGMMA=1 asks for. By these tests, and by what compute-sanitizer says of them,
scripts/gpu_check.sh tells whether it has to be asked for any longer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference as ref
from helpers.cuda import DeviceOps, on_gpu
from helpers.data import FLOATS, INTEGER_KINDS, Kind, awkward, floats, rng, weight
from helpers.linear_int8 import ASYMMETRIC, SYMMETRIC, linear, pack, rounded_sums
from qkernels import _C


@pytest.fixture
def asked_for(sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has the instructions of sm_90a, and the kernel may run."""
    monkeypatch.setenv("QKERNELS_GROUPED_WGMMA", "1")


# (group_size, k): a group is one, two or four chunks of 32 k, three, or several stages of 128; the
# last one is ragged; more groups than a page holds; runs that are no multiple of what is unrolled.
GROUPED = (
    (128, 700),
    (128, 2400),
    (64, 330),
    (32, 999),
    (96, 700),
    (256, 1300),
    (100, 250),
    (1, 3),
)


# (rows, n, k, group_size): of them a GPU of 132 multiprocessors takes the largest tile, and a block
# several; the second has more groups than its pages.
MANY_GROUPED_TILES = ((2049, 8200, 520, 128), (140, 8800, 2100, 128))


@pytest.mark.parametrize("shape", MANY_GROUPED_TILES, ids=str)
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_many_tiles_of_groups_by_warpgroups(
    ops: Any, asked_for: None, kind: Kind, shape: tuple[int, int, int, int]
) -> None:
    rows, n, k, group_size = shape
    facts = (kind.cuda_layout, 1, rows, k, n, group_size, 0, 132, True)
    assert _C.cuda_kernel_name(*facts) == "cuda int8 wgmma grouped 128x128"
    if not isinstance(ops, DeviceOps):  # which has the time for so many
        rows, n = (131, 257) if k < 1000 else (20, 40)
    w = weight(kind, n, k, group_size)
    linear(ops, w, awkward((rows, k), torch.bfloat16), SYMMETRIC)


@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_groups_by_warpgroups(
    ops: Any, device: Any, asked_for: None, kind: Kind, multiprocessors: int
) -> None:
    device(multiprocessors)
    shapes = ((65, 70), (19, 17), (33, 300), (131, 257), (30, 64), (257, 513), (100, 1), (128, 256))
    seen = set()
    for i, (group_size, k) in enumerate(GROUPED):
        rows, n = shapes[(i + INTEGER_KINDS.index(kind)) % len(shapes)]
        w = weight(kind, n, k, group_size)
        facts = (kind.cuda_layout, 1, rows, k, n, group_size, 0, multiprocessors, True)
        seen.add(_C.cuda_kernel_name(*facts))
        x = awkward((rows, k), FLOATS[i % 3], seed=i)
        bias = floats((n,), FLOATS[i // 2 % 3], seed="bias") if i % 2 else None
        linear(ops, w, x, SYMMETRIC + i // 2 % 2, bias, epilogue=i % 7)
    # By these numbers of multiprocessors, the tiles that a GPU takes are all seen.
    few = {f"cuda int8 wgmma grouped 64x{tokens}" for tokens in (32, 64)}
    large = {"cuda int8 wgmma grouped 128x128"}
    assert seen == few | large


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_lose_bits_by_warpgroups(
    ops: Any, device: Any, asked_for: None, symmetric: bool
) -> None:
    """A sixteenth of a scale may have fewer bits than the scale."""
    device(1)
    w = weight(Kind(ref.INT4, symmetric, torch.float32), 70, 1400, 128)
    scale = w.scale * np.float32(2.0) ** rng("tiny").integers(-125, -110, w.scale.shape)
    stored = w.data, torch.from_numpy(scale.astype(np.float32)), w.zero_tensor
    packed = torch.ops.qkernels.pack(*stored, w.layout, w.k, w.group_size)
    w = replace(w, scale=scale, scale_tensor=stored[1], packed=packed)
    for rows in (20, 40, 100):
        linear(ops, w, floats((rows, 1400)) * 1e30, ASYMMETRIC)


@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.parametrize("kind", INTEGER_KINDS[3:5], ids=str)
def test_rows_of_int4_by_warpgroups(
    ops: Any, device: Any, asked_for: None, kind: Kind, multiprocessors: int
) -> None:
    device(multiprocessors)
    for rows, n, k in ((65, 130, 1000), (200, 257, 64), (70, 3, 1), (64, 64, 512), (40, 5, 0)):
        linear(ops, weight(kind, n, k), awkward((rows, k)), ASYMMETRIC)
    low, high = (0, 15)
    for code in (low, high):  # the longest sums of both signs
        for group_size in (-1, 500, 128):
            w = weight(kind, 17, 1000, group_size, codes=np.full((17, 1000), code))
            linear(ops, w, -torch.ones(66, 1000), ASYMMETRIC)
            linear(ops, w, torch.ones(66, 1000), SYMMETRIC)


def test_factors_and_bad_rows_by_warpgroups(ops: Any, device: Any, asked_for: None) -> None:
    device(4)
    w = weight(INTEGER_KINDS[4], 33, 320, 64)
    x, premul = floats((70, 320)), floats((320,), seed="premul")
    perm = torch.from_numpy(rng("perm").permutation(320))
    scale, zero = torch.tensor(0.02), torch.tensor(-7, dtype=torch.int8)
    linear(ops, w, x, ASYMMETRIC, extra=(scale, zero, premul, None))
    linear(ops, w, x, SYMMETRIC, extra=(None, None, premul, perm))
    x[2, 3], x[69, 0] = float("nan"), float("inf")
    y = linear(ops, w, x, ASYMMETRIC)
    assert y[[2, 69]].isnan().all()
    assert y[[1, 3, 68]].isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_whose_sums_floats_round_by_warpgroups(
    ops: Any, device: Any, asked_for: None, symmetric: bool
) -> None:
    device(1)
    for w, x in rounded_sums(Kind(ref.INT4, symmetric, torch.float32)):
        linear(ops, w, x, SYMMETRIC)


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_the_same_bits_again_and_again(ops: Any, device: Any, asked_for: None, kind: Kind) -> None:
    """On a GPU hundreds of times in each tile, while another stream keeps memory busy."""
    device(1)
    if not isinstance(ops, DeviceOps):
        w, x = weight(kind, 40, 300, 64), floats((40, 300))
        linear(ops, w, x, ASYMMETRIC)
        return
    noise, side = torch.ones(1 << 26, device="cuda"), torch.cuda.Stream()
    for tile, rows, n, k, group_size in (
        ("128x128", 140, 8800, 2100, 128),
        ("64x64", 64, 8192, 2048, 64),
        ("64x32", 30, 512, 990, 32),
    ):
        facts = (kind.cuda_layout, 2, rows, k, n, group_size, 0, 132, True)
        assert _C.cuda_kernel_name(*facts) == f"cuda int8 wgmma grouped {tile}"
        w, x = weight(kind, n, k, group_size), awkward((rows, k), torch.bfloat16)
        want = on_gpu(linear(ops, w, x, ASYMMETRIC).view(torch.int16))
        packed, sizes = pack(ops, w)
        x, packed = on_gpu(x), on_gpu(packed)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(400):
            if i % 8 == 0:
                with torch.cuda.stream(side):
                    noise.mul_(1.0)
            y = torch.ops.qkernels.linear(x, packed, *[None] * 5, *sizes, ASYMMETRIC, 0)
            wrong += (y.view(torch.int16) != want).sum()
        assert wrong.item() == 0
