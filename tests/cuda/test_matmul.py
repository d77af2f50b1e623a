"""linear and its gradient by torch's matmul of the dequantized weight: when, and what it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import HALF_ULP, float_path_bound, same_tensor, within
from helpers.cuda import hopper
from helpers.data import FLOATS, KINDS, Kind, Weight, awkward, floats, rng, strided, weight
from qkernels import _C

HALVES = (torch.bfloat16, torch.float16)
MATMUL = "dequantize + matmul"
SETTING = "QKERNELS_MATMUL_ROWS"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"

# (out_features, in_features, group_size): whole tiles; groups that end inside of a step, with and
# without eights; a short last group; fewer outputs than a block; two packed rows; more k than a
# warp dequantizes.
SHAPES = (
    (24, 64, 32), (40, 104, 24), (16, 56, 7), (32, 200, 96), (8, 8, -1), (48, 128, -1),
    (40, 616, 160),
)  # fmt: skip


@pytest.fixture(autouse=True)
def torch_adds_in_float32() -> Any:
    """What the bound is stated for; off by default in torch."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "1")


def pack(ops: Any, w: Weight) -> Tensor:
    bits: Tensor = ops.pack(
        w.data, w.scale_tensor, w.zero_tensor, w.kind.cuda_layout, w.k, w.group_size
    )
    return bits


def linear(
    ops: Any, w: Weight, x: Tensor, bias: Tensor | None = None, epilogue: int = 0,
    premul: Tensor | None = None, perm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sizes = (w.kind.cuda_layout, w.k, w.n, w.group_size, 0, epilogue)
    y: Tensor = ops.linear(x, pack(ops, w), bias, None, None, premul, perm, *sizes)
    return y


def rounded(w: Weight, dtype: torch.dtype) -> Tensor:
    """W as the CPU's dequantize gives it."""
    code = w.kind.form.code
    result: Tensor = torch.ops.qkernels.dequantize(
        w.data, w.scale_tensor, w.zero_tensor, code, w.group_size, w.k, dtype
    )
    return result


def check(w: Weight, x: Tensor, y: Tensor, bias: Tensor | None = None, roundings: int = 1) -> None:
    """Inside of the bound of docs/NUMERICS.md; `roundings` of x or W to 16 bits."""
    assert y.dtype == x.dtype
    a, exact = ref.values(x).astype(np.float64), w.exact()
    magnitude = np.abs(a) @ np.abs(exact).T
    # A tensor core may cut bits off: 2**-23.
    bound = 3 * float_path_bound(a, exact, w.scale.shape[1])
    if x.dtype != torch.float32:
        bound = bound + roundings * HALF_ULP[x.dtype] * magnitude * 1.01
        tiny = 2.0**-25 if x.dtype == torch.float16 else 2.0**-134
        bound = bound + roundings * tiny * np.abs(a).sum(1, keepdims=True)
    want = a @ exact.T
    if bias is not None:
        want = want + ref.values(bias)
        bound = bound + 2.0**-23 * np.abs(ref.values(bias))
        if bias.dtype != x.dtype:  # the product is rounded before it
            bound = bound + HALF_ULP[x.dtype] * (np.abs(a @ exact.T) + bound)
    within(y, want, bound)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    for i, (n, k, group_size) in enumerate(SHAPES):
        w = weight(kind, n, k, group_size)
        x = floats((3 + 7 * i, k), dtype, seed=i)
        bias = floats((n,), FLOATS[i % 3], seed="bias") if i % 2 else None
        check(w, x, linear(ops, w, x, bias), bias)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_weight_is_that_of_dequantize(ops: Any, kind: Kind) -> None:
    """To the bit, read by rows of x that are all zero but for a one."""
    for n, k, group_size in SHAPES:
        w = weight(kind, n, k, group_size)
        for dtype in FLOATS:
            same_tensor(linear(ops, w, torch.eye(k, dtype=dtype)), rounded(w, dtype).t() + 0.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_premul_perm_strides_and_rank(ops: Any, dtype: torch.dtype) -> None:
    w = weight(KINDS[4], 24, 64, 16)
    x, plain = floats((5, 64), dtype), awkward((5, 64), dtype)
    premul = torch.exp(floats((64,), seed="premul"))
    perm = torch.from_numpy(rng("perm").permutation(64))
    same = linear(ops, w, plain)
    for _, view in strided(plain):
        same_tensor(linear(ops, w, view), same)
    same_tensor(linear(ops, w, plain.view(5, 1, 64)), same.view(5, 1, 24))
    for by, at in ((premul, None), (None, perm), (premul, perm)):
        scaled = x.float() * (1 if by is None else by)
        seen = (scaled if at is None else scaled[:, at]).to(dtype)
        same_tensor(linear(ops, w, x, premul=by, perm=at), linear(ops, w, seen))
    perm[3] = 64  # no index: no one looked
    assert linear(ops, w, x, perm=perm).isnan().all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("epilogue", range(7))
def test_functions_of_the_result(ops: Any, epilogue: int) -> None:
    """Of the sums in x's type; by vectors and one by one."""
    eye = weight(Kind(ref.INT8, True, torch.float32), 24, 24, codes=np.eye(24, dtype=np.int64))
    ones = torch.ops.qkernels.pack(eye.data, torch.ones(24, 1), None, eye.kind.layout, 24, -1)
    for dtype in FLOATS:
        w = weight(KINDS[3], 24, 64, 32)
        x, bias = floats((9, 64), dtype), floats((24,), dtype, seed="bias")
        sums = linear(ops, w, x, bias)
        want = torch.ops.qkernels.linear(
            sums, ones, *[None] * 5, eye.kind.layout, 24, 24, -1, 0, epilogue
        )
        same_tensor(linear(ops, w, x, bias, epilogue), want)


@pytest.mark.usefixtures("always")
def test_no_matmul_of_rows_that_begin_on_no_line(ops: Any) -> None:
    """The kernels take these; so their bits do not depend on the number of rows."""
    for n, k in ((20, 64), (24, 60)):
        w = weight(KINDS[3], n, k, 32)
        assert name(w.kind, 10**6, torch.bfloat16, n, k) != MATMUL
        x = floats((30, k), torch.bfloat16)
        same_tensor(linear(ops, w, x)[:9], linear(ops, w, x[:9]))


def name(
    kind: Kind, rows: int, dtype: torch.dtype, n: int = 64, k: int = 64, on_hopper: bool = False
) -> str:
    code = FLOATS.index(dtype)
    return _C.cuda_kernel_name(kind.cuda_layout, 0, rows, k, n, -1, code, 132, on_hopper)


def threshold(kind: Kind, dtype: torch.dtype, on_hopper: bool = False) -> int:
    rows = range(1, 10_000)
    return next(m for m in rows if name(kind, m, dtype, on_hopper=on_hopper) == MATMUL)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(KINDS[0], HALVES[0]), (KINDS[4], HALVES[1]), (KINDS[6], HALVES[0]), (KINDS[7], FLOATS[0])],
    ids=str,
)
def test_both_sides_of_the_threshold(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    """What `explain` says is what runs: below it a row's bits do not depend on the others."""
    rows = threshold(kind, dtype, hopper(ops))
    w = weight(kind, 24, 64, 32)
    x = floats((rows, 64), dtype)
    below, above = linear(ops, w, x[1:]), linear(ops, w, x)
    same_tensor(below[:9], linear(ops, w, x[1:10]))
    check(w, x, above)
    if not torch.cuda.is_available():  # a GPU's torch has other bits
        same_tensor(above, x @ rounded(w, dtype).t())
    if dtype != torch.float32:
        assert not torch.equal(above[1:], below)  # a tie would say nothing


def test_names_on_hopper() -> None:
    """16-bit x has a kernel of its own there, for more rows than the GEMV takes."""
    for rows, want in ((8, "cuda gemv"), (9, "cuda wgmma 16x256"), (17, "cuda wgmma 32x256"),
                       (33, "cuda wgmma 64x256"), (99, "cuda wgmma 64x256")):  # fmt: skip
        assert name(KINDS[3], rows, torch.bfloat16, on_hopper=True) == want
    # Teams share out k where that gives all multiprocessors a block; for any number of rows alike.
    for n, k, outputs in ((28672, 8192, 256), (8192, 8192, 128), (4096, 4096, 64)):
        for rows, tile in ((9, 16), (64, 64)):
            found = name(KINDS[3], rows, torch.bfloat16, n, k, on_hopper=True)
            assert found == f"cuda wgmma {tile}x{outputs}"
    assert "wgmma" not in name(KINDS[3], 64, torch.float32, on_hopper=True)
    assert "wgmma" not in name(KINDS[3], 64, torch.bfloat16)


def test_float32_stays_with_the_kernels_but_for_nf4() -> None:
    for kind in KINDS:
        assert (name(kind, 10**9, torch.float32) == MATMUL) is (kind.form is ref.NF4)


def test_the_environment_sets_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, rows in (("7", 7), ("300", 300), ("", threshold(KINDS[3], HALVES[0]))):
        monkeypatch.setenv(SETTING, value)
        assert threshold(KINDS[3], HALVES[0]) == rows


def crossover(results: str, scheme: str, shape: str) -> dict[int, float]:
    """For each number of rows that was measured: what dequantize and matmul gain, in seconds."""
    found: dict[int, dict[str, float]] = {}
    for row in json.loads((RESULTS / results / "gpu.json").read_text())["rows"]:
        rows, _, rest = row["case"].partition(" rows ")
        if row["group"] == "crossover" and rest == f"{shape} {scheme}":
            found.setdefault(int(rows), {})[row["name"]] = row["seconds"]
    return {rows: times["kernel"] - times[MATMUL] for rows, times in sorted(found.items())}


@pytest.mark.parametrize("on_hopper", [False, True])
def test_the_thresholds_are_those_of_the_results(on_hopper: bool) -> None:
    """The number of rows at which both ways take as long, on lines through the measured times: the
    mean of two shapes, in eights."""
    results = "gpu-h200" if on_hopper else "gpu-h200-mma"
    for kind, scheme in ((KINDS[0], "W8A16"), (KINDS[3], "W4A16 g128"), (KINDS[6], "NF4 g64")):
        crossings = []
        for shape in ("8192x8192", "4096x4096"):
            crossings.append(crossing(crossover(results, f"{scheme} bf16", shape)))
            assert min(crossover(results, f"{scheme} bf16, gradient", shape).values()) > 0
        rows = threshold(kind, torch.bfloat16, on_hopper)
        assert rows == threshold(kind, torch.float16, on_hopper)
        mean = sum(crossings) / len(crossings)
        assert abs(rows - mean) <= 5, (scheme, crossings)


def test_the_threshold_of_float32_is_that_of_the_results() -> None:
    shapes = ("8192x8192", "4096x4096")
    for shape in shapes:
        assert max(crossover("gpu-h200", "W4A16 g128 fp32", shape).values()) < 0
    mean = sum(crossing(crossover("gpu-h200", "NF4 g64 fp32", shape)) for shape in shapes) / 2
    assert abs(threshold(KINDS[6], torch.float32) - mean) <= 5


def crossing(gains: dict[int, float]) -> float:
    """Where a gain that is known for some numbers of rows goes from below zero to above."""
    rows = list(gains)
    i = next(i for i, m in enumerate(rows) if gains[m] > 0)
    low, high = rows[i - 1], rows[i]
    return low - gains[low] * (high - low) / (gains[high] - gains[low])


# ---- linear_backward_input -----------------------------------------------------------------------


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    rounding, smallest = (2.0**-8, 0.0) if dtype == torch.bfloat16 else (2.0**-11, 2.0**-25)
    for i, (n, k, group_size) in enumerate(SHAPES):
        w = weight(kind, n, k, group_size)
        grad = floats((5 + 9 * i, n), dtype, seed=i)
        dy, exact = ref.values(grad).astype(np.float64), w.exact()
        unit = rounding + (n + 9) * 2.0**-23
        bound = unit * (np.abs(dy) @ np.abs(exact)) + smallest * np.abs(dy).sum(1, keepdims=True)
        sizes = (w.kind.cuda_layout, w.k, w.n, w.group_size)
        got = ops.linear_backward_input(grad, pack(ops, w), *sizes)
        within(got, dy @ exact, bound)
        eye = torch.eye(n, dtype=dtype)
        same_tensor(ops.linear_backward_input(eye, pack(ops, w), *sizes), rounded(w, dtype) + 0.0)
