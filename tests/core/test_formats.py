"""The compiled format table and layout ids, against the contract restated in tests/helpers."""

import numpy as np
import pytest
import torch

from helpers import layout as packed_layout
from helpers import reference as ref
from helpers.data import FLOATS, KINDS, Kind
from qkernels import _C

ops = torch.ops.qkernels


def test_table() -> None:
    rows = _C.formats()
    assert [row["name"] for row in rows] == [form.name for form in ref.FORMATS]
    for row, form in zip(rows, ref.FORMATS, strict=True):
        assert (row["code"], row["bits"], row["symmetric_range"]) == (
            form.code,
            form.bits,
            form.range,
        )
        stored = (row["symmetric_min"] + form.offset, row["symmetric_max"] + form.offset)
        assert stored == form.symmetric
        assert row["has_zero_point"] == (form.asymmetric is not None)
        if form.asymmetric:
            assert (row["asymmetric_min"], row["asymmetric_max"]) == form.asymmetric
        assert row["packs"] == (form is not ref.INT16)
        assert row["storage"] == np.dtype(ref.storage_dtype(form)).name
        assert getattr(torch, row["storage"]) == ops.quantize(torch.ones(2), row["code"])[0].dtype


def test_layout_ids_say_everything() -> None:
    seen = set()
    for form in ref.FORMATS[:3]:
        for code, dtype in enumerate(FLOATS):
            for symmetric in (True, False) if form.asymmetric else (True,):
                for family, device in ((1, "cpu"), (2, "cuda")):
                    layout = _C.layout(form.code, code, symmetric, device)
                    assert layout == packed_layout.layout_id(form, code, symmetric, family)
                    assert _C.describe_layout(layout) == {
                        "format": form.name,
                        "scale_dtype": str(dtype).removeprefix("torch."),
                        "symmetric": symmetric,
                        "device": device,
                        "version": 2 if form is ref.INT4 and not symmetric else 1,
                    }
                    seen.add(layout)
                assert _C.layout(form.code, code, symmetric) in seen  # the CPU, unless told
    assert len(seen) == 30


@pytest.mark.parametrize(
    "wrong", [(3, 0, True), (2, 0, False), (4, 0, True), (-1, 0, True), (0, 3, True), (0, -1, True)]
)
def test_layouts_that_do_not_exist(wrong: tuple[int, int, bool]) -> None:
    with pytest.raises(ValueError, match="no packed layout holds format .* formats are 0"):
        _C.layout(*wrong)


def test_devices_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'mps'"):
        _C.layout(0, 0, True, "mps")
    with pytest.raises(ValueError, match="is packed for a GPU; cuda_kernel_name knows its kernels"):
        _C.kernel_name(_C.layout(0, 0, True, "cuda"), 1, 1)


@pytest.mark.parametrize("layout", [-1, 2**62, 3 << 20 | 0x101, 0x10101 | 2 << 20])
def test_ids_that_are_no_layout(layout: int) -> None:
    for ask in (
        lambda: _C.describe_layout(layout),
        lambda: _C.block_bytes(layout, 64, -1),
        lambda: _C.kernel_name(layout, 0, 1),
    ):
        with pytest.raises(ValueError, match=f"layout {layout} is not a packed layout"):
            ask()


@pytest.mark.parametrize("sizes", [(-1, -1), (64, 0), (64, -2), (2**41, -1)])
def test_sizes_that_do_not_exist(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="in_features must be from 0 to .* group_size -1 or >= 1"):
        _C.block_bytes(KINDS[0].layout, *sizes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sizes_of_cuda_blocks(kind: Kind) -> None:
    """Chunks of 32 k, at 4 bits two to a unit; then scales, zero points and sums on lines."""
    up = packed_layout.up
    layout = _C.layout(kind.form.code, FLOATS.index(kind.scale_dtype), kind.symmetric, "cuda")
    for k in (0, 1, 31, 32, 33, 64, 96, 1000):
        for group_size in (-1, 1, 7, 32, 64, 100, 5000):
            edges = ref.group_edges(k, group_size)
            padded = sum(up(end - begin, 32) for begin, end in edges)
            codes = up(padded, 256 // kind.form.bits) * 2 * kind.form.bits
            scales = up(len(edges) * 16 * kind.scale_dtype.itemsize, 64)
            zeros = 0 if kind.symmetric else up(len(edges) * 16, 64)
            sums = 0 if kind.form is ref.NF4 else 64
            want = codes + scales + zeros + sums
            assert _C.block_bytes(layout, k, group_size) == want, (k, group_size)
            data = torch.empty(17, (k + 1) // 2 if kind.form.bits == 4 else k, device="meta")
            arguments = (data, data, None, layout, k, group_size)
            assert ops.pack(*arguments).shape == (2, want)


def test_packed_sizes_are_little_more_than_the_codes() -> None:
    """Memory is the point: what is stored beside codes and scales stays below the line padding."""
    for kind in KINDS:
        for k, group_size in ((1024, -1), (4096, 128), (4096, 32)):
            groups = k // group_size if group_size > 0 else 1
            codes = 16 * k * kind.form.bits // 8
            scales = 16 * groups * (4 if kind.scale_dtype == torch.float32 else 2)
            zeros = 0 if kind.symmetric else 16 * groups
            sums = 16 * groups * 4 if kind.form is ref.INT8 else 0
            extra = _C.block_bytes(kind.layout, k, group_size) - codes - scales - zeros - sums
            assert 0 <= extra <= 4 * 64


def test_kernel_names_say_what_runs() -> None:
    for kind in KINDS:
        for activation, part in ((0, "a16"), (1, "a8"), (2, "a8")):
            if kind.form is ref.NF4 and activation:
                continue
            for rows in (1, 8, 1000):
                name = _C.kernel_name(kind.layout, activation, rows)
                weights = "nf4" if kind.form is ref.NF4 else f"w{kind.form.bits}"
                assert name.startswith(f"matmul_{weights}{part}_")
                assert name.split("_")[2] == _C.isa().removesuffix("bf16")
                of_bf16 = _C.kernel_name(kind.layout, activation, rows, 1)
                isa = _C.isa() if activation == 0 else _C.isa().removesuffix("bf16")
                assert of_bf16.split("_")[:3] == [*name.split("_")[:2], isa]
