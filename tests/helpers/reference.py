"""The numerics contract (docs/NUMERICS.md) in numpy, written from its text, not from the kernels.

Arrays are float32 where a step is rounded to float32, and int64 or float64 where it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

F32 = np.float32
FLT_MIN = F32(2.0**-126)


@dataclass(frozen=True)
class Format:
    name: str
    code: int
    bits: int
    symmetric: tuple[int, int]  # codes as stored
    asymmetric: tuple[int, int] | None
    range: float  # a symmetric scale is amax / range
    offset: int  # stored code of zero when symmetric
    steps: int  # of zero points in a code

    @property
    def middle(self) -> int:
        """The zero point of a symmetric group."""
        return self.offset * self.steps

    def values(self, codes: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """What codes of integers stand for in units of the scale: exact in float64."""
        return codes - zero / self.steps


INT8 = Format("int8", 0, 8, (-127, 127), (-128, 127), 127.0, 0, 1)
INT4 = Format("int4", 1, 4, (0, 15), (0, 15), 7.5, 8, 8)
NF4 = Format("nf4", 2, 4, (0, 15), None, 1.0, 0, 1)
INT16 = Format("int16", 3, 16, (-32767, 32767), (-32768, 32767), 32767.0, 0, 1)
FORMATS = (INT8, INT4, NF4, INT16)

# QLoRA (Dettmers et al., 2023), appendix E.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    F32,
)

# ---- Floats --------------------------------------------------------------------------------------


def values(tensor: torch.Tensor) -> np.ndarray:
    """A float tensor as float32, which holds bfloat16 and float16 exactly."""
    return tensor.detach().float().numpy()


def round_to(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 values rounded half to even to `dtype`, as float32."""
    x = np.asarray(x, F32)
    if dtype == torch.float32:
        return x
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(F32)
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), x, bits.astype(np.uint32).view(F32))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 arrays, rounded once.

    The product is exact in float64. The sum is brought to float64 by rounding to odd (Boldo and
    Melquiond, 2008), after which rounding to float32 gives the correctly rounded result.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        c = np.asarray(c, np.float64)
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)
        bits = np.atleast_1d(total).view(np.int64)
        away = (error > 0) == (total > 0)
        inexact = np.isfinite(total) & (error != 0)
        odd = np.where(inexact & (bits % 2 == 0).reshape(total.shape), np.where(away, 1, -1), 0)
        fixed = (bits + np.atleast_1d(odd)).view(np.float64).reshape(total.shape)
        return np.where(np.isfinite(total), fixed, total).astype(F32)


# ---- Scales and codes ----------------------------------------------------------------------------


def group_edges(cols: int, group_size: int) -> list[tuple[int, int]]:
    if group_size == -1:
        return [(0, cols)]
    return [(begin, min(begin + group_size, cols)) for begin in range(0, cols, group_size)]


def choose(
    x: np.ndarray, form: Format, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row of x [rows, n]."""
    with np.errstate(all="ignore"):
        amax = np.abs(x).max(1, initial=0).astype(F32)
        low, high = form.symmetric if symmetric else form.asymmetric
        least, most = x.min(1, initial=0).astype(F32), x.max(1, initial=0).astype(F32)
        if symmetric:
            scale = amax / F32(form.range)
        else:
            steps = F32(high - low)
            scale = most / steps - least / steps
        scale = np.maximum(scale, FLT_MIN)
        rounded = round_to(scale, scale_dtype)
        if scale_dtype == torch.bfloat16:
            rounded = np.minimum(rounded, F32(3.3895313892515355e38))
        if scale_dtype == torch.float16:
            rounded = np.clip(rounded, F32(2.0**-24), F32(65504))
        zero = np.full(len(x), form.middle)
        if not symmetric:
            inverse = F32(1) / rounded
            shifted = np.nan_to_num(F32(low) - least * inverse)
            zero = np.clip(np.rint(shifted), low, high).astype(np.int64) * form.steps
    empty, broken = amax == 0, ~np.isfinite(x).all(1)
    scale = np.where(broken, F32(np.nan), np.where(empty, F32(1), rounded))
    zero = np.where(empty | broken, form.middle if symmetric else 0, zero)
    return scale.astype(F32), zero.astype(np.int64)


def encode(
    x: np.ndarray, form: Format, symmetric: bool, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Codes as stored; scale and zero broadcast against x.

    A zero point is the code next to it, the upper one of two, and a fraction.
    """
    with np.errstate(all="ignore"):
        quotient = x * (F32(1) / scale)
        if form is NF4:
            middles = (NF4_LEVELS[:-1].astype(np.float64) + NF4_LEVELS[1:]) / 2
            codes = (quotient[..., None] > middles.astype(F32)).sum(-1)
            return np.where(np.isnan(quotient), 7, codes)
        low, high = form.symmetric if symmetric else form.asymmetric
        whole = np.floor(zero / form.steps + 0.5)
        fraction = (zero / form.steps - whole).astype(F32)
        codes = np.clip(np.rint(quotient + fraction).astype(np.float64) + whole, low, high)
        return np.where(np.isnan(quotient), whole, np.nan_to_num(codes)).astype(np.int64)


def spread(per_group: np.ndarray, cols: int, group_size: int) -> np.ndarray:
    """[rows, groups] repeated to [rows, cols]."""
    edges = group_edges(cols, group_size)
    return np.repeat(per_group, [end - begin for begin, end in edges], axis=1)


@dataclass(frozen=True)
class Codes:
    codes: np.ndarray  # int64 [rows, cols], as stored
    scale: np.ndarray  # float32 [rows, groups], or () per tensor
    zero: np.ndarray  # int64, like scale


def quantize(
    x: np.ndarray,
    form: Format,
    group_size: int | None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> Codes:
    """x: float32 [rows, cols]."""
    if group_size is None:
        flat = quantize(x.reshape(1, -1), form, -1, symmetric, scale_dtype)
        shape = ()
        return Codes(
            flat.codes.reshape(x.shape), flat.scale.reshape(shape), flat.zero.reshape(shape)
        )
    edges = group_edges(x.shape[1], group_size)
    chosen = [choose(x[:, begin:end], form, symmetric, scale_dtype) for begin, end in edges]
    shape = (len(x), len(edges))
    scale = np.stack([scale for scale, _ in chosen], 1) if edges else np.zeros(shape, F32)
    zero = np.stack([zero for _, zero in chosen], 1) if edges else np.zeros(shape, np.int64)
    wide = (spread(part, x.shape[1], group_size) for part in (scale, zero))
    return Codes(encode(x, form, symmetric, *wide), scale, zero)


def decode(codes: np.ndarray, form: Format, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if form is NF4:
            return NF4_LEVELS[codes] * scale
        return form.values(codes, zero).astype(F32) * scale


# ---- Storage -------------------------------------------------------------------------------------


def storage_dtype(form: Format) -> type[np.generic]:
    return {8: np.int8, 16: np.int16, 4: np.uint8}[form.bits]


def store(codes: np.ndarray, form: Format) -> np.ndarray:
    """Codes [..., cols] as the ops store them: 4 bits go in pairs, the even one low."""
    if form.bits != 4:
        return codes.astype(storage_dtype(form))
    even, odd = codes[..., 0::2], codes[..., 1::2]
    odd = np.concatenate([odd, np.zeros_like(even[..., odd.shape[-1] :])], -1)
    return (even | odd << 4).astype(np.uint8)


def unstore(data: np.ndarray, form: Format, cols: int) -> np.ndarray:
    if form.bits != 4:
        return data.astype(np.int64)
    pairs = np.stack([data & 15, data >> 4], -1).astype(np.int64)
    return pairs.reshape(*data.shape[:-1], 2 * data.shape[-1])[..., :cols]


# ---- Matrix products -----------------------------------------------------------------------------


def group_sums(x: np.ndarray, w: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Exact sums over every group of x [M, K] times w [N, K], both integer.

    float64 holds every partial sum exactly, since all are integers below 2^53.
    """
    edges = group_edges(x.shape[1], group_size)
    a, b = x.astype(np.float64), w.astype(np.float64)
    return [(a[:, i:j] @ b[:, i:j].T).astype(np.int64) for i, j in edges]


def scaled_sum(sums: list[np.ndarray], scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of groups times scale [N, G], added up in order of the groups, one fma each."""
    total = np.zeros(shape, F32)
    for g, part in enumerate(sums):
        total = fma(part.astype(F32), scale[:, g], total)
    return total


@dataclass(frozen=True)
class Activations:
    """x as an integer path reads it."""

    codes: np.ndarray
    scale: np.ndarray  # float32 [M, 1]
    zero: np.ndarray  # int64 [M, 1]


def quantize_activations(
    x: np.ndarray, symmetric: bool, x_scale: float | None = None, x_zero: int = 0
) -> Activations:
    if x_scale is None:
        rows = quantize(x, INT8, -1, symmetric)
        return Activations(rows.codes, rows.scale, rows.zero)
    scale = np.full((len(x), 1), x_scale, F32)
    zero = np.full((len(x), 1), x_zero)
    codes = encode(x, INT8, symmetric, scale, zero)
    broken = ~np.isfinite(x).all(1, keepdims=True)
    return Activations(codes, np.where(broken, F32(np.nan), scale), zero)


def group_values(
    a_codes: np.ndarray, w_codes: np.ndarray, w_zero: np.ndarray, group_size: int, form: Format
) -> list[np.ndarray]:
    """Products of codes of x [M, K] and values of w, by group, float32 [M, N].

    int4: products with codes less 8, exact, and the distance of the zero point from 8 times the sum
    of the codes of x, added by an fma.
    """
    middle = w_zero if form is INT8 else np.full_like(w_zero, form.offset)
    centered = w_codes - spread(middle, w_codes.shape[1], group_size)
    products = group_sums(a_codes, centered, group_size)
    if form is INT8:
        return [part.astype(F32) for part in products]
    sums = group_sums(a_codes, np.ones((1, w_codes.shape[1]), np.int64), group_size)
    distance = ((form.middle - w_zero) / form.steps).astype(F32)
    return [
        fma(distance[:, g], total.astype(F32), part.astype(F32))
        for g, (part, total) in enumerate(zip(products, sums, strict=True))
    ]


def linear_integer(
    a: Activations,
    w_codes: np.ndarray,
    w_scale: np.ndarray,
    w_zero: np.ndarray,
    group_size: int,
    bias: np.ndarray | None,
    asymmetric: bool,
    form: Format,
) -> np.ndarray:
    """Before the activation function, float32 [M, N]; w_codes as stored [N, K], the rest [N, G]."""
    shape = (len(a.codes), len(w_codes))
    parts = group_values(a.codes, w_codes, w_zero, group_size, form)
    total = scaled_sum(parts, w_scale, shape)
    if asymmetric:
        values = form.values(w_codes, spread(w_zero, w_codes.shape[1], group_size))
        edges = group_edges(w_codes.shape[1], group_size)
        sums = [values[:, i:j].sum(1)[None] for i, j in edges]
        column = scaled_sum(sums, w_scale, (1, len(w_codes)))
        total = fma(-a.zero.astype(F32), column, total)
    return fma(a.scale, total, F32(0) if bias is None else bias)
