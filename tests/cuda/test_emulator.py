"""The emulator itself: what instructions compute, and which mistakes it notices."""

from typing import Any

import pytest
import torch
from torch import Tensor

POISON = -1
WORDS = torch.arange(64, dtype=torch.int32) * 0x01010101


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=str)
def test_mma(emulator: Any, dtype: torch.dtype) -> None:
    k = 32 // dtype.itemsize
    a, b = (torch.randint(-128, 128, (rows, k)).to(dtype) for rows in (16, 8))
    integers = dtype == torch.int8
    d = torch.zeros(16, 8, dtype=torch.int32 if integers else torch.float32)
    emulator.probe_mma(a, b, d, [torch.int8, torch.bfloat16, torch.float16].index(dtype))
    # Small integers: every sum is exact in float32 too.
    assert torch.equal(d.double(), a.double() @ b.double().t() + 1)


def test_ldmatrix_loads_the_fragment_of_a(emulator: Any) -> None:
    a = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    got = torch.zeros(32, 4, dtype=torch.int32)
    emulator.probe_ldmatrix(a, got)
    words = a.view(torch.int32)  # [row, quarter of a half]
    for lane in range(32):
        g, t = divmod(lane, 4)
        want = [words[g, t], words[g + 8, t], words[g, 4 + t], words[g + 8, 4 + t]]
        assert got[lane].tolist() == [int(word) for word in want]


def test_stmatrix_stores_fragments_transposed(emulator: Any) -> None:
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    # Lane 4 g + t holds elements 2t and 2t + 1 of row g, of each matrix.
    fragments = matrices.view(4, 32, 2).transpose(0, 1).contiguous().view(torch.int32)
    got = torch.zeros(32, 4, dtype=torch.int32)
    emulator.probe_stmatrix(fragments, got)
    assert torch.equal(got.view(torch.int16).view(4, 8, 8), matrices.transpose(1, 2))


def copied(emulator: Any, valid: int, wait: bool, barrier: bool, distance: int) -> Tensor:
    """What two blocks of 64 threads read of neighbours, each of which has copied a word."""
    to = torch.zeros(2, 64, dtype=torch.int32)
    emulator.probe_copy(WORDS, to, valid, wait, barrier, distance)
    return to


@pytest.mark.parametrize("valid", [0, 1, 3, 4])
def test_copies_land_and_are_filled_up_with_zeros(emulator: Any, valid: int) -> None:
    got = copied(emulator, valid, wait=True, barrier=True, distance=1)
    assert torch.equal(got, (WORDS.roll(-1) & (1 << 8 * valid) - 1).expand(2, -1))


def test_a_copy_that_nobody_waited_for_is_poison(emulator: Any) -> None:
    assert copied(emulator, 4, wait=False, barrier=False, distance=0).eq(POISON).all()
    assert torch.equal(copied(emulator, 4, wait=True, barrier=False, distance=0)[0], WORDS)


@pytest.mark.parametrize(("wait", "barrier"), [(False, True), (True, False)])
def test_a_copy_of_another_thread_wants_a_wait_and_a_barrier(
    emulator: Any, wait: bool, barrier: bool
) -> None:
    with pytest.raises(RuntimeError, match=r"a race: .* of shared memory, which thread"):
        copied(emulator, 4, wait, barrier, distance=1)


def test_a_cluster_shares_what_it_copies(emulator: Any) -> None:
    words = torch.arange(8, dtype=torch.int32)
    to = torch.zeros(2, 8, dtype=torch.int32)
    emulator.probe_cluster(words, to, True)
    assert to.tolist() == [words.tolist()] * 2
    with pytest.raises(RuntimeError, match="a copy of many bytes: a race: writes byte"):
        emulator.probe_cluster(words, to, False)
    # It was not there yet.
    assert to[0].tolist() == [POISON] * 8


def test_blocks_of_a_cluster_store_to_each_other(emulator: Any) -> None:
    to = torch.zeros(2, dtype=torch.int32)
    emulator.probe_store_async(to, True)
    assert to.tolist() == [1, 0]
    with pytest.raises(RuntimeError, match="a copy of many bytes: a race: writes byte"):
        emulator.probe_store_async(to, False)
    assert to.tolist() == [POISON, POISON]


BETWEEN = ["nothing", "warp", "some", "block", "arrival", "distant_arrival", "cluster"]
ALL, SEEN = set(BETWEEN), set(BETWEEN[1:5])


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(
    ("accesses", "allowed"),
    [
        *[("wr", SEEN), ("wa", SEEN), ("ar", SEEN)],
        # Who is told no more than that a thread has come this far may overwrite what it read.
        *[("rw", ALL - {"nothing"}), ("rc", ALL - {"nothing"}), ("aw", ALL - {"nothing"})],
        *[("rr", ALL), ("aa", ALL), ("bb", ALL), ("bw", ALL - {"nothing"})],
    ],
)
def test_races(emulator: Any, accesses: str, allowed: set[str], between: str) -> None:
    source = torch.zeros(16, dtype=torch.uint8)

    def run() -> None:
        emulator.probe_accesses(source, accesses, BETWEEN.index(between))

    if between in allowed:
        return run()
    with pytest.raises(RuntimeError, match=r"a race: .* which thread \(0, 0, 0\) .* no barrier"):
        run()


def test_a_matrix_that_was_stored_wants_a_fence(emulator: Any) -> None:
    emulator.probe_stored_matrix(True, True)
    with pytest.raises(RuntimeError, match="warpgroup_mma: a race: .* no shared_fence"):
        emulator.probe_stored_matrix(False, True)
    with pytest.raises(RuntimeError, match="a race: .* no barrier"):
        emulator.probe_stored_matrix(True, False)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (
            "unfinished copy",
            "the thread ends with 1 copies in flight, in thread (0, 0, 0) of block",
        ),
        ("write past the end", "block (0, 0, 0) wrote to byte 64 of its 64 bytes of shared memory"),
        ("write before the start", "wrote to byte -1 of its 64 bytes of shared memory"),
        ("store across the end", "a load or store at byte 56 of 60 bytes of shared memory"),
        ("load past the end", "load_shared_128 at byte 64 of 64 bytes of shared memory"),
        ("unaligned load", "load_shared_128 of 16 bytes at an address that is not a multiple"),
        ("half a barrier", "24 threads wait in __syncthreads, 40 have returned"),
        ("two instructions", "this thread is in warp_max but others of its warp are in shuffle"),
        ("unfinished product", "the thread ends with 1 products under way, in thread"),
        ("no barrier", "barrier_wait of a barrier that is not set up"),
        ("half a warp", "a block has whole warps and 32 to 1024 threads, got (48, 1, 1)"),
        ("too much memory", "some GPUs have 99 KiB of shared memory, got 102400 bytes"),
    ],
)
def test_mistakes_are_said(emulator: Any, mistake: str, sentence: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        emulator.probe_mistake(mistake)
    assert sentence in str(raised.value)
    # And the next kernel runs.
    test_mma(emulator, torch.int8)
