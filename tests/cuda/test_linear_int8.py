"""linear with int8 activations and int_mm as CUDA kernels, run by the emulator: the CPU's bits."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference as ref
from helpers.check import same_bits, same_tensor
from helpers.cuda import DeviceOps
from helpers.data import FLOATS, INTEGER_KINDS, Kind, awkward, floats, rng, strided, weight
from helpers.linear_int8 import ASYMMETRIC, SYMMETRIC, linear, pack, rounded_sums
from qkernels import _C

# (multiprocessors, rows): what decides on a kernel. Few rows go to the skinny one.
SKINNY = ((4, 1), (4, 8), (4, 9), (4, 16), (99, 31))
SMALL = ((4, 33), (1, 17), (64, 70))
LARGE = ((1, 65), (1, 130))
# (multiprocessors, rows, n, k, tile) on sm_90a, for int8 weights whose rows are one group.
WARPGROUPS = (
    (1, 257, 257, 130, "256"), (1, 129, 100, 1, "256"), (1, 200, 136, 520, "256"),
    (4, 520, 600, 128, "256"), (1, 65, 40, 100, "128"), (1, 128, 264, 1024, "128"),
    (1, 17, 129, 96, "64"), (1, 64, 256, 640, "64"), (4, 33, 250, 1500, "64 split k"),
    (1, 20, 130, 1024, "64"), (1, 300, 72, 1029, "256"), (2, 128, 100, 1500, "128 split k"),
    (2, 120, 30, 2000, "128 split k"),
)  # fmt: skip
MANY_TILES = (132, 2049, 8200, 520, "256")  # of a block; on a GPU


@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_shapes(ops: Any, device: Any, kind: Kind, activation: int) -> None:
    shapes = ((50, 72, -1), (33, 70, 32), (17, 100, 7), (40, 192, 96), (130, 1, -1), (16, 130, 64))
    for i, (multiprocessors, rows) in enumerate((*SKINNY, *SMALL, *LARGE)):
        device(multiprocessors)
        n, k, group_size = shapes[i % len(shapes)]
        w = weight(kind, n, k, group_size)
        x = awkward((rows, k), FLOATS[i % 3], seed=i)
        bias = floats((n,), FLOATS[i // 2 % 3], seed="bias") if i % 2 else None
        y = linear(ops, w, x, activation, bias)
        same_bits(y, w.integer(x, bias, activation))


@pytest.mark.parametrize("activation", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", INTEGER_KINDS[:2], ids=str)
def test_warpgroups(ops: Any, device: Any, sm90: None, kind: Kind, activation: int) -> None:
    shapes = WARPGROUPS
    if isinstance(ops, DeviceOps) and activation == SYMMETRIC:
        shapes += (MANY_TILES,)
    for i, (multiprocessors, rows, n, k, tile) in enumerate(shapes):
        device(multiprocessors)
        w = weight(kind, n, k)
        facts = (kind.cuda_layout, activation, rows, k, n, -1, 0, multiprocessors, True)
        assert _C.cuda_kernel_name(*facts) == f"cuda int8 wgmma 128x{tile}"
        bias = floats((n,), FLOATS[i // 2 % 3], seed="bias") if i % 2 else None
        for epilogue in (0, 1 + i % 6):
            x = awkward((rows, k), FLOATS[(i + epilogue) % 3], seed=i)
            y = linear(ops, w, x, activation, bias, epilogue=epilogue)
            if rows * n * k < 200_000 and epilogue == 0:
                same_bits(y, w.integer(x, bias, activation))


@pytest.mark.parametrize("group_size", [-1, 1, 16, 32, 96, 100, 128])
@pytest.mark.parametrize("kind", [INTEGER_KINDS[1], INTEGER_KINDS[4]], ids=str)
def test_groups(ops: Any, device: Any, kind: Kind, group_size: int) -> None:
    for multiprocessors, rows in ((4, 3), (4, 20), (1, 66)):
        device(multiprocessors)
        for k in (100, 321):
            linear(ops, weight(kind, 35, k, group_size), awkward((rows, k)), ASYMMETRIC)


@pytest.mark.parametrize("type", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [INTEGER_KINDS[0], *INTEGER_KINDS[3:]], ids=str)
def test_rows_of_whole_chunks(ops: Any, device: Any, kind: Kind, type: torch.dtype) -> None:
    """Their codes are made by a kernel that has a chunk a thread, at most 1024 at once."""
    device(4)
    for k, group_size in ((32, -1), (96, 32), (32 * 1025, 64)):
        w = weight(kind, 17, k, group_size)
        x = awkward((3, k), type, seed=k)
        same_bits(linear(ops, w, x, SYMMETRIC), w.integer(x, None, SYMMETRIC))


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_few_rows_and_many_groups(ops: Any, device: Any, kind: Kind) -> None:
    """More groups than the skinny kernel keeps at a time, of one chunk, two and three."""
    device(4)
    for rows, k, group_size in ((1, 1200, 32), (9, 1090, 32), (7, 2176, 64), (17, 1700, 96)):
        w = weight(kind, 18, k, group_size)
        linear(ops, w, awkward((rows, k), torch.bfloat16), SYMMETRIC)


@pytest.mark.parametrize(("multiprocessors", "rows"), [(4, 5), (4, 40), (1, 70)])
@pytest.mark.parametrize("kind", [INTEGER_KINDS[0], INTEGER_KINDS[4]], ids=str)
def test_static_scales_factors_and_orders(
    ops: Any, device: Any, kind: Kind, multiprocessors: int, rows: int
) -> None:
    device(multiprocessors)
    for k in (64, 77):
        w = weight(kind, 33, k, 32)
        x = awkward((rows, k), torch.bfloat16)
        scale, zero = torch.tensor(0.02), torch.tensor(-7, dtype=torch.int8)
        premul = floats((k,), seed="premul")
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        linear(ops, w, x, SYMMETRIC, extra=(scale, None, None, None))
        linear(ops, w, x, ASYMMETRIC, extra=(scale, zero, premul, None))
        linear(ops, w, x, ASYMMETRIC, extra=(None, None, premul, None))
        linear(ops, w, x, SYMMETRIC, extra=(None, None, premul, perm))


@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_extreme_codes(ops: Any, device: Any, kind: Kind, multiprocessors: int) -> None:
    device(multiprocessors)
    low, high = (-128, 127) if kind.form is ref.INT8 else (0, 15)
    for code in (low, high):
        # 256 is the longest group whose sums fit into the significand of a float.
        for rows, group_size in ((2, 500), (66, 500), (66, 256)):
            w = weight(kind, 17, 1000, group_size, codes=np.full((17, 1000), code))
            linear(ops, w, -torch.ones(rows, 1000), ASYMMETRIC)  # codes of -128
            linear(ops, w, torch.ones(rows, 1000), SYMMETRIC)  # of 127


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_int4_whose_sums_floats_round(ops: Any, device: Any, symmetric: bool) -> None:
    """They are rounded before the zero point adds its share, by every kernel."""
    for w, x in rounded_sums(Kind(ref.INT4, symmetric, torch.float32)):
        for multiprocessors, rows in ((4, 3), (4, 40), (1, 66)):
            device(multiprocessors)
            y = linear(ops, w, x[:rows], SYMMETRIC)
            if rows == 3:
                same_bits(y, w.integer(x[:rows], None, SYMMETRIC))


@pytest.mark.parametrize("rows", [12, 40, 70])
def test_a_bad_row_touches_no_other(ops: Any, device: Any, rows: int) -> None:
    device(1)
    for kind, group_size in ((INTEGER_KINDS[1], -1), (INTEGER_KINDS[4], 32)):
        w = weight(kind, 20, 64, group_size)
        x = floats((rows, 64))
        x[2, 3], x[7, 63], x[9, 0] = float("nan"), float("inf"), float("-inf")
        for extra in ((None,) * 4, (torch.tensor(0.01), None, None, None)):
            y = linear(ops, w, x, ASYMMETRIC, extra=extra)
            assert y[[2, 7, 9]].isnan().all()
            assert y[[0, 1, 3, 8]].isfinite().all()


def test_functions(ops: Any, device: Any) -> None:
    device(1)
    for epilogue in range(7):
        for rows, group_size in ((3, 32), (40, -1), (66, 32)):
            w = weight(INTEGER_KINDS[2], 19, 64, group_size)
            linear(ops, w, floats((rows, 64), torch.float16), SYMMETRIC, epilogue=epilogue)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_rows_alone_and_in_company(ops: Any, device: Any, group_size: int) -> None:
    """Every kernel gives a row the same bits."""
    for kind in (INTEGER_KINDS[0], INTEGER_KINDS[4]):
        w = weight(kind, 35, 640, group_size)
        x = awkward((66, 640))
        results = []
        for multiprocessors, step in ((1, 66), (64, 66), (1, 33), (99, 31), (4, 16), (4, 7)):
            device(multiprocessors)
            parts = [linear(ops, w, part, ASYMMETRIC) for part in x.split(step)]
            results.append(torch.cat(parts))
        for other in results[1:]:
            same_tensor(other, results[0])


def test_any_strides_and_nothing_at_all(ops: Any, device: Any) -> None:
    device(4)
    w = weight(INTEGER_KINDS[0], 20, 40, 16)
    for _, x in strided(floats((3, 40))):
        linear(ops, w, x, SYMMETRIC)
    linear(ops, w, floats((3, 2, 40)), SYMMETRIC)
    for rows, n, k, group_size in ((0, 5, 8, -1), (3, 0, 8, -1), (3, 5, 0, -1), (40, 5, 0, 16)):
        w = weight(INTEGER_KINDS[1], n, k, group_size)
        linear(ops, w, torch.ones(rows, k), ASYMMETRIC, torch.ones(n))


def test_indices_from_nowhere_read_nothing(ops: Any) -> None:
    """The CPU refuses them; a GPU's glue cannot look, so the rows are NaN."""
    w = weight(INTEGER_KINDS[0], 5, 8)
    packed, sizes = pack(ops, w)
    perm = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1 << 40])
    y = ops.linear(torch.ones(2, 8), packed, None, None, None, None, perm, *sizes, 1, 0)
    assert y.isnan().all()


def test_int_mm(ops: Any, device: Any) -> None:
    for multiprocessors, m, k, n in (
        (4, 1, 100, 33), (4, 16, 5, 8), (64, 40, 1100, 70), (1, 130, 64, 130), (1, 3, 0, 4),
        (1, 70, 0, 4), (1, 0, 3, 4), (1, 3, 4, 0),
    ):  # fmt: skip
        device(multiprocessors)
        a, b = (torch.from_numpy(rng(i, m).integers(-128, 128, s, np.int8))
                for i, s in ((0, (m, k)), (1, (k, n))))  # fmt: skip
        for right in (b, b.t().contiguous().t()):
            y = ops.int_mm(a, right)
            assert y.dtype == torch.int32
            assert torch.equal(y.long(), a.long() @ b.long())


def test_int_mm_by_warpgroups(ops: Any, device: Any, sm90: None) -> None:
    device(1)
    for m, k, n in ((257, 130, 300), (33, 1000, 70), (100, 64, 5), (20, 0, 4)):
        a, b = (torch.from_numpy(rng(i, m).integers(-128, 128, s, np.int8))
                for i, s in ((0, (m, k)), (1, (k, n))))  # fmt: skip
        assert torch.equal(ops.int_mm(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("rows", [1, 17])
def test_the_longest_sum(ops: Any, device: Any, rows: int) -> None:
    device(1)
    a = torch.full((rows, 131071), -128, dtype=torch.int8)
    b = torch.full((131071, 1), -128, dtype=torch.int8)
    assert torch.equal(ops.int_mm(a, b).long(), a.long() @ b.long())
