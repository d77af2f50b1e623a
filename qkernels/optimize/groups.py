"""The state of a search: the best scale and zero point of every group so far, and their error."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from qkernels import functional
from qkernels.formats import format_of
from qkernels.schemes import Scheme

_OPS = torch.ops.qkernels


class GroupFit:
    """Groups of a weight with the best scales and zero points that were offered for them.

    What is offered is tried as the kernels would use it: with the scale rounded to its stored type
    and the codes of `quantize_with`. It starts with what `functional.quantize` chooses.

    Args:
        values: float32 [R, G, size].
        importance: float32 [G, size], weights of the squared error, or None.
        scheme: says format, symmetry and type of scales.
    """

    def __init__(self, values: Tensor, importance: Tensor | None, scheme: Scheme) -> None:
        self.values = values
        self.importance = importance
        self.scheme = scheme
        self.form = format_of(scheme.format)
        size = values.shape[-1]
        first = functional.quantize(
            values.reshape(-1, size), scheme.format, -1, scheme.symmetric, scheme.scale_dtype
        )
        self.scale = first.scale.reshape(values.shape[:-1])
        self.zero_point: Tensor | None = None  # as stored; None if symmetric
        if first.zero_point is not None:
            self.zero_point = first.zero_point.reshape(self.scale.shape)
        self.error = self.error_of(self.approximation(self.scale, self.zero_point))

    @property
    def zero_codes(self) -> Tensor:
        """The zero points [R, G] in codes, float32."""
        assert self.zero_point is not None
        return self.form.zero_codes(self.zero_point)

    @cached_property
    def value_mean(self) -> Tensor:
        """The weighted mean of the values of each group, [R, G]."""
        return self.mean(self.values)

    def approximation(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What the values become with given scales [R, G], of the values' shape."""
        size = self.values.shape[-1]
        flat = scale.reshape(-1, 1)
        zero = None if zero_point is None else zero_point.reshape(-1, 1)
        codes = _OPS.quantize_with(self.values.reshape(-1, size), flat, zero, self.form.code, -1)
        out = _OPS.dequantize(codes, flat, zero, self.form.code, -1, size, torch.float32)
        assert isinstance(out, Tensor)
        return out.reshape(self.values.shape)

    def error_of(self, approximation: Tensor) -> Tensor:
        """The weighted squared error of each group, [R, G]. The approximation is overwritten."""
        squared = approximation.sub_(self.values).square_()
        if self.importance is not None:
            squared.mul_(self.importance)
        return squared.sum(-1)

    def offer(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Take scales and zero points for the groups in which they make the error smaller.

        Args:
            scale: float [R, G]; what its stored type cannot hold is not taken.
            zero_point: as stored, [R, G], or None if symmetric.
        """
        scale = scale.to(self.scale.dtype)
        self.judge(self.approximation(scale, zero_point), scale, zero_point)

    def judge(self, approximation: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        """The same with the approximation that they give, which is overwritten."""
        scale = scale.to(self.scale.dtype)
        usable = scale.isfinite() & (scale != 0)
        error = self.error_of(approximation)
        # Not <=: what is as good as before changes nothing, and NaN is never better.
        self._put((error < self.error) & usable, scale, zero_point, error)

    def take(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Take scales and zero points for all groups, as far as they can be stored."""
        scale = scale.to(self.scale.dtype)
        error = self.error_of(self.approximation(scale, zero_point))
        self._put(scale.isfinite() & (scale != 0), scale, zero_point, error)

    def _put(self, where: Tensor, scale: Tensor, zero_point: Tensor | None, error: Tensor) -> None:
        self.error = torch.where(where, error, self.error)
        self.scale = torch.where(where, scale, self.scale)
        if zero_point is not None and self.zero_point is not None:
            self.zero_point = torch.where(where, zero_point, self.zero_point)

    def mean(self, of: Tensor) -> Tensor:
        """The weighted mean over each group, [R, G], of something in the shape of the values."""
        if self.importance is None:
            return of.mean(-1)
        return (of * self.importance).sum(-1) / self.importance.sum(-1)
