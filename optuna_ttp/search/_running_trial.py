"""Whether a trial under way still has a chance, by its own curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import probability_below
from optuna_ttp.study import best_depth
from optuna_ttp.study import incumbent
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import is_thrown_back
from optuna_ttp.study import lost_steps
from optuna_ttp.study import measured_seconds
from optuna_ttp.study import observation_of
from optuna_ttp.study import observed_curve
from optuna_ttp.study import observed_steps
from optuna_ttp.study import prediction_of
from optuna_ttp.study import progress_to_target
from optuna_ttp.study import trials_of


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.calibration import LossCurve
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._goal import Goal
    from optuna_ttp.search._pruner_rules import PrunerRules
    from optuna_ttp.search._pruner_rules import RunningTrialRules
    from optuna_ttp.study import PredictionRecord


@dataclass(frozen=True)
class StopReason:
    """Why a trial under way is given up.

    Attributes:
        reason:
            In words.
        sure:
            Whether it is what was seen, and no prediction.
        steps_left:
            That it would have taken.
        log_sd:
            Standard deviation of their logarithm.
    """

    reason: str
    sure: bool
    steps_left: float
    log_sd: float


@dataclass(frozen=True)
class _Fastest:
    """The fastest trial so far.

    Attributes:
        number:
            Of the trial.
        steps:
            Of the running trial that take as long.
        measured:
            Whether that is what their steps were seen to take, and no prediction.
    """

    number: int
    steps: float
    measured: bool


@dataclass(frozen=True, eq=False)
class RunningTrialJudge:
    """Judges trials under way.

    Attributes:
        predictor:
            As trials have corrected it.
        goal:
            Of the search.
        rules:
            Of the pruner.
    """

    predictor: SearchPredictor
    goal: Goal
    rules: PrunerRules

    def stop_reason(
        self, study: Study, trial: FrozenTrial, prediction: PredictionRecord, curve: LossCurve
    ) -> StopReason | None:
        """Tell why a trial has no chance.

        Args:
            study:
                The study.
            trial:
                The running trial.
            prediction:
                What was written down of its prediction.
            curve:
                Its training loss so far.

        Returns:
            Why, or :obj:`None` where it has one, or nobody knows.
        """
        observation = observation_of(trial, prediction, InitialLoss.of(self.predictor))
        if not isinstance(observation, Observation):
            return None
        budget = float(self.goal.steps(self.predictor, np.array(prediction.batch_size)))
        if abs(budget - curve.n_steps) <= self.rules.running_trial.nearly_done * budget:
            # There is nothing to save any more.
            return None
        trials = trials_of(study, (TrialState.COMPLETE,))
        depth, aim = self._aim(study, trials)
        here = -math.log(curve.losses[-1] / self.predictor.initial_loss)
        if here < depth < math.inf:
            fastest = self._fastest(study, trials, observation)
            stop_reason = self._too_late(observation, prediction, (depth, aim), budget, fastest)
            if stop_reason is not None:
                return stop_reason
        # The first steps tell little of the last ones.
        ample = math.isinf(budget) or curve.n_steps >= self.rules.running_trial.earliest * budget
        trusted = self.predictor.calibration.trusted
        initial = self.predictor.initial_loss
        passages = observation.predicted, observation.expected
        if (
            ample
            and trusted
            and is_thrown_back(curve, *passages, initial, self.rules.running_trial.broken_training)
        ):
            reason = (
                f"after {curve.n_steps:,.0f} steps its training loss is back where it began, and "
                "was predicted to be halved in less than half of the steps since it was below"
            )
            return StopReason(reason, False, budget - curve.n_steps, 0.0)
        return None

    def _too_late(
        self,
        running: Observation,
        prediction: PredictionRecord,
        goal: tuple[float, str],
        budget: float,
        fastest: _Fastest | None,
    ) -> StopReason | None:
        """Tell why a trial does not get to a depth in time."""
        depth, aim = goal
        n_steps, limit = running.n_steps, budget
        what = f"{aim} within its budget of {budget:,.0f} steps"
        rest = self.predictor.remaining_steps(running, prediction.configuration, depth)
        if fastest is not None and fastest.steps < limit:
            limit = fastest.steps
            what = f"be faster than trial {fastest.number}, the fastest"
            told = f"{limit:,.0f} steps of this trial take as long"
            if n_steps >= limit:
                reason = f"after {n_steps:,.0f} steps it can no longer {what} ({told})"
                steps, log_sd = (math.inf, 0.0) if rest is None else rest
                return StopReason(reason, fastest.measured, min(steps, budget - n_steps), log_sd)
            what += f" ({told})"
        if (
            rest is None
            or not math.isfinite(limit)
            or n_steps < self.rules.running_trial.earliest * limit
        ):
            return None
        chance = _chance(rest, limit - n_steps)
        if chance >= self.rules.min_chance or not self.predictor.calibration.trusted:
            return None
        reason = (
            f"after {n_steps:,.0f} steps its chance to {what} is {chance:.1%}: about "
            f"{rest[0]:,.0f} steps are left"
        )
        return StopReason(reason, False, min(rest[0], max(limit - n_steps, 0.0)), rest[1])

    def _aim(self, study: Study, trials: Sequence[FrozenTrial]) -> tuple[float, str]:
        """What depth a trial under way has to reach, and in words.

        Where the objective is a metric it is infinite before a trial has completed: nobody knows
        whether the best ones reach the target.
        """
        target = self.predictor.target_depth
        depth = target if self.goal.is_time else best_depth(study, trials, self.predictor)
        if depth < target:
            return depth, "get as far as the best trials"
        return (depth if math.isinf(depth) else target), "reach the target"

    def _fastest(
        self, study: Study, trials: Sequence[FrozenTrial], running: Observation
    ) -> _Fastest | None:
        """The trial that reached the target first, and what of the running one takes as long.

        :obj:`None` where none has reached the target, or time is not what counts.
        """
        best = incumbent(study, trials)
        found: list[_Fastest] = []
        for trial in trials if self.goal.is_time else ():
            of = prediction_of(trial)
            steps = observed_steps(trial, self.predictor)
            is_best = best is not None and trial.number == best.number
            if is_best and math.isinf(steps) and progress_to_target(trial) >= 1.0:
                # It stopped at its target, which the smoothed loss of its batches lags behind.
                curve = observed_curve(trial)
                steps = steps if curve is None else curve.n_steps
            if of is None or not math.isfinite(steps):
                continue
            sizes = np.array([of.batch_size, running.batch_size])
            told = self.predictor.seconds_per_step(sizes)
            ratio, measured = float(told[0] / told[1]), bool(sizes[0] == sizes[1])
            seconds = measured_seconds(trial), running.seconds_per_step
            if min(seconds) > 0.0 and math.isfinite(sum(seconds)):
                ratio, measured = seconds[0] / seconds[1], True
            steps *= 1.0 if math.isnan(ratio) else ratio
            found.append(_Fastest(trial.number, steps, measured))
        return min(found, key=lambda f: (f.steps, f.number), default=None)


def blown_up(trial: FrozenTrial, rules: RunningTrialRules) -> StopReason | None:
    """Tell why a trial is lost whose loss is not finite any more.

    Args:
        trial:
            The running trial.
        rules:
            The tuned numbers.

    Returns:
        Why, or :obj:`None` where it is.
    """
    n_steps = lost_steps(trial)
    if n_steps < rules.n_not_finite:
        return None
    reason = f"its training loss has been infinite or NaN for {n_steps:,} steps"
    return StopReason(reason, True, math.nan, 0.0)


def _chance(rest: tuple[float, float], left: float) -> float:
    """How likely as many steps as are left are enough."""
    if left <= 0:
        return 0.0
    steps, sd = np.array([max(rest[0], 1.0)]), np.array([rest[1]])
    return float(probability_below(steps, sd, np.array([left]))[0])
