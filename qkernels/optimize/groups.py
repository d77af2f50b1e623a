"""The state of a search: the best scale and zero point of every group so far, and their error."""

from __future__ import annotations

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
        self._code = format_of(scheme.format).code
        self._zero_dtype = format_of(scheme.format).storage_dtype
        size = values.shape[-1]
        first = functional.quantize(
            values.reshape(-1, size), scheme.format, -1, scheme.symmetric, scheme.scale_dtype
        )
        self.scale = first.scale.reshape(values.shape[:-1])
        # As int32, in which zero points are computed with; None if symmetric.
        self.zero_point: Tensor | None = None
        if first.zero_point is not None:
            self.zero_point = first.zero_point.reshape(self.scale.shape).int()
        self.error = self.error_of(self.approximation(self.scale, self.zero_point))

    @property
    def stored_zero_point(self) -> Tensor:
        """The zero points in the type they are stored in."""
        assert self.zero_point is not None
        return self.zero_point.to(self._zero_dtype)

    @property
    def lowest_code(self) -> int:
        """The smallest code, and so the smallest zero point."""
        return -128 if self.scheme.format == "int8" else 0

    @property
    def steps(self) -> int:
        """Codes there are, less one."""
        return (1 << format_of(self.scheme.format).bits) - 1

    def approximation(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What the values become with given scales [R, G], of the values' shape."""
        size = self.values.shape[-1]
        flat = scale.reshape(-1, 1)
        zero = None if zero_point is None else zero_point.reshape(-1, 1).to(self._zero_dtype)
        codes = _OPS.quantize_with(self.values.reshape(-1, size), flat, zero, self._code, -1)
        out = _OPS.dequantize(codes, flat, zero, self._code, -1, size, torch.float32)
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
            zero_point: int32 [R, G], or None if symmetric.
        """
        scale = scale.to(self.scale.dtype)
        usable = scale.isfinite() & (scale != 0)
        error = self.error_of(self.approximation(scale, zero_point))
        # Not <=: what is as good as before changes nothing, and NaN is never better.
        better = (error < self.error) & usable
        self._put(better, scale, zero_point, error)

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

    def clamp_zero_point(self, zero_point: Tensor) -> Tensor:
        """Zero points [R, G] rounded to integers that can be stored; NaN becomes one, too."""
        low = self.lowest_code
        return zero_point.round().nan_to_num(low).clamp(low, low + self.steps).int()
