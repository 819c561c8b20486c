"""What a whole study may take."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
import math
from typing import TYPE_CHECKING

from optuna.logging import get_logger
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_number
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import trials_of
from optuna_ttp.study._recorded_curve import observed_curve
from optuna_ttp.study._records import paid_seconds


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


_logger = get_logger("optuna.ttp.budget")


class StudyBudget:
    """What a whole study may take, and whether another trial is worth starting.

    As a callback it stops the study once what is left is less than the quickest trial so far is
    likely to take. Given to :class:`~optuna_ttp.TTPPruner`, it skips trials that are predicted not
    to fit into what is left; given to :class:`~optuna_ttp.TTPSampler`, it cools the weight of
    predicted cost as it is spent.

    Example:
        >>> budget = StudyBudget(seconds=3600)
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, budget=budget),
        ...     pruner=TTPPruner(predictor, budget=budget),
        ... )
        >>> study.optimize(objective, callbacks=[budget])

    Args:
        seconds:
            Seconds of all trials, added up over the workers. What was spent before the first
            trial, on a spectrum, is not in them.
        steps:
            Optimiser steps of all trials, as far as they are recorded with
            :class:`~optuna_ttp.TrainingLog`.

    Raises:
        ValueError:
            If not exactly one of them is given, or it is not positive.
    """

    def __init__(self, *, seconds: float | None = None, steps: float | None = None) -> None:
        if (seconds is None) == (steps is None):
            raise ValueError(
                f"Exactly one of seconds and steps must be given but got {seconds} and {steps}."
            )
        limit = seconds if seconds is not None else steps
        assert limit is not None
        name = "seconds" if seconds is not None else "steps"
        check_number(name, limit)
        if not limit > 0 or not math.isfinite(limit):
            raise ValueError(f"{name} must be positive and finite but got {limit}.")
        self.limit = float(limit)
        self.in_seconds = seconds is not None

    def __repr__(self) -> str:
        return f"StudyBudget({'seconds' if self.in_seconds else 'steps'}={self.limit:g})"

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Stop the study where no other trial is worth starting.

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
        """Return what is left. May be negative.

        Args:
            trials:
                Finished and running trials of the study.

        Returns:
            Seconds or steps.
        """
        return self.limit - sum(self._spent(trial) for trial in trials)

    def share_left(self, trials: Sequence[FrozenTrial]) -> float:
        """Return which share of the budget is left.

        Args:
            trials:
                Finished and running trials of the study.

        Returns:
            From zero to one.
        """
        return min(1.0, max(0.0, self.left(trials) / self.limit))

    def _spent(self, trial: FrozenTrial) -> float:
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
        """The least that a trial which completed took; nothing while none did."""
        spent = [self._spent(t) for t in trials if t.state == TrialState.COMPLETE]
        return min(spent, default=0.0)

    def fits(self, trials: Sequence[FrozenTrial], seconds: float, steps: float) -> bool:
        """Tell whether another trial fits into what is left.

        Args:
            trials:
                Finished and running trials of the study, but for the one in question.
            seconds:
                What it is predicted to take.
            steps:
                The same in steps.

        Returns:
            The answer; yes where its cost is not known.
        """
        cost = seconds if self.in_seconds else steps
        return not cost > self.left(trials)
