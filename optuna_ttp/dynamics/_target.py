"""What counts as done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Target:
    """Reach a training loss at or below, or a training accuracy at or above, a value.

    Attributes:
        quantity:
            ``"loss"`` or ``"accuracy"``.
        value:
            The value to reach.
    """

    quantity: Literal["loss", "accuracy"]
    value: float

    def reached(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell where values of the quantity, of any shape, have reached the target."""
        with np.errstate(invalid="ignore"):
            return values <= self.value if self.quantity == "loss" else values >= self.value

    def first_passage(self, steps: NDArray[np.float64], values: NDArray[np.float64]) -> float:
        """Return the first step at which a curve is at its target.

        Between two points of the curve the quantity (the logarithm of a loss) is interpolated
        linearly in the step, and the passage is rounded up to a whole step.

        Args:
            steps:
                Ascending, of shape ``(T,)``.
            values:
                Of shape ``(T,)``; NaN where nothing is known.

        Returns:
            The step; infinity where the target is not reached.
        """
        hits = np.flatnonzero(self.reached(values))
        if len(hits) == 0:
            return float("inf")
        last = int(hits[0])
        if last == 0:
            return float(steps[0])
        before, after, goal = values[last - 1], values[last], self.value
        if not np.isfinite(before):
            return float(steps[last])
        if self.quantity == "loss" and after > 0:
            before, after, goal = np.log(before), np.log(after), np.log(goal)
        share = (goal - before) / (after - before) if after != before else 1.0
        passage = steps[last - 1] + share * (steps[last] - steps[last - 1])
        return float(np.ceil(passage - 1e-9))
