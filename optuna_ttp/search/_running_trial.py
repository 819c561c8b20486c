"""The check of whether a running trial can still succeed, by its own training-loss curve."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from optuna_ttp._util.words import counted
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import probability_below
from optuna_ttp.search._fastest_trial import fastest_trial
from optuna_ttp.study import best_depth
from optuna_ttp.study import has_lost_progress
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import lost_steps
from optuna_ttp.study import observation_of
from optuna_ttp.study import trials_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.calibration import LossCurve
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._goal import Goal
    from optuna_ttp.search._pruner_rules import PrunerRules
    from optuna_ttp.study import PredictionRecord


@dataclass(frozen=True)
class StopReason:
    """The reason why a running trial is stopped.

    Attributes:
        text: The reason in words.
        is_observed: True if the reason is an observation, False if it is a prediction.
        steps_left: The predicted steps that the trial would still have taken; NaN if unknown.
        log_sd: Standard deviation of the logarithm of ``steps_left``.
    """

    text: str
    is_observed: bool
    steps_left: float
    log_sd: float


@dataclass(frozen=True)
class _Limit:
    """The aim of a running trial, and the number of steps in which it must be reached.

    Attributes:
        steps: The number of steps.
        text: The aim, in words.
        note: The origin of the number of steps, in words; empty if it is the trial's budget.
        is_measured: True if the number of steps is an observation, False if it is predicted.
    """

    steps: float
    text: str
    note: str = ""
    is_measured: bool = False


def lost_for_good(trial: FrozenTrial, rules: PrunerRules) -> StopReason | None:
    """Return a stop reason if a trial's last losses were not finite for several steps, or None."""
    n_steps = lost_steps(trial)
    if n_steps < rules.running_trial.n_not_finite:
        return None
    text = f"its training loss has been infinite or NaN for {counted(n_steps, 'step')}"
    return StopReason(text, True, math.nan, 0.0)


@dataclass(frozen=True, eq=False)
class RunningTrialCheck:
    """Checks whether running trials of a study can still succeed.

    Attributes:
        study: The study.
        predictor: The predictor as trials have corrected it.
        goal: The goal of the search.
        rules: The rules of the pruner.
    """

    study: Study
    predictor: SearchPredictor
    goal: Goal
    rules: PrunerRules

    def stop_reason(
        self, trial: FrozenTrial, prediction: PredictionRecord, curve: LossCurve
    ) -> StopReason | None:
        """Return why a trial has no chance to succeed, or None if it has one or this is unknown.

        ``prediction`` was made before the trial, ``curve`` is its training-loss curve so far. The
        result is None close to the end of its budget.
        """
        running = observation_of(trial, prediction, InitialLoss.of(self.predictor))
        if not isinstance(running, Observation):
            return None
        budget = float(self.goal.steps(self.predictor, np.array(prediction.batch_size)))
        if curve.n_steps == budget:
            return None
        trials = trials_of(self.study, (TrialState.COMPLETE,))
        depth, aim = self._aim(trials)
        depth_now = -math.log(curve.losses[-1] / self.predictor.initial_loss)
        reason = None
        if depth_now < depth < math.inf:
            limit = self._limit(trials, running, budget, aim)
            reason = self._too_late(running, prediction, depth, limit, budget)
        return reason or self._lost_progress(running, curve, budget)

    def _aim(self, trials: Sequence[FrozenTrial]) -> tuple[float, str]:
        """Return the depth that a running trial has to reach, and that aim in words.

        The depth is the logarithm of initial loss over loss: the target's, or for a metric that
        of the best ``trials`` if it is smaller. For a metric it is infinite, and stops no trial,
        before a trial with a curve has completed.
        """
        target = self.predictor.target_depth
        if self.goal.is_time:
            return target, "reach the target"
        depth = best_depth(self.study, trials, self.predictor)
        if depth < target:
            return depth, "get as far as the best trials"
        return (depth if math.isinf(depth) else target), "reach the target"

    def _limit(
        self, trials: Sequence[FrozenTrial], running: Observation, budget: float, aim: str
    ) -> _Limit:
        """Return a trial's limit: its budget, or for a time the fastest trial's steps if fewer."""
        limit = _Limit(budget, f"{aim} within its budget of {counted(budget, 'step')}")
        if not self.goal.is_time:
            return limit
        fastest = fastest_trial(self.study, trials, running, self.predictor)
        if fastest is None or not fastest.steps < budget:
            return limit
        text = f"be faster than trial {fastest.number}, the fastest"
        note = f" ({counted(fastest.steps, 'step')} of this trial take as long)"
        return _Limit(fastest.steps, text, note, fastest.is_measured)

    def _too_late(
        self,
        running: Observation,
        prediction: PredictionRecord,
        depth: float,
        limit: _Limit,
        budget: float,
    ) -> StopReason | None:
        """Return why a trial will not reach a depth within its limit of steps, or None.

        Either it has already taken longer than the fastest trial, or the chance by its predicted
        remaining steps is below ``rules.min_chance`` and predictions are trusted.
        """
        n_steps = running.n_steps
        remaining = self.predictor.remaining_steps(running, prediction.configuration, depth)
        if limit.note and n_steps >= limit.steps:
            text = f"after {counted(n_steps, 'step')} it can no longer {limit.text}{limit.note}"
            steps, log_sd = (math.inf, 0.0) if remaining is None else remaining
            steps_left = min(steps, budget - n_steps)
            return StopReason(text, limit.is_measured, steps_left, log_sd)
        earliest = self.rules.running_trial.earliest * limit.steps
        if remaining is None or not math.isfinite(limit.steps) or n_steps < earliest:
            return None
        chance = _chance(remaining, limit.steps - n_steps)
        if chance >= self.rules.min_chance or not self.predictor.calibration.trusted:
            return None
        text = (
            f"after {counted(n_steps, 'step')} its chance to {limit.text}{limit.note} is "
            f"{chance:.1%}: about {remaining[0]:,.0f} steps are left"
        )
        steps_left = min(remaining[0], max(limit.steps - n_steps, 0.0))
        return StopReason(text, False, steps_left, remaining[1])

    def _lost_progress(
        self, running: Observation, curve: LossCurve, budget: float
    ) -> StopReason | None:
        """Return a stop reason if a trial's loss is back at its initial value, else None.

        It is None early in the budget, and while predictions are not trusted.
        """
        early = curve.n_steps < self.rules.running_trial.earliest * budget
        if (early and math.isfinite(budget)) or not self.predictor.calibration.trusted:
            return None
        initial_loss = self.predictor.initial_loss
        rules = self.rules.running_trial.lost_progress
        if not has_lost_progress(curve, running.predicted, running.expected, initial_loss, rules):
            return None
        text = (
            f"after {counted(curve.n_steps, 'step')} its training loss is back where it began, "
            "and was predicted to be halved in less than half of the steps since it was below"
        )
        return StopReason(text, False, budget - curve.n_steps, 0.0)


def _chance(remaining: tuple[float, float], steps: float) -> float:
    """Return the probability that a trial needs at most ``steps`` further steps.

    ``remaining`` has the predicted steps and the standard deviation of their logarithm.
    """
    if steps <= 0:
        return 0.0
    predicted, sd = np.array([max(remaining[0], 1.0)]), np.array([remaining[1]])
    return float(probability_below(predicted, sd, np.array([steps]))[0])
