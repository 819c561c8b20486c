"""The predicted outcome of training."""

from __future__ import annotations

from enum import Enum


class Outcome(str, Enum):
    """The predicted outcome of a trial; equal to the string that it stands for.

    Example:
        >>> predictor.predict(learning_rate=0.01, batch_size=32).outcome == Outcome.CONVERGES
        True

    Attributes:
        CONVERGES:
            The target is reached within the horizon.
        DIVERGES:
            The loss grows without bound, or never recovers from a spike.
        NOT_REACHED:
            The target is not reached within the horizon.
    """

    CONVERGES = "converges"
    DIVERGES = "diverges"
    NOT_REACHED = "not_reached"

    def __str__(self) -> str:
        return str(self.value)
