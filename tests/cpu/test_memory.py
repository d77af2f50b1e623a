"""Kernels touch no memory but that of their tensors, whatever the sizes and alignments."""

import signal
from pathlib import Path

import pytest

from helpers.process import run_python

PAST = """
import ctypes, torch
from helpers.guard import guarded
at_end = {at_end}
t = guarded(torch.ones(7, dtype=torch.int8), at_end)
assert t.sum() == 7
ctypes.string_at(t.data_ptr() + (7 if at_end else -1), 1)
"""


@pytest.mark.parametrize("at_end", [True, False])
def test_the_guard_bites(at_end: bool) -> None:
    done = run_python("-c", PAST.format(at_end=at_end), check=False)
    assert done.returncode == -signal.SIGSEGV


def test_nothing_outside_of_the_tensors_is_touched() -> None:
    """Tensors that end at a page's end are also as badly aligned as their type allows."""
    printed = run_python(Path(__file__).with_name("guarded.py")).stdout
    assert int(printed) > 1000
