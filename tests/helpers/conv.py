"""Convolutions: their geometry, the call of the op, and what it must give, by torch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import reference as ref
from helpers.data import Kind, rng, tensors

ops = torch.ops.qkernels


@dataclass(frozen=True)
class Geometry:
    """A convolution but for its values."""

    size: tuple[int, ...]  # of x
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    group_channels: int = 4
    group_outputs: int = 8
    batch: int = 2
    transposed: bool = False

    @property
    def channels(self) -> int:
        return self.groups * self.group_channels

    @property
    def outputs(self) -> int:
        return self.groups * self.group_outputs

    @property
    def taps(self) -> int:
        return int(np.prod(self.kernel))

    @property
    def out(self) -> tuple[int, ...]:
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        pads = [b + a for b, a in zip(self.before, self.after, strict=True)]
        if self.transposed:
            return tuple(
                (n - 1) * s - p + r + 1
                for n, s, p, r in zip(self.size, self.stride, pads, reach, strict=True)
            )
        return tuple(
            (n + p - r - 1) // s + 1
            for n, s, p, r in zip(self.size, self.stride, pads, reach, strict=True)
        )

    @property
    def possible(self) -> bool:
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        fits = all(
            n + b + a > r
            for n, b, a, r in zip(self.size, self.before, self.after, reach, strict=True)
        )
        return (self.transposed or fits) and min(self.out) > 0 and np.prod(self.out) < 4000

    def input(self, dtype: torch.dtype = torch.float32, seed: Any = 0) -> Tensor:
        random = rng("conv", str(self), seed)
        x = random.standard_normal((self.batch, self.channels, *self.size))
        # Images of different ranges, off centre.
        x = x * 2.0 ** random.integers(-3, 4, (self.batch, *[1] * (x.ndim - 1))) + 0.3
        return torch.from_numpy(x).to(dtype)

    def sums(self, x: Tensor, w: np.ndarray) -> np.ndarray:
        """`products` as an array."""
        return self.products(x, w).numpy()

    def products(self, x: Tensor, w: np.ndarray) -> Tensor:
        """In float64, exact for codes; x [batch, channels, …], w [outputs, columns]."""
        dims = len(self.size)
        weight = torch.from_numpy(w).double().view(self.outputs, *self.kernel, self.group_channels)
        weight = weight.movedim(-1, 1)
        options = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        amounts = [p for i in reversed(range(dims)) for p in (self.before[i], self.after[i])]
        if not self.transposed:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            return convolve(F.pad(x.double(), amounts), weight, **options)
        weight = weight.flip(tuple(range(2, dims + 2)))
        weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return F.pad(spread(x.double(), weight, **options), [-p for p in amounts])


@dataclass(frozen=True)
class ConvWeight:
    """A weight as numbers and packed."""

    geometry: Geometry
    kind: Kind
    group_size: int
    codes: np.ndarray  # int64 [outputs, columns], as stored
    scale: np.ndarray
    zero: np.ndarray
    stored: tuple[Tensor, Tensor, Tensor | None]
    packed: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        g = self.geometry
        return g.taps, g.group_channels, g.groups, self.group_size

    def exact(self) -> np.ndarray:
        columns = self.codes.shape[1]
        scale, zero = (ref.spread(p, columns, self.group_size) for p in (self.scale, self.zero))
        if self.kind.form is ref.NF4:
            return ref.NF4_LEVELS[self.codes].astype(np.float64) * scale
        return self.kind.form.values(self.codes, zero) * scale

    def conv(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        activation: int = 0,
        epilogue: int = 0,
        residual: Tensor | None = None,
        x_range: tuple[Any, Any] = (None, None),
        residual_range: tuple[Any, Any] = (None, None),
        y_range: tuple[Any, Any] = (None, None),
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
    ) -> Tensor:
        return (ops.conv_differentiable if differentiable else ops.conv)(
            *self.arguments(
                x, bias, residual, *x_range, *residual_range, *y_range, activation, epilogue
            ),
            dtype,
        )

    def arguments(
        self, x: Tensor, bias: Any = None, residual: Any = None, x_scale: Any = None,
        x_zero: Any = None, r_scale: Any = None, r_zero: Any = None, y_scale: Any = None,
        y_zero: Any = None, activation: int = 0, epilogue: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        g = self.geometry
        ranges = (x_scale, x_zero, r_scale, r_zero, y_scale, y_zero)
        given = [None if value is None else scalar(value, i) for i, value in enumerate(ranges)]
        padding = [*g.before] if g.before == g.after else [*g.before, *g.after]
        lists = ([*g.kernel], [*g.stride], padding, [*g.dilation])
        sizes = (self.kind.layout, g.outputs, g.groups, self.group_size)
        return (
            x, self.packed, bias, residual, *given, *sizes, *lists, g.transposed, activation,
            epilogue,
        )  # fmt: skip

    def integer(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: int,
        x_range: tuple[Any, Any] = (None, None),
    ) -> np.ndarray:
        """The integer path before residual and activation function, float32."""
        g = self.geometry
        if x.dtype == torch.int8:
            codes = ref.values(x.float()).astype(np.int64)
            scale = np.full(g.batch, x_range[0], np.float32)
            zero = np.full(g.batch, x_range[1] or 0)
        else:
            a = ref.quantize_activations(
                ref.values(x).reshape(g.batch, -1), activation == 1, x_range[0], x_range[1] or 0
            )
            codes, scale = a.codes.reshape(x.shape), a.scale[:, 0]
            zero = np.broadcast_to(a.zero, (g.batch, 1))[:, 0]
        shape = (-1, *[1] * (x.dim() - 1))
        sums = g.sums(torch.from_numpy(codes - zero.reshape(shape)), self.codes)
        assert np.array_equal(sums, np.rint(sums))
        channel = (1, -1, *[1] * (x.dim() - 2))
        scaled = sums.astype(np.float32) * self.scale.reshape(channel)
        given = np.float32(0) if bias is None else ref.values(bias).reshape(channel)
        return ref.fma(scale.reshape(shape), scaled, given)


def scalar(value: Any, index: int) -> Tensor:
    """A scale or, at odd places, a zero point."""
    return torch.tensor(value, dtype=torch.int8 if index % 2 else torch.float32)


def conv_weight(geometry: Geometry, kind: Kind, group_size: int = -1, seed: Any = 0) -> ConvWeight:
    """Codes over the whole range that storage has, -128 included; scales of many sizes."""
    g = geometry
    random = rng("conv weight", str(g), str(kind), group_size, seed)
    low, high = (-128, 127) if kind.form is ref.INT8 else (0, 15)
    columns = g.taps * g.group_channels
    codes = random.integers(low, high + 1, (g.outputs, columns))
    groups = len(ref.group_edges(columns, group_size))
    scale = np.float32(2.0) ** random.uniform(-9, -3, (g.outputs, groups)).astype(np.float32)
    scale = ref.round_to(scale, kind.scale_dtype)
    zero = np.full((g.outputs, groups), kind.form.middle)
    if not kind.symmetric:
        steps = kind.form.steps
        zero = random.integers(low * steps, high * steps + 1, (g.outputs, groups))
    stored = tensors(codes, scale, zero, kind)
    sizes = (g.taps, g.group_channels, g.groups, group_size)
    packed = ops.pack_conv(*stored, kind.layout, *sizes)
    return ConvWeight(g, kind, group_size, codes, scale, zero, stored, packed)
