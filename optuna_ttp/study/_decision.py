"""The decision of the pruner about a trial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The decision of whether a trial should stop, with its reason.

    Example:
        >>> decision = pruner.decide(trial)
        >>> if decision.prune:
        ...     raise optuna.TrialPruned(decision.reason)

    Attributes:
        prune:
            True if the trial should stop. ``bool(decision)`` gives the same.
        reason:
            The reason why the trial should stop or may run, in words.
    """

    prune: bool
    reason: str

    def __bool__(self) -> bool:
        return self.prune
