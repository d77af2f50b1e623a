"""Adapters: frozen layers, quantized or float, with a low-rank update that trains."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.nn import QLinear
from qkernels.nn.conv import QConv1d, QConv2d, QConv3d, QConvNd, weight_matrix

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, QConv1d, QConv2d, QConv3d)
# What an adapter may be for, the very classes.
BASES = (nn.Linear, QLinear, *CONVOLUTIONS)
_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
# What code around a convolution may ask it for.
_CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups", "padding_mode"),
)


class LoRA(nn.Module):
    """What `LoRALinear` and `LoRAConv` share: two small matrices beside a frozen base.

    Their product is what is added to the base's weight as a matrix [rows, columns]; a
    convolution's has a row for each output channel and its columns in the order of `weight[0]`.
    """

    # Code that reads `weight` must not find the base's, which is only a part of the truth.
    hides_weight = True

    base: Any
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def _set_up(self, base: Any, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        check_settings(type(self).__name__, rank, alpha, dropout)
        self.base = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        is_quantized = isinstance(base, QLinear | QConvNd)
        if is_quantized:
            base.check_not_fused("an adapter")
        tensor = base.packed if is_quantized else base.weight
        dtype = base.dtype if is_quantized else tensor.dtype
        shape_a, shape_b = adapter_shapes(base, rank)
        self.lora_a = nn.Parameter(torch.empty(shape_a, device=tensor.device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(shape_b, device=tensor.device, dtype=dtype))
        base.requires_grad_(False)
        self.reset_parameters()
        self.train(base.training)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        found: nn.Parameter | None = self.base.bias
        return found

    def reset_parameters(self) -> None:
        """Draw A as the weight of a layer with as many outputs as the rank, and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def _dropped(self, x: Tensor) -> Tensor:
        inner = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return inner.to(self.lora_a.dtype)

    @torch.no_grad()
    def update(self) -> Tensor:
        """What the adapter adds to the weight, in its shape; float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        a, b = self.lora_a.to(dtype), self.lora_b.to(dtype)
        return self.scaling * (b @ a.flatten(1)).view(-1, *a.shape[1:])

    def extra_repr(self) -> str:
        kind = ", rslora=True" if self.rslora else ""
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}{kind}"


class LoRALinear(LoRA):
    """y = base(x) + scaling * B A dropout(x), where only A and B train (Hu et al., "LoRA", 2021).

    A is drawn as the weight of an `nn.Linear`, B is zero, so a new adapter changes nothing. The
    gradient to x flows through the base, whose quantized weight is never dequantized whole
    (Dettmers et al., "QLoRA", 2023).

    Args:
        base: an `nn.Linear` or QLinear; its parameters are frozen.
        rank: rows of A and columns of B.
        alpha: scaling is alpha / rank.
        dropout: share of x that the adapter, but not the base, does without while training.
        rslora: let scaling be alpha / sqrt(rank), which stays stable at high ranks (Kalajdzievski,
            "Rank-stabilized LoRA", 2023).

    Raises:
        TypeError: base is no linear layer.
        ValueError: rank or dropout is out of range, or alpha is not finite.

    Example:
        >>> layer = qk.transfer.LoRALinear(qk.nn.QLinear(64, 32), rank=4, alpha=8)
        >>> layer(torch.randn(2, 64)).shape, layer.scaling
        (torch.Size([2, 32]), 2.0)
    """

    def __init__(
        self,
        base: nn.Linear | QLinear,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear | QLinear):
            raise TypeError(
                f"LoRALinear: base is {type(base).__name__}; expected an nn.Linear or QLinear"
            )
        self.in_features, self.out_features = base.in_features, base.out_features
        self._set_up(base, rank, alpha, dropout, rslora)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        # Scaled where it is narrow: the wide result is then made only once.
        narrow = F.linear(self._dropped(x), self.lora_a) * self.scaling
        return y + F.linear(narrow, self.lora_b).to(y.dtype)


class LoRAConv(LoRA):
    """LoRA for convolutions: one of as many channels as the rank, then a 1 × 1 one to all.

    A [rank, in_channels / groups, *kernel] is the weight of a convolution with the base's kernel,
    stride, padding and dilation, B [out_channels, rank] that of the pointwise one after it. All
    groups of channels share A and have rows of B of their own, so that the update is one of low
    rank of the base's weight as a matrix, and can be merged into it. B is zero to begin with.

    Args:
        base: an `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, or a quantized one; its parameters are
            frozen.
        rank: channels of A.
        alpha: scaling is alpha / rank.
        dropout: as for `LoRALinear`, as is rslora.
        rslora: let scaling be alpha / sqrt(rank).

    Raises:
        TypeError: base is no such convolution; transposed ones have no adapters.
        ValueError: rank or dropout is out of range, or alpha is not finite.

    Example:
        >>> conv = qk.nn.QConv2d(8, 16, 3, stride=2, padding=1, scheme=qk.W4A16(group_size=-1))
        >>> layer = qk.transfer.LoRAConv(conv, rank=4)
        >>> layer(torch.randn(2, 8, 10, 10)).shape, layer.lora_a.shape
        (torch.Size([2, 16, 5, 5]), torch.Size([4, 8, 3, 3]))
    """

    def __init__(
        self,
        base: nn.modules.conv._ConvNd | QConvNd,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base, CONVOLUTIONS):
            raise TypeError(
                f"LoRAConv: base is {type(base).__name__}; expected an nn.Conv1d, nn.Conv2d, "
                "nn.Conv3d, QConv1d, QConv2d or QConv3d"
            )
        for name in _CONV_ATTRIBUTES:
            setattr(self, name, getattr(base, name))
        self._set_up(base, rank, alpha, dropout, rslora)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        y: Tensor = base(x)
        inner, padding = self._dropped(x), base.padding
        if base.padding_mode != "zeros":
            inner = F.pad(inner, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        dims = len(base.kernel_size)
        convolve = _CONVOLVE[dims - 1]
        down = (
            self.lora_a.repeat(base.groups, *(1,) * (dims + 1)) if base.groups > 1 else self.lora_a
        )
        up = self.lora_b.view(*self.lora_b.shape, *(1,) * dims)
        narrow = convolve(inner, down, None, base.stride, padding, base.dilation, base.groups)
        wide: Tensor = convolve(narrow * self.scaling, up, None, 1, 0, 1, base.groups)
        return y + wide.to(y.dtype)


def adapter_for(
    base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool
) -> LoRALinear | LoRAConv:
    """The adapter for a layer of a kind in `BASES`.

    Args:
        base: the layer.
        rank: see `LoRALinear`, as for the others.
        alpha: of the scaling.
        dropout: of the input.
        rslora: how the scaling is made.
    """
    if isinstance(base, nn.Linear | QLinear):
        return LoRALinear(base, rank, alpha, dropout, rslora)
    assert isinstance(base, CONVOLUTIONS)
    return LoRAConv(base, rank, alpha, dropout, rslora)


def adapter_shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B.

    Args:
        base: a layer of a kind in `BASES`.
        rank: of the update.
    """
    layer: Any = base
    if isinstance(base, nn.Linear | QLinear):
        return (rank, layer.in_features), (layer.out_features, rank)
    columns = (layer.in_channels // layer.groups, *layer.kernel_size)
    return (rank, *columns), (layer.out_channels, rank)


def base_matrix(base: nn.Module) -> Tensor:
    """A base's weight as a matrix, float32 or wider; a quantized one's is what it computes with.

    Args:
        base: a layer of a kind in `BASES`.
    """
    if isinstance(base, QLinear | QConvNd):
        weight = base.float_weight()
    else:
        found = base.weight
        assert isinstance(found, Tensor)
        weight = as_matrix(found.detach())
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def as_matrix(weight: Tensor) -> Tensor:
    """A weight, or an update, in the order of quantized matrices: channels of a tap side by side.

    Args:
        weight: [out_features, in_features] or [out_channels, in_channels / groups, *kernel].
    """
    return weight if weight.dim() == 2 else weight_matrix(weight, transposed=False, groups=1)


def check_settings(op: str, rank: int, alpha: float, dropout: float) -> None:
    """Refuse settings that no adapter can have.

    Args:
        op: the function that was called, for errors.
        rank: see `LoRALinear`.
        alpha: see `LoRALinear`.
        dropout: see `LoRALinear`.

    Raises:
        ValueError: a value out of range.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{op}: rank is {rank!r}; expected an integer of 1 or more")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha is {alpha!r}; expected a finite number")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout is {dropout!r}; expected 0 or more and less than 1")
