"""Why a training-loss curve cannot be learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UnusableCurve:
    """Why a curve, or part of it, cannot be learned from.

    Attributes:
        kind:
            As a word. Of each kind a study warns once.
        reason:
            In words.
        what:
            What is left out, with a place for the number of the trial. The training-loss curve by
            default.
    """

    kind: str
    reason: str
    what: str = "The training-loss curve of trial {} is left out"

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored in place of a curve."""
        return {"unusable": self.reason, "kind": self.kind}
