"""The target of training: a value that a loss or an accuracy has to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats


Quantity = Literal["loss", "accuracy", "smoothed_loss", "validation_loss", "validation_accuracy"]


@dataclass(frozen=True)
class Target:
    """A value that a quantity must reach, or a distance to its last value that it must reach."""

    quantity: Quantity
    """The observed quantity. A loss must fall to the value, an accuracy must rise to it."""
    value: float
    """The value to reach. If ``settled`` is set, a share of the quantity's whole change."""
    settled: bool = False
    """True for the training time ``T_eps`` of the paper: the first step at which the quantity is
    within ``eps = value * |L_0 - L_T|`` of its value at the last step ``T`` of the curve (Zancato
    et al., NeurIPS 2020, algorithm 1, which leaves open to what the percentage refers). False by
    default."""

    @property
    def is_loss(self) -> bool:
        """True if the quantity is a loss, which must fall to the value."""
        return self.quantity.endswith("loss")

    def reached(self, values: Floats) -> Booleans:
        """Return a mask of the values, of any shape, that have reached the target.

        It is false everywhere if ``settled`` is set, since the end of the curve is not known.
        """
        if self.settled:
            return np.zeros(np.shape(values), dtype=bool)
        with np.errstate(invalid="ignore"):
            return values <= self.value if self.is_loss else values >= self.value

    def first_passage(self, steps: Floats, values: Floats) -> float:
        """Return the first whole step at which a curve ``(T,)`` is at its target.

        This is :meth:`crossing`, rounded up; infinity if the target is not reached.
        """
        return float(np.ceil(self.crossing(steps, values) - 1e-9))

    def crossing(self, steps: Floats, values: Floats) -> float:
        """Return the step, a real number, at which a curve reaches its target, or infinity.

        Steps ``(T,)`` ascend, values ``(T,)`` are NaN if they are unknown. Between two points of
        the curve the quantity (the logarithm of a loss) is interpolated linearly in the step.
        """
        if self.settled:
            return self._settling(steps, values)
        hits = np.flatnonzero(self.reached(values))
        if len(hits) == 0:
            return float("inf")
        last = int(hits[0])
        if last == 0:
            return float(steps[0])
        before, after, goal = values[last - 1], values[last], self.value
        if not np.isfinite(before):
            return float(steps[last])
        if self.is_loss and after > 0:
            before, after, goal = np.log(before), np.log(after), np.log(goal)
        share = (goal - before) / (after - before) if after != before else 1.0
        return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))

    def _settling(self, steps: Floats, values: Floats) -> float:
        """Return ``T_eps``, see ``settled``; infinity for fewer than two known values."""
        known = np.flatnonzero(np.isfinite(values))
        if len(known) < 2:
            return float("inf")
        steps, values = steps[known], values[known]
        whole = np.arange(steps[0], steps[-1] + 1)
        curve = np.interp(whole, steps, values)
        epsilon = self.value * abs(curve[0] - curve[-1])
        return float(whole[np.argmax(np.abs(curve - curve[-1]) <= epsilon)])
