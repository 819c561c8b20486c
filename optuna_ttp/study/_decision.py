"""What the pruner decides about a trial, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Whether a trial should stop, and why.

    Example:
        >>> decision = pruner.decide(trial)
        >>> if decision.prune:
        ...     raise optuna.TrialPruned(decision.reason)

    Attributes:
        prune:
            Whether the trial should stop. A decision itself is true if it should.
        reason:
            Why it should stop, or why it may run, in words.
    """

    prune: bool
    reason: str

    def __bool__(self) -> bool:
        return self.prune
