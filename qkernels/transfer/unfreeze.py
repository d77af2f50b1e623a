"""Gradual unfreezing: first the head trains, then one part more at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkernels.transfer.parts import parts
from qkernels.transfer.strategy import Strategy, strategy


class GradualUnfreezing:
    """Train the head first, and with every step the next parts before it (Howard and Ruder, 2018).

    The optimizer may hold all parameters from the beginning, as `parameter_groups` gives them:
    those without a gradient stay as they are. DistributedDataParallel looks at what trains once,
    when it is made; wrap the model anew after a step.

    Args:
        model: float or quantized. `requires_grad` of its parameters changes.
        every: parts that each step adds.

    Raises:
        TypeError: not a module.
        ValueError: every is below 1, or the head cannot train.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> schedule = qk.transfer.GradualUnfreezing(mlp)
        >>> mlp[0].weight.requires_grad
        False
        >>> table = schedule.step()  # after the first epoch
        >>> mlp[0].weight.requires_grad
        True
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"GradualUnfreezing: every is {every!r}; expected an integer of 1 or more"
            )
        self._model, self._every, self._steps = model, every, 0
        self._set()

    @property
    def done(self) -> bool:
        """Whether all parts train."""
        return self._layers() == len(parts(self._model)) - 1

    def step(self) -> Strategy:
        """Let the next parts train too; once all do, nothing changes.

        Returns:
            What trains now.
        """
        self._steps += 1
        return self._set()

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, for a checkpoint."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was, and set `requires_grad` accordingly.

        Args:
            state: from `state_dict`.
        """
        self._steps = int(state["steps"])
        self._set()

    def _layers(self) -> int:
        return min(self._steps * self._every, len(parts(self._model)) - 1)

    def _set(self) -> Strategy:
        return strategy(self._model, "partial", self._layers())
