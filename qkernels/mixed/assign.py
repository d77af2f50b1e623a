"""The best option for every layer under limits: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# HiGHS takes a limit for kept up to 1e-6; so do we, relative to the limit.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Problem:
    """What every option of every layer costs. Exactly one option of a layer is taken.

    A total is the sum of what was taken and the rest, which is there whatever is taken.

    Args:
        costs: by quantity, layer and option; not negative. An option of infinite cost is never
            taken.
        rest: by quantity, what the total holds besides.

    Example:
        >>> problem = Problem({"size": [[4, 1], [4, 2]], "error": [[0, 3], [0, 1]]}, {})
        >>> problem.solve("error", {"size": 6})
        [0, 1]
    """

    costs: Mapping[str, Sequence[Sequence[float]]]
    rest: Mapping[str, float]

    def total(self, quantity: str, choice: Sequence[int]) -> float:
        """What a choice costs.

        Args:
            quantity: one of those in `costs`.
            choice: the option taken for each layer.
        """
        taken = (options[i] for options, i in zip(self.costs[quantity], choice, strict=True))
        return self.rest.get(quantity, 0) + math.fsum(taken)

    def solve(
        self, objective: str, limits: Mapping[str, float], tie_break: str | None = None
    ) -> list[int] | None:
        """The choice of least cost that keeps the limits, or None if there is none.

        Args:
            objective: the quantity to minimise.
            limits: by quantity, the largest total.
            tie_break: a quantity to minimise among choices that are equally good.

        Raises:
            ImportError: scipy is not installed.
        """
        room = {q: limit - self.rest.get(q, 0) for q, limit in limits.items()}
        choice = self._minimise(objective, room)
        if choice is None or tie_break is None:
            return choice
        best = self.total(objective, choice) - self.rest.get(objective, 0)
        room[objective] = min(room.get(objective, math.inf), best * (1 + 1e-7))
        # The first choice, should rounding have cut off all that is as good.
        return self._minimise(tie_break, room) or choice

    def nearest(self, limits: Mapping[str, float]) -> list[int]:
        """The choice whose worst excess over its limits, relative to them, is least.

        Args:
            limits: by quantity, the largest total.
        """
        usable = self._usable({})
        rows = []
        for quantity, limit in limits.items():
            scale = abs(limit) or 1.0
            room = (limit - self.rest.get(quantity, 0)) / scale
            rows.append((self._flat(quantity, usable) / scale, room))
        objective = np.zeros(usable.size)
        solved = self._milp(objective, rows, usable, excess=True)
        assert solved is not None  # with any excess allowed there is always a choice
        return solved

    def front(self, quantity: str, objective: str, points: int) -> list[list[int]]:
        """Choices that no other beats in both quantities, from the cheapest on.

        Args:
            quantity: what limits of equal distance are set to.
            objective: what is minimised under each.
            points: how many limits.
        """
        ends = [
            self.solve(quantity, {}, tie_break=objective),
            self.solve(objective, {}, tie_break=quantity),
        ]
        low, high = (self.total(quantity, end) for end in ends if end is not None)
        found = [
            self.solve(objective, {quantity: float(limit)})
            for limit in np.linspace(low, high, points)[1:-1]
        ]
        choices = [c for c in (ends[0], *found, ends[1]) if c is not None]
        kept: list[list[int]] = []
        for choice in sorted(choices, key=lambda c: (self.total(quantity, c), c)):
            if not kept or self.total(objective, choice) < self.total(objective, kept[-1]):
                kept.append(choice)
        return kept

    def _minimise(self, objective: str, room: Mapping[str, float]) -> list[int] | None:
        """The choice of least cost in what the rest leaves of each limit."""
        if any(value < 0 for value in room.values()):
            return None
        usable = self._usable(room)
        # In units of the limit, or what is tiny beside another option would drown in tolerances.
        rows = [
            (self._flat(quantity, usable) / value, 1.0)
            for quantity, value in room.items()
            if 0 < value < math.inf
        ]
        cost = self._flat(objective, usable)
        largest = cost.max(initial=0.0) or 1.0
        # HiGHS stops at an absolute gap of 1e-6.
        return self._milp(cost / largest * 1e3, rows, usable, excess=False)

    def _usable(self, room: Mapping[str, float]) -> NDArray[np.bool_]:
        """Options that are finite and do not break a limit all by themselves."""
        usable = np.ones(sum(map(len, next(iter(self.costs.values())))), dtype=bool)
        for quantity in self.costs:
            costs = np.concatenate([np.asarray(c, float) for c in self.costs[quantity]])
            usable &= np.isfinite(costs)
            if quantity in room:
                usable &= costs <= room[quantity] * (1 + TOLERANCE)
        return usable

    def _flat(self, quantity: str, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The costs of all options in a row, 0 for those that cannot be taken."""
        costs = np.concatenate([np.asarray(c, float) for c in self.costs[quantity]])
        return np.where(usable, costs, 0.0)

    def _milp(
        self,
        objective: NDArray[np.float64],
        rows: Sequence[tuple[NDArray[np.float64], float]],
        usable: NDArray[np.bool_],
        *,
        excess: bool,
    ) -> list[int] | None:
        """Minimise over choices; with `excess`, the largest amount by which a row is exceeded."""
        milp, bounds_of, constraint = _scipy()
        sizes = [len(options) for options in next(iter(self.costs.values()))]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        count = usable.size + excess
        one_each = np.zeros((len(sizes), count))
        for layer, (start, end) in enumerate(pairwise(starts)):
            one_each[layer, start:end] = 1
        constraints = [constraint(one_each, 1, 1)]
        if rows:
            matrix = np.stack([row for row, _ in rows])
            if excess:
                matrix = np.hstack([matrix, -np.ones((len(rows), 1))])
            constraints.append(constraint(matrix, -np.inf, [limit for _, limit in rows]))
        upper = usable.astype(float)
        if excess:
            objective, upper = np.append(objective, 1.0), np.append(upper, np.inf)
        solved = milp(
            objective,
            integrality=np.append(np.ones(usable.size), [0] * excess),
            bounds=bounds_of(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if solved.x is None:
            return None
        return [int(solved.x[a:b].argmax()) for a, b in pairwise(starts)]


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError(
            "search: the best assignment is found with scipy, which is not installed; "
            "`pip install qkernels[search]` brings it"
        ) from None
    return milp, Bounds, LinearConstraint


def check_solver() -> None:
    """Refuse to start work whose end would need a solver that is missing.

    Raises:
        ImportError: scipy is not installed.
    """
    _scipy()
