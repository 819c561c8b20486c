"""The reasons why a training-loss curve cannot be used to correct predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna_ttp.study._attributes import Word


class CurveFault(Word):
    """The fault of a training-loss curve. A study warns once of each."""

    EMPTY = "empty"
    SHORT = "short"
    INFINITE = "infinite"
    GAPS = "gaps"
    NEGATIVE = "negative"
    VALUES = "values"
    STEPS = "steps"
    JUMP = "jump"
    LATE = "late"
    SAMPLES = "samples"
    LOW = "low"
    HIGH = "high"
    SUM = "sum"
    NAMES = "names"
    SECOND = "second"
    FINISHED = "finished"


@dataclass(frozen=True)
class UnusableCurve:
    """The reason why a curve, or part of it, cannot be used to correct predictions.

    Attributes:
        kind: The fault of the curve.
        reason: The fault in words.
        what: The beginning of the warning: the part that is left out, with ``{}`` for the number
            of the trial. The whole training-loss curve by default.
    """

    kind: CurveFault
    reason: str
    what: str = "The training-loss curve of trial {} is left out"

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored in place of a curve."""
        return {"unusable": self.reason, "kind": self.kind.value}
