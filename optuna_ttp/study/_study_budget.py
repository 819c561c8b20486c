"""The budget of a whole study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
import math
from typing import TYPE_CHECKING

from optuna.logging import get_logger
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_number
from optuna_ttp.study._curve_record import observed_curve
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import trials_of
from optuna_ttp.study._trial_record import paid_seconds


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


_logger = get_logger("optuna.ttp.budget")


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyBudget:
    """The budget of all trials of a study, in seconds or in optimiser steps.

    As a callback it stops the study once less is left than the quickest completed trial took. As
    part of the goal of a search it makes :class:`~optuna_ttp.TTPPruner` skip trials whose
    predicted cost exceeds the rest of the budget, and :class:`~optuna_ttp.TTPSampler` give less
    weight to the predicted cost as the rest becomes smaller.

    Example:
        >>> budget = StudyBudget(seconds=3600)
        >>> goal = BestMetric(max_epochs=3, study_budget=budget)
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, goal), pruner=TTPPruner(predictor, goal)
        ... )
        >>> study.optimize(objective, callbacks=[budget])

    Args:
        seconds:
            The sum of the seconds of all trials of all workers. Seconds before the first trial, as
            for a spectrum, do not count.
        steps:
            The sum of the optimiser steps of all trials that are recorded with
            :class:`~optuna_ttp.TrainingLog`.

    Raises:
        ValueError:
            If not exactly one of the two is given, or it is not positive and finite.
        TypeError:
            If the given one is not a number.
    """

    seconds: float | None = None
    steps: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(
                "Exactly one of seconds and steps must be given but got "
                f"{self.seconds} and {self.steps}."
            )
        name, limit = ("seconds", self.seconds) if self.in_seconds else ("steps", self.steps)
        check_number(name, limit)
        if not self.limit > 0 or not math.isfinite(self.limit):
            raise ValueError(f"{name} must be positive and finite but got {limit}.")

    @property
    def in_seconds(self) -> bool:
        """True if the budget is in seconds, False if it is in steps."""
        return self.seconds is not None

    @property
    def limit(self) -> float:
        """The budget, in seconds or steps."""
        limit = self.steps if self.seconds is None else self.seconds
        assert limit is not None
        return float(limit)

    def __repr__(self) -> str:
        return f"StudyBudget({'seconds' if self.in_seconds else 'steps'}={self.limit:g})"

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Stop the study if nothing is left, or less than the quickest completed trial took.

        Args:
            study:
                The study.
            trial:
                The trial that has just finished.
        """
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        left, least = self.left(trials), self._least(trials)
        if left <= 0.0 or left < least:
            unit = "s" if self.in_seconds else "steps"
            _logger.info(
                f"The study stops: {max(left, 0.0):.3g} {unit} of {self.limit:.3g} are left, and "
                f"the quickest trial took {least:.3g}."
            )
            study.stop()

    def left(self, trials: Sequence[FrozenTrial]) -> float:
        """Return the rest of the budget.

        Args:
            trials:
                Finished and running trials of the study.

        Returns:
            The rest in seconds or steps, negative if more was spent.
        """
        return self.limit - sum(self._spent(trial) for trial in trials)

    def share_left(self, trials: Sequence[FrozenTrial]) -> float:
        """Return the rest of the budget as a share of the budget.

        Args:
            trials:
                Finished and running trials of the study.

        Returns:
            The share, from zero to one.
        """
        return min(1.0, max(0.0, self.left(trials) / self.limit))

    def _spent(self, trial: FrozenTrial) -> float:
        """Return the seconds or steps that a trial has taken so far, zero if they are unknown."""
        if not self.in_seconds:
            curve = observed_curve(trial)
            return 0.0 if curve is None else float(curve.n_steps)
        if trial.state != TrialState.RUNNING:
            paid = paid_seconds(trial)
            return paid if math.isfinite(paid) else 0.0
        if trial.datetime_start is None:
            return 0.0
        now = datetime.now(trial.datetime_start.tzinfo)
        return max(0.0, (now - trial.datetime_start).total_seconds())

    def _least(self, trials: Sequence[FrozenTrial]) -> float:
        """Return the fewest seconds or steps of a completed trial, zero if none has completed."""
        spent = [self._spent(t) for t in trials if t.state == TrialState.COMPLETE]
        return min(spent, default=0.0)

    def fits(self, trials: Sequence[FrozenTrial], seconds: float, steps: float) -> bool:
        """Return whether another trial fits into the rest of the budget.

        Args:
            trials:
                Finished and running trials of the study, without the other trial.
            seconds:
                The predicted seconds of the other trial, NaN if unknown.
            steps:
                The predicted steps of the other trial, NaN if unknown.

        Returns:
            True if the trial fits, or if its cost is unknown.
        """
        cost = seconds if self.in_seconds else steps
        return not cost > self.left(trials)
