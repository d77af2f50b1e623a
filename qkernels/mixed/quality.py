"""How good a model's answers are, as a number that adds up over its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

SQNR = "sqnr"


@dataclass(frozen=True)
class Quality:
    """What is kept of the float model's answers, and its opposite, which adds up over layers.

    SQNR in dB has the noise over the signal for its opposite: errors of different layers are
    nearly uncorrelated, so that their powers add. A metric of the user's has what it gets worse by.

    Args:
        name: "sqnr", or what the metric is called.
        reference: the float model's metric; inf dB of SQNR.
        lower_is_better: a metric such as a loss.

    Example:
        >>> Quality().value(0.001)
        30.0
        >>> Quality("accuracy", 0.75).damage(0.5)
        0.25
    """

    name: str = SQNR
    reference: float = math.inf
    lower_is_better: bool = False

    def value(self, damage: float) -> float:
        """The quality of a model.

        Args:
            damage: summed over what makes it worse.
        """
        if self.name == SQNR:
            return math.inf if damage <= 0 else -10 * math.log10(damage)
        return self.reference + (damage if self.lower_is_better else -damage)

    def damage(self, value: float) -> float:
        """The damage that leaves a quality.

        Args:
            value: SQNR in dB, or the metric.
        """
        if self.name == SQNR:
            return 10 ** (-value / 10)
        return (value - self.reference) * (1 if self.lower_is_better else -1)

    def text(self, value: float) -> str:
        """A quality for people.

        Args:
            value: SQNR in dB, or the metric.
        """
        if self.name != SQNR:
            return f"{value:.4g}"
        return "identical" if value == math.inf else f"{value:.1f} dB"

    @property
    def title(self) -> str:
        """What to call it in a table."""
        return "SQNR" if self.name == SQNR else self.name
