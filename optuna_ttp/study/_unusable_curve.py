"""Why a training-loss curve cannot be learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna_ttp.study._attributes import Word


class CurveFault(Word):
    """What is wrong with a training-loss curve. A study warns once of each."""

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
    """Why a curve, or part of it, cannot be learned from.

    Attributes:
        kind: What is wrong with the curve.
        reason: The same in words.
        what: What is left out, with a place for the number of the trial. The training-loss curve
            by default.
    """

    kind: CurveFault
    reason: str
    what: str = "The training-loss curve of trial {} is left out"

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored in place of a curve."""
        return {"unusable": self.reason, "kind": self.kind.value}
