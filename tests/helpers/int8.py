"""What the ops on int8 codes must give, in numpy, written from docs/NUMERICS.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.data import rng

ops = torch.ops.qkernels

F32, F64 = np.float32, np.float64
ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}

# Scales and zero points: the ends of the range, ties.
RANGES = [(0.02, 0), (0.5, -128), (1.0, 127), (3e-5, 17), (0.25, None)]
SCALES = st.floats(2.0**-20, 2.0**20, width=32)
ZEROS = st.none() | st.integers(-128, 127)
# One past a vector of each ISA and one short of it, primes, one, none.
CHANNELS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 127, 128, 129, 260)


def codes(shape: tuple[int, ...], seed: Any = 0) -> Tensor:
    return torch.from_numpy(rng("codes", shape, seed).integers(-128, 128, shape, "int8"))


def orders(x: Tensor) -> list[Tensor]:
    """x contiguous and, where there is such a thing, channels_last."""
    return [x] if x.dim() not in ORDERS else [x, x.contiguous(memory_format=ORDERS[x.dim()])]


def scale_of(value: float) -> Tensor:
    return torch.tensor(value)


def zero_of(value: int | None) -> Tensor | None:
    return None if value is None else torch.tensor([value], dtype=torch.int8)


@dataclass(frozen=True)
class Windows:
    """A pooling but for its values."""

    size: tuple[int, ...]  # of x
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil: bool = False

    @property
    def out(self) -> tuple[int, ...]:
        """Places where a window may begin, from the border in front on."""
        found = []
        for n, k, s, p, d in zip(
            self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            extent = d * (k - 1) + 1
            starts = range(-p, n + p, s)
            whole = [i for i in starts if i + extent <= n + p]
            # One more that reaches past the border behind, if it does not begin there.
            more = self.ceil and [i for i in starts if i + extent - s < n + p and i < n]
            found.append(len(more or whole))
        return tuple(found)

    @property
    def possible(self) -> bool:
        halves = all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))
        return halves and min(self.size) > 0 and min(self.out) > 0

    def elements(self, dim: int, at: int) -> tuple[list[int], int]:
        """Elements of x in window `at` of a dimension, and its extent with the borders."""
        corner = at * self.stride[dim] - self.padding[dim]
        taps = [corner + t * self.dilation[dim] for t in range(self.kernel[dim])]
        behind = self.size[dim] + self.padding[dim]
        inside = [i for i in taps if 0 <= i < self.size[dim]]
        return inside, sum(i < behind for i in taps)


@dataclass(frozen=True)
class Adaptive:
    size: tuple[int, ...]
    out: tuple[int, ...]

    def elements(self, dim: int, at: int) -> tuple[list[int], int]:
        n, m = self.size[dim], self.out[dim]
        inside = list(range(at * n // m, -(-(at + 1) * n // m)))
        return inside, len(inside)


def each_window(
    x: np.ndarray, w: Windows | Adaptive
) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
    """Place in y, the part of x as [batch, channels, elements], and the extent with borders."""
    for place in itertools.product(*map(range, w.out)):
        parts = [w.elements(dim, at) for dim, at in enumerate(place)]
        part = x
        for dim, (inside, _) in enumerate(parts):
            part = np.take(part, inside, axis=dim + 2)
        count = int(np.prod([len(inside) for inside, _ in parts]))
        size = int(np.prod([size for _, size in parts]))
        yield place, part.reshape(*x.shape[:2], count), size


def max_pool(x: Tensor, w: Windows) -> np.ndarray:
    y = np.full((*x.shape[:2], *w.out), -128, np.int64)
    for place, part, _ in each_window(x.numpy(), w):
        y[(..., *place)] = part.max(axis=-1, initial=-128)
    return y


@dataclass(frozen=True)
class Means:
    """Means before they are rounded: exact sums, and what divides each."""

    sums: np.ndarray  # int64
    divisors: np.ndarray

    def values(self, x_scale: float, y_scale: float | None = None) -> np.ndarray:
        """Float results or, over y_scale, what codes are rounded from."""
        ratio = F64(F32(x_scale)) / F64(F32(1 if y_scale is None else y_scale))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return self.sums.astype(F32) * (ratio / self.divisors).astype(F32)

    def codes(self, x_scale: float, y_scale: float, y_zero: int) -> np.ndarray:
        return to_codes(self.values(x_scale, y_scale), y_zero)


def means(
    x: Tensor, w: Windows | Adaptive, zero: int, padding: bool = True, divisor: int | None = None
) -> Means:
    shape = (*x.shape[:2], *w.out)
    sums, divisors = np.zeros(shape, np.int64), np.ones(shape, np.int64)
    for place, part, size in each_window(x.numpy().astype(np.int64) - zero, w):
        sums[(..., *place)] = part.sum(axis=-1)
        divisors[(..., *place)] = divisor or (size if padding else part.shape[-1])
    return Means(sums, divisors)


def to_codes(quotients: np.ndarray, zero: int) -> np.ndarray:
    """NaN becomes the zero point, the rest is rounded half to even and then saturates."""
    finite = np.where(np.isnan(quotients), 0, quotients)
    return np.clip(np.rint(np.clip(finite, -512, 512)) + zero, -128, 127).astype(np.int64)


def real(x: Tensor, scale: float, zero: int | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (x.numpy().astype(F32) - F32(zero or 0)) * F32(scale)


def quantized(y: np.ndarray, scale: float, zero: int | None) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return to_codes(y * (F32(1) / F32(scale)), zero or 0)


# ---- Calls ---------------------------------------------------------------------------------------


def plane(size: tuple[int, ...], kernel: int, stride: int, padding: int = 0, dilation: int = 1,
          ceil: bool = False) -> Windows:  # fmt: skip
    every = [(value,) * len(size) for value in (kernel, stride, padding, dilation)]
    return Windows(size, *every, ceil)


def pool(x: Tensor, w: Windows) -> Tensor:
    return ops.max_pool(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil)


def mean(
    x: Tensor, w: Windows, x_range: Any, y_range: Any = None, *, padding: bool = True,
    divisor: int | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    ranges = [scale_of(x_range[0]), zero_of(x_range[1]), None, None]
    if y_range is not None:
        ranges[2:] = scale_of(y_range[0]), zero_of(y_range[1])
    return ops.avg_pool(x, *ranges, w.kernel, w.stride, w.padding, w.ceil, padding, divisor, dtype)
