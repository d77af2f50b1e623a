"""The range of a module's input while it is being trained, for static quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qkernels import functional
from qkernels.formats import format_of
from qkernels.nn.learned import gradient_factor, keeping_dtype, learned

# Share of a batch in the moving average, as in Jacob et al. ("Quantization and Training of Neural
# Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
_SHARE = 0.01


class InputRange(nn.Module):
    """Fake quantization of an input to int8 with one scale, which follows a moving average.

    While it observes, in training mode, smallest and largest input are averaged over the batches;
    in a distributed run, those of all processes together. Afterwards the scale stands still or, if
    it is learned, is trained from there (LSQ, LSQ+).

    Args:
        symmetric: without a zero point.
        learn: make scale and zero point parameters.
        features: elements of the input that a weight meets, for the gradient of a learned scale.
        device: of the state.
        training: mode to start in.
    """

    scale: Tensor
    zero_point: Tensor | None
    x_min: Tensor
    x_max: Tensor

    def __init__(
        self,
        symmetric: bool,
        learn: bool,
        features: int,
        device: torch.device | str | None = None,
        training: bool = True,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.learn = learn
        self.observing = True
        self.training = training
        self._factor = gradient_factor(features, "int8")
        for name in ("x_min", "x_max"):
            self.register_buffer(name, torch.full((), torch.nan, device=device))
        scale = torch.full((), torch.nan, device=device)
        zero = torch.zeros((), dtype=torch.float32 if learn else torch.int8, device=device)
        if learn:
            self.scale = nn.Parameter(scale)
            self.zero_point = None if symmetric else nn.Parameter(zero)
        else:
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", None if symmetric else zero)

    def forward(self, x: Tensor, quantizing: bool) -> Tensor:
        """x as the quantized module will read it.

        Args:
            x: the input.
            quantizing: whether to quantize, or only to observe.
        """
        if self.observing and self.training and x.numel() and not _is_recomputed():
            self._observe(x.detach())
        if not quantizing:
            return x
        if not torch.compiler.is_compiling() and (reason := self.why_not_ready()):
            raise RuntimeError(f"a module that was prepared for static quantization: {reason}")
        # Copies, since a later batch changes these while a backward pass may still need them.
        if self.learn:
            scale = learned(self.scale, self._factor, torch.float32)
            zero = None if self.zero_point is None else learned(self.zero_point, self._factor)
        else:
            scale = self.scale.clone()
            zero = None if self.zero_point is None else self.zero_point.clone()
        return functional.fake_quantize_with(x, scale, zero, "int8", None)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        # Negated, so that one reduction serves both.
        ends = torch.stack([-low.float().clamp(max=0), high.float().clamp(min=0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        is_finite = ends.isfinite().all()  # a broken batch shows in the output and moves nothing
        for average, new in ((self.x_min, -ends[0]), (self.x_max, ends[1])):
            moved = torch.where(average.isnan(), new, average + _SHARE * (new - average))
            average.copy_(torch.where(is_finite, moved, average))
        both = torch.stack([self.x_min, self.x_max])
        code = format_of("int8").code
        _, scale, zero = torch.ops.qkernels.quantize(both, code, None, self.symmetric, None)
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero)

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Scale, float32, and zero point, int8 or None, as a QLinear takes them."""
        zero = self.zero_point
        if zero is not None and self.learn:
            zero = format_of("int8").to_zero_point(zero)
        return self.scale.detach().clone(), zero

    def why_not_ready(self) -> str | None:
        """Why there is no range yet, or None."""
        if self.scale.isnan():
            return (
                "its input has not been observed yet; run it on some batches in training mode "
                "before it is used in eval mode or converted"
            )
        if not 0 < float(self.scale.detach()) < torch.inf:
            return "the learned scale of its input is not positive; lower its learning rate"
        return None

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
        """Load the range; a float checkpoint has none, which changes nothing."""
        rest: tuple[Any, ...] = (strict, [], unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputRange:
        own = (self.x_min, self.x_max, self.scale, self.zero_point)
        super()._apply(keeping_dtype(fn, own), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        learns = ", learn=True" if self.learn else ""
        return f"symmetric={self.symmetric}, observing={self.observing}{learns}"


def _is_recomputed() -> bool:
    """Whether a forward pass runs inside of a backward pass: checkpointing, which saw x already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
