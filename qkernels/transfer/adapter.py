"""LoRALinear: a frozen linear layer, quantized or float, with a low-rank update that trains."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.nn import QLinear


class LoRALinear(nn.Module):
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

    # Code that reads `weight` must not find the base's, which is only a part of the truth.
    hides_weight = True

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
        if isinstance(base, QLinear):
            base.check_not_fused("an adapter")
        check_settings("LoRALinear", rank, alpha, dropout)
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        tensor = base.packed if isinstance(base, QLinear) else base.weight
        dtype = base.dtype if isinstance(base, QLinear) else base.weight.dtype
        shape_a, shape_b = (rank, self.in_features), (self.out_features, rank)
        self.lora_a = nn.Parameter(torch.empty(shape_a, device=tensor.device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(shape_b, device=tensor.device, dtype=dtype))
        base.requires_grad_(False)
        self.reset_parameters()
        self.train(base.training)

    def reset_parameters(self) -> None:
        """Draw A as the weight of an `nn.Linear` and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        inner = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # Scaled where it is narrow: the wide result is then made only once.
        narrow = F.linear(inner.to(self.lora_a.dtype), self.lora_a) * self.scaling
        return y + F.linear(narrow, self.lora_b).to(y.dtype)

    @torch.no_grad()
    def update(self) -> Tensor:
        """What the adapter adds to the weight: [out_features, in_features], float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        return self.scaling * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))

    def extra_repr(self) -> str:
        kind = ", rslora=True" if self.rslora else ""
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}{kind}"


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
