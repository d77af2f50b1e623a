"""Tensors between two pages that may not be touched: reading past one kills the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
NO_ACCESS = 0


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """A dense copy of t that ends right before a forbidden page, or begins right after one."""
    if t.numel() == 0:
        return t
    size = -(-t.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + PAGE + size):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = PAGE + (size - t.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    # channels_last stays channels_last.
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    strides = t.stride() if reach + 1 == t.numel() else torch.empty(t.shape).stride()
    return copy.as_strided(t.shape, strides).copy_(t.detach())
