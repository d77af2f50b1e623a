"""Seeded inputs: float tensors with awkward values and strides, and packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers import reference as ref
from qkernels import _C

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# One past a tile and one short of it, primes, nothing at all.
ROWS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 47, 48, 49, 70)
FEATURES_OUT = (0, 1, 15, 16, 17, 47, 48, 49, 100)
FEATURES_IN = (0, 1, 3, 7, 8, 9, 31, 127, 1000)
GROUPS = (-1, 32, 7, 128, 1, 5000, 16)


def rng(*seed: Any) -> np.random.Generator:
    """The same numbers in every process for the same arguments."""
    return np.random.default_rng([ord(c) for c in repr(seed)])


def floats(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: Any = 0) -> Tensor:
    x = rng("floats", shape, seed).standard_normal(shape, np.float32)
    return torch.from_numpy(x).to(dtype)


def awkward(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: Any = 0) -> Tensor:
    """Rows of every magnitude, and among them: all zero, subnormal, one outlier, constant."""
    x = floats(shape, seed=seed)
    if x.numel() == 0:
        return x.to(dtype)
    x *= 10.0 ** torch.arange(-4, 4).repeat(shape[0])[: shape[0], None]
    x[3::11] = 0
    x[4::11] *= 1e-42
    x[5::11, 0] = 3e4
    x[6::11] = -1.5
    return x.to(dtype)


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x [M, K] under other strides, offsets and the negation bit; the values are the same."""
    yield "transposed", x.t().contiguous().t()
    yield "every other", torch.stack([x, x + 1], -1).reshape(x.shape[0], -1)[:, ::2]
    wide = torch.full((x.shape[0] + 3, x.shape[1] + 5), 77, dtype=x.dtype)
    wide[2:-1, 3:-2] = x
    yield "inner window", wide[2:-1, 3:-2]
    if x.is_floating_point():
        yield "negation bit", torch._neg_view(-x)


@dataclass(frozen=True)
class Kind:
    """What a packed weight holds, but for its shape."""

    form: ref.Format
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def layout(self) -> int:
        return _C.layout(self.form.code, FLOATS.index(self.scale_dtype), self.symmetric)

    @property
    def cuda_layout(self) -> int:
        scale = FLOATS.index(self.scale_dtype)
        return _C.layout(self.form.code, scale, self.symmetric, "cuda")

    def __str__(self) -> str:
        zero = "" if self.symmetric else "-asymmetric"
        return f"{self.form.name}{zero}-{str(self.scale_dtype).removeprefix('torch.')}"


INTEGER_KINDS = (
    Kind(ref.INT8, True, torch.float32),
    Kind(ref.INT8, False, torch.float32),
    Kind(ref.INT8, True, torch.bfloat16),
    Kind(ref.INT4, True, torch.bfloat16),
    Kind(ref.INT4, False, torch.bfloat16),
    Kind(ref.INT4, False, torch.float16),
)
KINDS = (*INTEGER_KINDS, Kind(ref.NF4, True, torch.bfloat16), Kind(ref.NF4, True, torch.float32))


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] as numbers, in storage and packed."""

    kind: Kind
    layout: int
    group_size: int
    codes: np.ndarray  # int64 [N, K], as stored
    scale: np.ndarray  # float32 [N, G]
    zero: np.ndarray  # int64 [N, G]
    data: Tensor = field(repr=False)
    scale_tensor: Tensor = field(repr=False)
    zero_tensor: Tensor | None = field(repr=False)
    packed: Tensor = field(repr=False)

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The integers that every op on a packed weight takes."""
        return self.layout, self.k, self.n, self.group_size

    def exact(self) -> np.ndarray:
        """The weight in float64: its products with the scale are exact there."""
        scale, zero = (
            ref.spread(part, self.k, self.group_size) for part in (self.scale, self.zero)
        )
        if self.kind.form is ref.NF4:
            return ref.NF4_LEVELS[self.codes].astype(np.float64) * scale
        return self.kind.form.values(self.codes, zero) * scale

    def from_middle(self) -> np.ndarray:
        """Magnitudes that a kernel adds up which takes int4's codes less 8 and adds what the zero
        points' distance from 8 makes of x; in float64.
        """
        scale, zero = (
            ref.spread(part, self.k, self.group_size) for part in (self.scale, self.zero)
        )
        form = self.kind.form
        distance = np.abs(form.middle - zero) / form.steps
        return (np.abs(form.values(self.codes, np.asarray(form.middle))) + distance) * scale

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        activation: int = 0,
        epilogue: int = 0,
        x_scale: Tensor | None = None,
        x_zero: Tensor | None = None,
        premul: Tensor | None = None,
        perm: Tensor | None = None,
        differentiable: bool = False,
    ) -> Tensor:
        ops = torch.ops.qkernels
        op = ops.linear_differentiable if differentiable else ops.linear
        extra = (bias, x_scale, x_zero, premul, perm)
        return op(x, self.packed, *extra, *self.sizes, activation, epilogue)

    def integer(
        self, x: Tensor, bias: Tensor | None, activation: int, x_scale: float | None = None,
        x_zero: int = 0, premul: Tensor | None = None, perm: Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        """What an integer path gives before the activation function, float32 [M, N]."""
        a = ref.values(x)
        with np.errstate(all="ignore"):
            a = a if premul is None else a * ref.values(premul)
        a = a if perm is None else a[:, perm.numpy()]
        quantized = ref.quantize_activations(a, activation == 1, x_scale, x_zero)
        given = None if bias is None else ref.values(bias)
        weight = (self.codes, self.scale, self.zero, self.group_size)
        return ref.linear_integer(quantized, *weight, given, activation == 2, self.kind.form)


def tensors(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, kind: Kind
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point as the ops take them."""
    data = torch.from_numpy(ref.store(codes, kind.form))
    scale_tensor = torch.from_numpy(scale).to(kind.scale_dtype)
    stored = torch.from_numpy(zero.astype(ref.storage_dtype(kind.form)))
    return data, scale_tensor, None if kind.symmetric else stored


def weight(
    kind: Kind, n: int, k: int, group_size: int = -1, seed: Any = 0, codes: np.ndarray | None = None
) -> Weight:
    """Codes over the whole range that storage has, -128 included; scales of many sizes."""
    random = rng("weight", str(kind), n, k, group_size, seed)
    low, high = (-128, 127) if kind.form is ref.INT8 else (0, 15)
    drawn = random.integers(low, high + 1, (n, k))
    codes = drawn if codes is None else codes
    groups = len(ref.group_edges(k, group_size))
    scale = np.float32(2.0) ** random.uniform(-9, -3, (n, groups)).astype(np.float32)
    scale = ref.round_to(scale, kind.scale_dtype)
    zero = np.full((n, groups), kind.form.middle)
    if not kind.symmetric:
        steps = kind.form.steps
        zero = random.integers(low * steps, high * steps + 1, (n, groups))
    data, scale_tensor, zero_tensor = tensors(codes, scale, zero, kind)
    packed = torch.ops.qkernels.pack(data, scale_tensor, zero_tensor, kind.layout, k, group_size)
    stored = (data, scale_tensor, zero_tensor, packed)
    return Weight(kind, kind.layout, group_size, codes, scale, zero, *stored)
