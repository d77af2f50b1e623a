"""pack and unpack: the bytes are those that the layout describes, and give everything back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import layout as packed_layout
from helpers.check import same_tensor
from helpers.data import FEATURES_IN, FEATURES_OUT, GROUPS, KINDS, Kind, Weight, strided, weight
from qkernels import _C

ops = torch.ops.qkernels


def expected(w: Weight) -> torch.Tensor:
    stored = w.scale_tensor
    scale_bytes = stored.flatten().view(torch.uint8).reshape(*stored.shape, stored.element_size())
    zero = None if w.kind.symmetric else w.zero
    data = w.data.numpy()
    return torch.from_numpy(
        packed_layout.pack(data, w.scale, scale_bytes.numpy(), zero, w.kind.form, w.k, w.group_size)
    )


def unpacks(w: Weight) -> None:
    data, scale, zero = ops.unpack(w.packed, *w.sizes)
    same_tensor(data, w.data)
    same_tensor(scale, w.scale_tensor)
    if w.kind.symmetric:
        assert zero.shape == (0,)
        assert zero.dtype == w.data.dtype
    else:
        same_tensor(zero, w.zero_tensor)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bytes_and_inverse(kind: Kind) -> None:
    for i, n in enumerate(FEATURES_OUT):
        for j, k in enumerate(FEATURES_IN):
            w = weight(kind, n, k, GROUPS[(i + j) % len(GROUPS)])
            assert w.packed.shape == (
                (n + 15) // 16,
                _C.block_bytes(w.layout, k, w.group_size),
            )
            unpacks(w)
            if n * k <= 49 * 127:  # the reference goes byte by byte
                assert torch.equal(w.packed, expected(w))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_a_packed_weight_are_weights(kind: Kind) -> None:
    """A slice of blocks is the packed form of a slice of outputs: what sharding counts on."""
    whole = weight(kind, 80, 33, 16)
    zero = None if whole.zero_tensor is None else whole.zero_tensor[16:64]
    part = ops.pack(whole.data[16:64], whole.scale_tensor[16:64], zero, whole.layout, whole.k, 16)
    assert torch.equal(part, whole.packed[1:4])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_strides(kind: Kind) -> None:
    w = weight(kind, 21, 30, 6)
    for _, data in strided(w.data):
        for _, scale in strided(w.scale_tensor):
            got = ops.pack(data, scale, w.zero_tensor, w.layout, w.k, 6)
            assert torch.equal(got, w.packed)
    for name, packed in strided(w.packed):
        assert torch.equal(packed, w.packed), name
        same_tensor(ops.unpack(packed, *w.sizes)[0], w.data)


def test_nothing_is_lost_from_odd_scales() -> None:
    """NaN with its payload, infinity, zero, subnormals: bytes are bytes."""
    kind = KINDS[0]
    w = weight(kind, 17, 8)
    scale = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45] * 3)[:17, None]
    scale.view(torch.int32)[0] = 0x7FC12345
    packed = ops.pack(w.data, scale, None, w.layout, 8, -1)
    back = ops.unpack(packed, *w.sizes)[1]
    assert torch.equal(back.view(torch.int32), scale.view(torch.int32))


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 40),
    k=st.integers(0, 70),
    group_size=st.just(-1) | st.integers(1, 80),
)
def test_drawn(kind: Kind, n: int, k: int, group_size: int) -> None:
    w = weight(kind, n, k, group_size)
    unpacks(w)
    assert torch.equal(w.packed, expected(w))


# A process of its own: an old one's heap may hold huge pages that earlier weights left there.
HUGE = """
import re, torch, qkernels
data = torch.zeros(8192, 8192, dtype=torch.int8)
packed = torch.ops.qkernels.pack(data, torch.ones(8192, 1), None, LAYOUT, 8192, -1)
middle = packed.data_ptr() + packed.numel() // 2
for part in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    begin, end = (int(edge, 16) for edge in part.split(" ", 1)[0].split("-"))
    if begin <= middle < end:
        print(re.search(r"^AnonHugePages: +(\\d+) kB", part, re.M)[1])
"""


@pytest.mark.parametrize("wanted", ["", "0"])
def test_large_weights_lie_in_huge_pages(wanted: str) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to all, or to none")
    code = HUGE.replace("LAYOUT", str(KINDS[0].layout))
    kilobytes = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QKERNELS_HUGE_PAGES": wanted},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert (int(kilobytes) > 32 * 1024) == (wanted != "0")
