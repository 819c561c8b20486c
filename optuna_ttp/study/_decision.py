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
            Whether to stop it.
        reason:
            Why, or why not, in words.
    """

    prune: bool
    reason: str

    def __bool__(self) -> bool:
        return self.prune
