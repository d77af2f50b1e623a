"""Modules for quantization-aware training: float weights, seen through fake quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import functional
from qkernels.formats import format_of
from qkernels.functional import Quantized
from qkernels.nn.batchnorm import folded_bias, safe_factor, true_factor
from qkernels.nn.carry import carry_over
from qkernels.nn.learned import (
    gradient_factor,
    keeping_dtype,
    learned,
    stored_scale,
)
from qkernels.nn.observer import InputRange
from qkernels.nn.storage import quantize_weight
from qkernels.schemes import W8A8, Scheme

_DEFAULT_SCHEME = W8A8()
_Self = TypeVar("_Self", bound="QATModule")


class QATModule(nn.Module):
    """What modules share that are trained for quantization.

    `weight` and `bias` are those of the float module, under the same names. The forward pass sees
    the weight as the quantized module will have it, and the input as it will read it; the product
    is computed in float.
    """

    # Torch's fused transformer path would pass by what this does to `weight`.
    hides_weight = True
    # As the float class declares them.
    weight: Any
    bias: Any
    weight_scale: nn.Parameter | None
    weight_zero_point: nn.Parameter | None
    input_range: InputRange | None
    scheme: Scheme
    # Whether anything is quantized; off, the module computes as its float one does.
    quantizing: bool
    # The float module that this one stands for.
    float_type: ClassVar[type[nn.Module]]
    # Attributes that a float module has no use for.
    own_attributes: tuple[str, ...] = ("scheme", "quantizing")

    def __init__(
        self,
        *args: Any,
        scheme: Scheme = _DEFAULT_SCHEME,
        learn_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(scheme, learn_scale)

    @classmethod
    def from_float(
        cls: type[_Self], module: nn.Module, scheme: Scheme, *, learn_scale: bool = False
    ) -> _Self:
        """A module that trains for a scheme, with the parameters, mode and hooks of a float one.

        Args:
            module: of the class that this one stands for.
            scheme: what it shall be quantized with afterwards.
            learn_scale: train the weight's scales (and zero points), and those of a static input.

        Raises:
            TypeError: a module of another class.
        """
        if not isinstance(module, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(module).__name__}; expected an "
                f"nn.{cls.float_type.__name__}"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._parameters.update(module._parameters)
        carry_over(module, new)
        new._set_up(scheme, learn_scale)
        return new

    def _set_up(self, scheme: Scheme, learn_scale: bool) -> None:
        if not isinstance(scheme, Scheme):
            raise TypeError(
                f"{type(self).__name__}: scheme is {scheme!r}; expected one like qk.W8A8() or "
                "qk.W4A16(group_size=128)"
            )
        self.scheme = scheme
        self.quantizing = True
        self.register_parameter("weight_scale", None)
        self.register_parameter("weight_zero_point", None)
        self.register_module("input_range", None)
        if scheme.static and self._reads_numbers:
            symmetric = scheme.activation == "symmetric"
            self.input_range = InputRange(
                symmetric, learn_scale, self._fan_in, self.weight.device, self.training
            )
        if learn_scale:
            start = quantize_weight(self._matrix, scheme)
            self.weight_scale = nn.Parameter(start.scale.float())
            if start.zero_point is not None:
                form = format_of(scheme.format)
                self.weight_zero_point = nn.Parameter(form.zero_codes(start.zero_point))

    _reads_numbers = True

    @property
    def _matrix(self) -> Tensor:
        """The weight with an output feature in each row."""
        matrix: Tensor = self.weight
        return matrix

    @property
    def _fan_in(self) -> int:
        return self._matrix.shape[1]

    @property
    def learns_scale(self) -> bool:
        """Whether scales are parameters; else they follow the weight."""
        return self.weight_scale is not None

    def learned_parameters(self) -> Iterator[nn.Parameter]:
        """Scales and zero points that are trained."""
        found = [self.weight_scale, self.weight_zero_point]
        if self.input_range is not None:
            found += self.input_range.parameters()
        yield from (parameter for parameter in found if parameter is not None)

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Let learned scales and zero points start again from the weight as it is now."""
        if self.weight_scale is None:
            return
        start = quantize_weight(self._matrix, self.scheme)
        self.weight_scale.copy_(start.scale)
        if self.weight_zero_point is not None:
            assert start.zero_point is not None
            form = format_of(self.scheme.format)
            self.weight_zero_point.copy_(form.zero_codes(start.zero_point))

    # ---- Fake quantization ----------------------------------------------------------------------

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Learned scales as stored, and zero points, with the gradients of LSQ."""
        if self.weight_scale is None:
            return None, None
        scheme = self.scheme
        length = self._fan_in if scheme.group_size == -1 else scheme.group_size
        factor = gradient_factor(min(length, self._fan_in), scheme.format)
        scale = learned(self.weight_scale, factor, scheme.scale_dtype)
        zero_point = self.weight_zero_point
        return scale, None if zero_point is None else learned(zero_point, factor)

    def _fake_rows(self, rows: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        scheme = self.scheme
        if scale is None:
            return functional.fake_quantize(
                rows, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
            )
        return functional.fake_quantize_with(
            rows, scale, zero_point, scheme.format, scheme.group_size
        )

    def fake_weight(self) -> Tensor:
        """The weight as the quantized module will have it, differentiable."""
        weight: Tensor = self.weight
        if self.quantizing:
            weight = self._fake_rows(self._matrix, *self._scales()).view_as(weight)
        return weight

    def fake_input(self, x: Tensor) -> Tensor:
        """The input as the quantized module will read it, differentiable.

        Args:
            x: the module's input.
        """
        scheme = self.scheme
        if scheme.activation == "float":
            return x
        if self.input_range is not None:
            seen: Tensor = self.input_range(x, self.quantizing)
            return seen
        if not self.quantizing:
            return x
        return self._fake_tokens(x)

    def _fake_tokens(self, x: Tensor) -> Tensor:
        return functional.fake_quantize(x, "int8", -1, self.scheme.activation == "symmetric")

    # ---- The end of training --------------------------------------------------------------------

    @torch.no_grad()
    def quantized_weight(self) -> Quantized:
        """The weight's codes and scales as they are now."""
        if self.weight_scale is None:
            return quantize_weight(self._matrix, self.scheme)
        scheme, zero_point = self.scheme, None
        scale = stored_scale(self.weight_scale, scheme.scale_dtype)
        if self.weight_zero_point is not None:
            zero_point = format_of(scheme.format).to_zero_point(self.weight_zero_point)
        matrix = self._matrix.detach()
        matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
        return functional.quantize_with(matrix, scale, zero_point, scheme.format, scheme.group_size)

    def why_not_convertible(self) -> str | None:
        """Why no quantized module can be made of this one, or None."""
        for parameter in self.learned_parameters():
            if not parameter.isfinite().all():
                return "its learned scales hold NaN or Inf; lower their learning rate"
        if self.weight_scale is not None and not (self.weight_scale > 0).all():
            return "a learned scale is 0 or negative; lower the learning rate of scales"
        return None if self.input_range is None else self.input_range.why_not_ready()

    def to_float(self) -> nn.Module:
        """The float module of the same parameters; it keeps mode and hooks."""
        new = self.float_type.__new__(self.float_type)
        nn.Module.__init__(new)
        own = ("weight_scale", "weight_zero_point")
        new._parameters.update({k: p for k, p in self._parameters.items() if k not in own})
        carry_over(self, new, self.own_attributes)
        return new

    # ---- state_dict, casting --------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's tensors; a float checkpoint has no scales, which then start anew."""
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            error_msgs.append(
                f"{prefix}weight is {weight.dtype} in the checkpoint: codes of a quantized model. "
                "Load it into the converted model, or load a float checkpoint here."
            )
            return
        found: list[str] = []
        rest = (strict, found, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        own = {prefix + "weight_scale", prefix + "weight_zero_point"}
        missing_keys.extend(key for key in found if key not in own)
        if weight is not None and prefix + "weight_scale" in found and not self.weight.is_meta:
            self.reset_scales()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # Scales stay float32 when a model is cast: they would be other scales.
        own = (self.weight_scale, self.weight_zero_point)
        super()._apply(keeping_dtype(fn, own), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        learns = ", learn_scale=True" if self.learns_scale else ""
        return f"{super().extra_repr()}, scheme={self.scheme}{learns}"


class QATLinear(QATModule, nn.Linear):
    """`nn.Linear` that trains for quantization; `convert_` makes a QLinear of it.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        scheme: what it shall be quantized with afterwards.
        learn_scale: train the weight's scales (and zero points), and those of a static input.

    Example:
        >>> layer = qk.nn.QATLinear(64, 32, scheme=qk.W4A8(group_size=32))
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 32])
    """

    float_type = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fake_input(x), self.fake_weight(), self.bias)


class QATEmbedding(QATModule, nn.Embedding):
    """`nn.Embedding` that trains for quantization; `convert_` makes a QEmbedding of it.

    Only the rows that are looked up are quantized: every row has scales of its own.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        scheme: what it shall be quantized with afterwards; only the weight's part matters.
        learn_scale: train the table's scales (and zero points).

    Example:
        >>> table = qk.nn.QATEmbedding(100, 16, scheme=qk.W8A16())
        >>> table(torch.tensor([3, 7])).shape
        torch.Size([2, 16])
    """

    float_type = nn.Embedding
    _reads_numbers = False

    def forward(self, indices: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, indices)
        if not self.quantizing:
            return rows
        scale, zero_point = (t if t is None else t[indices] for t in self._scales())
        return self._fake_rows(rows, scale, zero_point)


class QATConvolution(QATModule):
    """What convolutions share: a scale for each output channel, and batch normalization.

    A batch normalization that follows is folded into the weight that is quantized, going by its
    running statistics. The result is divided by the same factors before the normalization itself,
    which stays in its place, so that this trains as ever (Krishnamoorthi, "Quantizing deep
    convolutional networks for efficient inference", 2018, section 3.2.2).
    """

    # The batch normalization after this module, or nothing; a tuple, for it is no submodule.
    batchnorm: tuple[nn.Module, ...] = ()
    own_attributes = (*QATModule.own_attributes, "batchnorm")

    def fold(self, norm: nn.Module) -> None:
        """Take account of the batch normalization that reads this module's output.

        Args:
            norm: with one feature for each output channel.
        """
        self.batchnorm = (norm,)
        self.reset_scales()

    @property
    def _matrix(self) -> Tensor:
        matrix: Tensor = self.weight.flatten(1)
        for norm in self.batchnorm:
            matrix = matrix * safe_factor(norm).unsqueeze(1)
        return matrix

    def _fake_tokens(self, x: Tensor) -> Tensor:
        spatial = self.weight.dim() - 2
        samples = x.flatten(-spatial - 1)
        return super()._fake_tokens(samples).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.fake_input(x), self.fake_weight()
        if not self.batchnorm or not self.quantizing:
            return self._convolve(x, weight, self.bias)
        each = (-1, *[1] * (weight.dim() - 2))
        y = self._convolve(x, weight, None) / safe_factor(self.batchnorm[0]).view(each)
        return y if self.bias is None else y + self.bias.view(each)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Any = self._conv_forward
        y: Tensor = convolve(x, weight, bias)
        return y

    def to_float(self) -> nn.Module:
        """The float convolution that computes with the values that training saw.

        A batch normalization is folded in, and has to go.
        """
        new: Any = super().to_float()
        with torch.no_grad():
            values = self.quantized_weight().dequantize(torch.float32)
            for norm in self.batchnorm:
                values = values * (true_factor(norm) != 0).unsqueeze(1)
                new.bias = folded_bias(self.bias, norm)
            new.weight = nn.Parameter(values.to(self.weight.dtype).view_as(self.weight))
        plain: nn.Module = new
        return plain


class QATConv1d(QATConvolution, nn.Conv1d):
    """`nn.Conv1d` that trains for quantization, with a scale for each output channel.

    Example:
        >>> qk.nn.QATConv1d(3, 8, 3)(torch.randn(2, 3, 10)).shape
        torch.Size([2, 8, 8])
    """

    float_type = nn.Conv1d


class QATConv2d(QATConvolution, nn.Conv2d):
    """`nn.Conv2d` that trains for quantization, with a scale for each output channel.

    Example:
        >>> qk.nn.QATConv2d(3, 8, 3)(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 7, 7])
    """

    float_type = nn.Conv2d


class QATConv3d(QATConvolution, nn.Conv3d):
    """`nn.Conv3d` that trains for quantization, with a scale for each output channel.

    Example:
        >>> qk.nn.QATConv3d(3, 8, 3)(torch.randn(2, 3, 5, 5, 5)).shape
        torch.Size([2, 8, 3, 3, 3])
    """

    float_type = nn.Conv3d
