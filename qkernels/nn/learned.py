"""Scales and zero points as parameters: how they are stored, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qkernels import _C

_ROWS = {row["name"]: row for row in _C.formats()}
_SMALLEST = {torch.float16: 2.0**-24}


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the type that they are stored in, positive and finite as those of `quantize`.

    Args:
        scale: float32.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
    """
    return scale.clamp(_SMALLEST.get(dtype, 2.0**-126), torch.finfo(dtype).max).to(dtype)


def gradient_factor(count: int, format: str) -> float:
    """What LSQ multiplies the gradient of a scale by: 1 / √(elements · largest code).

    It makes a scale move, relative to its size, about as fast as the weights do (Esser et al.,
    2020, section 2.2).

    Args:
        count: elements that share the scale.
        format: "int8", "int4" or "nf4".
    """
    return float((max(count, 1) * int(_ROWS[format]["symmetric_range"])) ** -0.5)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, dtype: torch.dtype | None) -> Tensor:
        ctx.factor = factor
        return value.clone() if dtype is None else stored_scale(value, dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


def learned(value: Tensor, factor: float, dtype: torch.dtype | None = None) -> Tensor:
    """A parameter as fake quantization uses it; rounding counts as the identity.

    Args:
        value: scales, or zero points in codes, float32.
        factor: see `gradient_factor`.
        dtype: type that a scale is stored in; None for zero points, which the op rounds to
            steps of the format.
    """
    out: Tensor = _Learned.apply(value, factor, dtype)  # type: ignore[no-untyped-call]
    return out


def keeping_dtype(
    fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor | None]
) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is given, made to move some tensors without casting them.

    Args:
        fn: casts or moves.
        tensors: those that keep their type, and so do their gradients.
    """
    kept = {id(t) for p in tensors if p is not None for t in (p, p.grad) if t is not None}

    def apply(t: Tensor) -> Tensor:
        out = fn(t)
        return t.to(out.device) if id(t) in kept and out.dtype != t.dtype else out

    return apply
