"""Other ways to store 4 bits, from their descriptions, for `accuracy.py` to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkernels import functional

# Of bitsandbytes' 8-bit type for scales that are themselves quantized, a block has 256.
_SCALES = 256


def q4_0(weight: Tensor, size: int) -> Tensor:
    """GGUF's Q4_0: the element of the largest magnitude becomes code 0, 8 steps below zero."""
    groups = weight.reshape(-1, size)
    at = groups.abs().argmax(-1, keepdim=True)
    scale = groups.gather(-1, at) / -8
    codes = (groups / scale + 8.5).floor().clamp(0, 15)
    return ((codes - 8) * scale.half().float()).reshape(weight.shape)


def q4_1(weight: Tensor, size: int) -> Tensor:
    """GGUF's Q4_1: an fp16 scale and an fp16 minimum."""
    groups = weight.reshape(-1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale + 0.5).floor().clamp(0, 15)
    return (codes * scale.half().float() + low.half().float()).reshape(weight.shape)


def q4_k(weight: Tensor, size: int) -> Tensor:
    """GGUF's Q4_K: blocks of 256 in groups of 32, scales and minima in 6 bits, a search for both.

    For each of 21 steps the best line through the codes is found by least squares, in which a
    weight w counts |w| and the root mean square of its group. Scales and minima are then rounded
    to 63 steps of the block's largest, and the codes taken anew. Rows are laid end to end: their
    length need not be a multiple of 256, which GGUF asks for.
    """
    groups = weight.reshape(-1, size)
    counts = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True)
    span = (high - low).clamp(min=1e-30)
    scale, minimum = span / 15, low
    codes = ((groups - low) / scale).round().clamp(0, 15)
    best = (counts * (codes * scale + minimum - groups).square()).sum(-1, keepdim=True)
    total, x = counts.sum(-1, keepdim=True), (counts * groups).sum(-1, keepdim=True)
    for step in range(21):
        codes = ((groups - low) * ((14 + 0.1 * step) / span)).round().clamp(0, 15)
        first = (counts * codes).sum(-1, keepdim=True)
        second = (counts * codes.square()).sum(-1, keepdim=True)
        mixed = (counts * codes * groups).sum(-1, keepdim=True)
        determinant = total * second - first.square()
        slope = (total * mixed - x * first) / determinant
        offset = (second * x - first * mixed) / determinant
        slope = torch.where(offset > 0, mixed / second, slope)
        offset = offset.clamp(max=0)
        error = (counts * (codes * slope + offset - groups).square()).sum(-1, keepdim=True)
        better = (error < best) & (determinant > 0)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, offset, minimum)
        best = torch.where(better, error, best)
    scale, minimum = (_six_bits(t.reshape(-1, 256 // size)) for t in (scale, -minimum))
    scale, minimum = scale.reshape(-1, 1), minimum.reshape(-1, 1)
    codes = ((groups + minimum) / scale.clamp(min=1e-30)).round().clamp(0, 15)
    return (codes * scale - minimum).reshape(weight.shape)


def _six_bits(blocks: Tensor) -> Tensor:
    """Multiples, 0 to 63, of an fp16 unit for each row."""
    largest = blocks.amax(-1, keepdim=True)
    codes = (blocks * (63 / largest.clamp(min=1e-30))).round().clamp(0, 63)
    return codes * (largest / 63).half().float()


def hqq(weight: Tensor, size: int) -> Tensor:
    """HQQ with the settings of its authors' code, an fp16 scale and an fp16 zero point."""
    codes, scale, zero = _hqq(weight.reshape(-1, size))
    return ((codes - zero.half().float()) * scale.half().float()).reshape(weight.shape)


def hqq_zeros_in_8_bits(weight: Tensor, size: int) -> Tensor:
    """HQQ with `quant_zero`: zero points as 256 steps between the extremes of all of them."""
    codes, scale, zero = _hqq(weight.reshape(-1, size))
    step = (zero.max() - zero.min()) / 255
    zero = ((zero - zero.min()) / step).round() * step + zero.min()
    return ((codes - zero) * scale.half().float()).reshape(weight.shape)


def _hqq(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (15 / (high - low)).clamp(max=2e4)
    zero = -low * scale
    best, beta = float("inf"), 10.0
    for _ in range(20):
        codes = (groups * scale + zero).round().clamp(0, 15)
        rest = groups - (codes - zero) / scale
        e = rest.sign() * (rest.abs() - rest.abs().pow(-0.3) / beta).relu()
        zero = (codes - (groups - e) * scale).mean(-1, keepdim=True)
        error, beta = float(rest.abs().mean()), beta * 1.01
        if error >= best:
            break
        best = error
    return (groups * scale + zero).round().clamp(0, 15), 1 / scale, zero


def nf4(weight: Tensor, size: int) -> Tensor:
    """NF4 as bitsandbytes stores it: the largest magnitude of a group as float32."""
    q = functional.quantize(weight.reshape(-1, size), "nf4", -1, True, torch.float32)
    return q.dequantize().reshape(weight.shape)


def nf4_twice(weight: Tensor, size: int) -> Tensor:
    """The same with `compress_statistics`: these magnitudes, less their mean, in 8 bits.

    A block of 256 has a float32 factor, and 8 bits hold a sign, a power of ten and a fraction,
    whose bits grow as the power does (Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022).
    """
    q = functional.quantize(weight.reshape(-1, size), "nf4", -1, True, torch.float32)
    largest = q.scale.flatten()
    mean = largest.mean()
    missing = -len(largest) % _SCALES
    blocks = torch.nn.functional.pad(largest - mean, (0, missing)).reshape(-1, _SCALES)
    factor = blocks.abs().amax(-1, keepdim=True)
    levels = _dynamic_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(blocks / factor, middles)] * factor
    scale = rounded.flatten()[: len(largest)] + mean
    return replace(q, scale=scale.reshape(q.scale.shape)).dequantize().reshape(weight.shape)


def _dynamic_levels() -> Tensor:
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found))


@dataclass(frozen=True)
class Peer:
    """A way to store 4 bits.

    Args:
        name: of the format.
        store: the weight as it comes back, from a weight and a group size.
        sizes: the groups it offers.
        extra: bits of each group besides its codes, by group size.
    """

    name: str
    store: Callable[[Tensor, int], Tensor]
    sizes: tuple[int, ...]
    extra: Callable[[int], float]

    def bits(self, size: int) -> float:
        """Of each weight."""
        return 4 + self.extra(size) / size


PEERS = (
    Peer("GGUF Q4_0", q4_0, (32,), lambda _: 16),
    Peer("GGUF Q4_1", q4_1, (32,), lambda _: 32),
    # Twice 6 bits, and twice fp16 for eight groups.
    Peer("GGUF Q4_K", q4_k, (32,), lambda _: 12 + 32 / 8),
    Peer("HQQ", hqq, (32, 64, 96, 128, 192), lambda _: 32),
    Peer("HQQ, zero points in 8 bits", hqq_zeros_in_8_bits, (32, 64, 128), lambda _: 24),
    Peer("bitsandbytes nf4", nf4, (32, 64, 128), lambda _: 32),
    Peer("bitsandbytes nf4, double", nf4_twice, (32, 64, 128), lambda _: 8 + 32 / _SCALES),
)
