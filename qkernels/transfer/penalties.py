"""Penalties to add to the loss: L1, L2, and L2 to the weights that training started from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.plan import check_model
from qkernels.transfer.parts import choose


class _Penalty:
    """What the penalties share: which parameters they are about.

    Args:
        model: its parameters that require a gradient when the penalty is computed count.
        only: patterns of modules and parameters to count, or None for all.
    """

    def __init__(self, model: nn.Module, only: str | Sequence[str] | None) -> None:
        name = type(self).__name__
        check_model(model, name)
        self._model = model
        everything = [n for n, p in model.named_parameters() if p.is_floating_point()]
        self._names = (
            set(everything) if only is None else choose(model, only, everything, name, "only")
        )

    def _check(self, **strengths: float) -> None:
        for argument, value in strengths.items():
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"{type(self).__name__}: {argument} is {value!r}; expected 0 or more"
                )

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            n: p for n, p in self._model.named_parameters() if p.requires_grad and n in self._names
        }


class L1(_Penalty):
    """strength · Σ|w| over the parameters that train (Tibshirani's lasso, 1996).

    Args:
        model: float or quantized; what is frozen when the penalty is computed does not count.
        strength: 0 or more.
        only: patterns of modules and parameters to count, such as "*.weight"; by default all.

    Raises:
        ValueError: strength is out of range, or a pattern matches nothing.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.constant_(layer[0].weight, -3.0)
        >>> qk.transfer.L1(layer, strength=0.5)().item()
        3.0
    """

    def __init__(
        self, model: nn.Module, strength: float, only: str | Sequence[str] | None = None
    ) -> None:
        super().__init__(model, only)
        self._check(strength=strength)
        self.strength = strength

    def __call__(self) -> Tensor:
        """The penalty, a float32 scalar to be added to the loss."""
        return self.strength * _sum(
            p.abs().sum(dtype=torch.float32) for p in self._trained().values()
        )


class L2(_Penalty):
    """strength / 2 · Σw² over the parameters that train: weight decay as a part of the loss.

    Args:
        model: float or quantized; what is frozen when the penalty is computed does not count.
        strength: 0 or more.
        only: patterns of modules and parameters to count, such as "*.weight"; by default all.

    Raises:
        ValueError: strength is out of range, or a pattern matches nothing.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.constant_(layer[0].weight, -3.0)
        >>> qk.transfer.L2(layer, strength=0.5)().item()
        4.5
    """

    def __init__(
        self, model: nn.Module, strength: float, only: str | Sequence[str] | None = None
    ) -> None:
        super().__init__(model, only)
        self._check(strength=strength)
        self.strength = strength

    def __call__(self) -> Tensor:
        """The penalty, a float32 scalar to be added to the loss."""
        return (
            self.strength
            / 2
            * _sum(p.square().sum(dtype=torch.float32) for p in self._trained().values())
        )


class L2SP(_Penalty):
    """L2 distance to the weights that training started from (Li et al., "L2-SP", 2018).

    alpha / 2 · Σ(w − w₀)² over the parameters that came with the model, and beta / 2 · Σw² over the
    new ones. w₀ is kept once, for what trains only: what is frozen when the penalty is made, and
    thawed later, is kept from the first time on that it trains. Make it after loading the source
    weights and before the first step.

    Args:
        model: holds the source weights; what is frozen does not count.
        alpha: strength of the pull to the source weights, 0 or more.
        beta: strength of the pull of new parameters to zero, 0 or more.
        new: patterns of modules and parameters that have no source, such as a fresh head.
        dtype: to keep w₀ in, by default that of the parameters; torch.bfloat16 takes half the
            memory of float32 and moves w₀ by up to 0.4 %.

    Raises:
        ValueError: a strength is out of range, or a pattern matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> penalty = qk.transfer.L2SP(model, alpha=0.1, beta=0.01, new="2")
        >>> loss = model(torch.randn(4, 8)).square().mean() + penalty()
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        beta: float = 0.0,
        new: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, None)
        self._check(alpha=alpha, beta=beta)
        self.alpha, self.beta, self._dtype = alpha, beta, dtype
        self._new = set[str]() if new is None else choose(model, new, self._names, "L2SP", "new")
        self._source: dict[str, Tensor] = {}
        self._keep_sources()

    def __call__(self) -> Tensor:
        """The penalty, a float32 scalar to be added to the loss."""
        trained = self._keep_sources()
        pulled = _sum(
            _HalfSquaredDistance.apply(p, self._source[n])  # type: ignore[no-untyped-call]
            for n, p in trained.items()
            if n not in self._new
        )
        fresh = _sum(
            p.square().sum(dtype=torch.float32) for n, p in trained.items() if n in self._new
        )
        return self.alpha * pulled + self.beta / 2 * fresh

    @property
    def nbytes(self) -> int:
        """Bytes that the source weights take."""
        return sum(tensor.nbytes for tensor in self._source.values())

    def _keep_sources(self) -> dict[str, nn.Parameter]:
        trained = self._trained()
        for name, parameter in trained.items():
            if name not in self._new and name not in self._source:
                self._source[name] = parameter.detach().to(self._dtype, copy=True)
        return trained


class _HalfSquaredDistance(torch.autograd.Function):
    """Σ(w − w₀)² / 2. Its gradient takes the difference anew instead of keeping it until then."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(weight, source)
        return (weight - source).float().square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, source = ctx.saved_tensors
        return ((weight - source) * grad).to(weight.dtype), None


def _sum(terms: Iterable[Tensor]) -> Tensor:
    found = list(terms)
    return torch.stack(found).sum() if found else torch.zeros(())
