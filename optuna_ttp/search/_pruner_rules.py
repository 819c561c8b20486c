"""The tuned numbers of the pruner, each with what it was chosen on."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp.study import ThrownBackRules


@dataclass(frozen=True)
class RunningTrialRules:
    """The tuned numbers behind whether a running trial still has a chance.

    Attributes:
        earliest: No trial is stopped by its own curve before so large a share of the steps that
            it may take. Not ablated yet.
        nearly_done: A trial runs to its end where so large a share of its steps is left, or was
            too much: there is nothing to save any more. Not ablated yet.
        n_not_finite: Steps without a finite loss after which none is to be expected: weights that
            are NaN stay it, a single loss may be that of a batch that overflowed.
        thrown_back: When the loss is back where it began and will not come down.
    """

    earliest: float = 0.2
    nearly_done: float = 0.05
    n_not_finite: int = 3
    thrown_back: ThrownBackRules = field(default_factory=ThrownBackRules)


@dataclass(frozen=True)
class PrunerRules:
    """Settings of :class:`~optuna_ttp.TTPPruner` for experts.

    Example:
        >>> pruner = TTPPruner(predictor, goal, rules=PrunerRules(tolerance=2.0, audit=0.1))

    Args:
        tolerance:
            Skip only what is predicted to take more than so many times a trial's limit, because
            predictions are not exact. 1.5 by default.
        min_probability:
            Skip what reaches the target within that with a smaller probability, before its first
            step. 0.5 by default: what is more likely to miss it.
        min_probability_at_first:
            The same with :class:`~optuna_ttp.FastestToTarget` while no trial has completed. 0.2
            by default: trials with at least 20 % probability are not skipped for this reason,
            because one of them may be the only one that gets to the target. Not ablated yet.
        max_cost_ratio:
            Skip what is predicted to take more than so many times what the best trial was
            predicted to take. No limit by default.
        min_chance:
            Stop running trials whose chance is smaller. 0.02 by default; zero never does.
        max_consecutive:
            After so many skipped trials in a row one runs regardless, so that a study cannot
            starve. Ten by default.
        sooner:
            After a trial that ran in spite of its prediction and got half of the way to the
            target, the next one's turn comes so many times as soon. Three by default; not ablated
            yet.
        audit:
            The share of those that were to be skipped which run anyway, drawn at random, so that
            :func:`~optuna_ttp.report` can tell how often skipping is wrong. None by default.
        n_refuting:
            A reason to skip counts no more once so many trials that it was given for reached the
            target, more than half of the newest that ran. Two by default; not ablated yet.
        most_refuting:
            How many of the newest count for that. Ten by default; not ablated yet.
        nearly_reached:
            So large a share of the way to the target counts as reached. 0.9 by default; not
            ablated yet.
        half_way:
            So large a share of the way makes the next turn come sooner. 0.5 by default; not
            ablated yet.
        n_skipped_to_warn:
            Where so many trials were all skipped, a warning says that nobody knows whether
            predictions are right. Five by default.
        running_trial:
            The numbers behind whether a running trial still has a chance.

    Raises:
        ValueError:
            If a setting is out of its range.
        TypeError:
            If a setting is of the wrong kind.
    """

    tolerance: float = 1.5
    min_probability: float = 0.5
    min_probability_at_first: float = 0.2
    max_cost_ratio: float | None = None
    min_chance: float = 0.02
    max_consecutive: int = 10
    sooner: int = 3
    audit: float = 0.0
    n_refuting: int = 2
    most_refuting: int = 10
    nearly_reached: float = 0.9
    half_way: float = 0.5
    n_skipped_to_warn: int = 5
    running_trial: RunningTrialRules = field(default_factory=RunningTrialRules)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "running_trial" and (name, value) != ("max_cost_ratio", None):
                check_number(name, value)
        if not 1 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be finite and at least 1 but got {self.tolerance}.")
        for name in ("min_probability", "min_probability_at_first", "min_chance", "audit"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1] but got {share}.")
        if self.max_cost_ratio is not None and not 1.0 <= self.max_cost_ratio < math.inf:
            raise ValueError(
                f"max_cost_ratio must be finite and at least 1 but got {self.max_cost_ratio}."
            )
        for name in ("max_consecutive", "sooner", "n_refuting", "most_refuting"):
            check_kind(name, getattr(self, name), int)
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 but got {getattr(self, name)}.")
        check_kind("running_trial", self.running_trial, RunningTrialRules)
