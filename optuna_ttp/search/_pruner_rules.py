"""The tuned numbers of the pruner, each with the evidence for its value."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp._util.checks import check_range
from optuna_ttp.study import LostProgressRules


@dataclass(frozen=True)
class RunningTrialRules:
    """The tuned numbers that decide when a running trial is stopped.

    Attributes:
        earliest: Smallest share of the allowed steps after which a trial is stopped by its own
            curve. Zero changes one of eight searches, and no time to a good trial.
        n_not_finite: Steps in a row without a finite loss after which a trial is stopped: weights
            that are NaN remain NaN, but one such loss may come from a batch that overflowed. It
            changes no replayed search of 12 trials; without it such trials would run to their end
            (tests/search/test_running_trial.py).
        lost_progress: The rules of a loss that returned to its initial value and stays there.
    """

    earliest: float = 0.2
    n_not_finite: int = 3
    lost_progress: LostProgressRules = field(default_factory=LostProgressRules)

    def __post_init__(self) -> None:
        check_range("earliest", self.earliest, 0.0, 1.0)
        check_range("n_not_finite", self.n_not_finite, 1, kind=int)
        check_kind("lost_progress", self.lost_progress, LostProgressRules)


@dataclass(frozen=True)
class PrunerRules:
    """Settings of :class:`~optuna_ttp.TTPPruner` for experts.

    Example:
        >>> pruner = TTPPruner(predictor, goal, rules=PrunerRules(tolerance=2.0, audit=0.1))

    Args:
        tolerance:
            The factor of a trial's limit up to which its predicted steps do not count against it,
            because predictions are not exact. 1.5 by default.
        min_probability:
            Skip a trial before its first step if its probability of reaching the target within
            the limit times the tolerance is smaller. 0.5 by default.
        min_probability_at_first:
            The probability that replaces ``min_probability`` if it is smaller, with
            :class:`~optuna_ttp.FastestToTarget` while no trial has completed: a trial that is
            unlikely to reach the target may be the only one that does. 0.2 by default. Changes
            nothing on the recorded tasks; guards a target that few trials reach.
        max_cost_ratio:
            Skip a trial if its predicted seconds are probably more than this factor times the best
            trial's predicted seconds. No limit by default.
        min_chance:
            Stop a running trial if its chance of success is smaller. 0.02 by default; zero never
            stops one.
        max_consecutive:
            The number of skipped trials in a row after which one trial runs regardless, so that a
            study always has trials that run. Ten by default.
        sooner:
            The divisor of ``max_consecutive`` after a trial that ran in spite of its prediction
            made the progress ``half_way``. Three by default. Changes nothing on the recorded
            tasks; guards a study with wrong predictions, as ``n_refuting`` and ``half_way`` do.
        audit:
            The share of the trials to be skipped that run anyway, drawn at random, so that
            :func:`~optuna_ttp.report` can tell how often skipping is wrong. Zero by default.
        n_refuting:
            A reason to skip is ignored once this many trials that ran in spite of it reached the
            target, and more than half of the newest ones. Two by default.
        most_refuting:
            The number of newest trials that count for that. Ten by default; limits the cost.
        half_way:
            The share of the progress to the target from which ``sooner`` applies. 0.5 by default.
        n_skipped_to_warn:
            The least number of trials, all of them skipped, at which a warning says that
            predictions are still unchecked. Five by default. It steers no trial, and matters only
            if ``max_consecutive`` is smaller: two or three skipped trials are no reason to warn.
        running_trial:
            The numbers that decide when a running trial is stopped.

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
    half_way: float = 0.5
    n_skipped_to_warn: int = 5
    running_trial: RunningTrialRules = field(default_factory=RunningTrialRules)

    def __post_init__(self) -> None:
        ratio = 1.0 if self.max_cost_ratio is None else self.max_cost_ratio
        for name, value in (("tolerance", self.tolerance), ("max_cost_ratio", ratio)):
            check_number(name, value)
            if not 1.0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 1 but got {value}.")
        for name in ("min_probability", "min_probability_at_first", "min_chance", "audit"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("half_way", self.half_way)
        counts = ("max_consecutive", "sooner", "n_refuting", "most_refuting")
        for name in (*counts, "n_skipped_to_warn"):
            check_range(name, getattr(self, name), 1, kind=int)
        check_kind("running_trial", self.running_trial, RunningTrialRules)
