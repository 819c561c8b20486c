"""Whether a trial under way still has a chance, by its own curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from optuna_ttp._best_trials import best_depth
from optuna_ttp._optuna_compat import trials_of
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from optuna_ttp.observed_trial import InitialLoss
from optuna_ttp.observed_trial import observation_of
from optuna_ttp.recorded_curve import observed_curve
from optuna_ttp.recorded_curve import observed_steps
from optuna_ttp.recorded_curve import way_gone
from optuna_ttp.trial_entries import entry
from optuna_ttp.trial_entries import PREDICTION
from optuna_ttp.uncertainty import probability_below


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.loss_curve import LossCurve
    from optuna_ttp.predictor import TrainingTimePredictor
    from optuna_ttp.trial_budget import TrialBudget


# No trial is stopped by its own curve before so large a share of the steps that it may take.
_EARLIEST = 0.2
# A trial that has come so much of the way, as a logarithm of the loss, has reached the target.
MOST_OF_THE_WAY = 0.9
# Training has been thrown back to where it began while its loss is above so much of the initial
# one, and so many times its lowest one. It is given up for lost after so many times the steps in
# which it was predicted to be halved, and as many as it took to get there. 67 of the 1,608
# recorded runs of benchmarks/search are, at half of their epochs; none of them reaches the target
# all the same, and none is close to the best.
_NOT_LEARNED = 0.9
_RISEN = 1.1
_AMPLE = 2.0
_HALVED = math.log(2.0) + 1e-9
# Steps without a finite loss after which none is to be expected.
_SURELY_LOST = 3


@dataclass(frozen=True)
class Setback:
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


@dataclass(frozen=True, eq=False)
class UnderWay:
    """Judges trials under way.

    Attributes:
        predictor:
            As trials have corrected it.
        budget:
            Of a trial.
        timed:
            Whether the objective is the time to the target.
        min_chance:
            Trials whose chance is smaller are given up.
    """

    predictor: TrainingTimePredictor
    budget: TrialBudget
    timed: bool
    min_chance: float

    def setback(
        self, study: Study, trial: FrozenTrial, prediction: dict[str, Any], curve: LossCurve
    ) -> Setback | None:
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
        size = prediction["batch_size"]
        budget = float(self.budget.steps(self.predictor, np.array(size)))
        if curve.diverged:
            # Weights that are NaN stay it. A single loss may be that of a batch that overflowed.
            last = float(curve.steps[-1]) if len(curve.steps) else -1.0
            if curve.n_steps - 1 - last < _SURELY_LOST:
                return None
            reason = f"after {curve.n_steps:,.0f} steps its training loss stays infinite or NaN"
            return Setback(reason, True, budget - curve.n_steps, 0.0)
        observation = observation_of(trial, prediction, InitialLoss.of(self.predictor))
        if not isinstance(observation, Observation):
            return None
        trials = trials_of(study, (TrialState.COMPLETE,))
        depth, aim = self._aim(study, trials)
        here = -math.log(curve.losses[-1] / self.predictor.initial_loss)
        if here < depth < math.inf:
            setback = self._too_late(observation, prediction, depth, aim, budget, trials)
            if setback is not None:
                return setback
        # The first steps tell little of the last ones.
        ample = math.isinf(budget) or curve.n_steps >= _EARLIEST * budget
        trusted = self.predictor.calibration.trusted
        if ample and trusted and _is_thrown_back(curve, observation, self.predictor.initial_loss):
            reason = (
                f"after {curve.n_steps:,.0f} steps its training loss is back where it began, and "
                "was predicted to be halved in less than half of the steps since it was below"
            )
            return Setback(reason, False, budget - curve.n_steps, 0.0)
        return None

    def _too_late(
        self,
        running: Observation,
        prediction: dict[str, Any],
        depth: float,
        aim: str,
        budget: float,
        trials: Sequence[FrozenTrial],
    ) -> Setback | None:
        """Tell why a trial does not get to a depth in time."""
        n_steps, limit = running.n_steps, budget
        what = f"{aim} within its budget of {budget:,.0f} steps"
        rest = self.predictor.remaining_steps(running, _configuration(prediction), depth)
        fastest, number = self._fastest(trials, prediction["batch_size"])
        if fastest < limit:
            limit = fastest
            what = f"be faster than trial {number}, the fastest"
            told = f"{fastest:,.0f} steps of this batch size take as long"
            if n_steps >= fastest:
                reason = f"after {n_steps:,.0f} steps it can no longer {what} ({told})"
                steps, log_sd = (math.inf, 0.0) if rest is None else rest
                return Setback(reason, True, min(steps, budget - n_steps), log_sd)
            what += f" ({told})"
        if rest is None or not math.isfinite(limit) or n_steps < _EARLIEST * limit:
            return None
        chance = _chance(rest, limit - n_steps)
        if chance >= self.min_chance or not self.predictor.calibration.trusted:
            return None
        reason = (
            f"after {n_steps:,.0f} steps its chance to {what} is {chance:.1%}: about "
            f"{rest[0]:,.0f} steps are left"
        )
        return Setback(reason, False, min(rest[0], max(limit - n_steps, 0.0)), rest[1])

    def _aim(self, study: Study, trials: Sequence[FrozenTrial]) -> tuple[float, str]:
        """What depth a trial under way has to reach, and in words.

        Where the objective is a metric it is infinite before a trial has completed: nobody knows
        whether the best ones reach the target.
        """
        target = self.predictor.target_depth
        depth = target if self.timed else best_depth(study, trials, self.predictor)
        if depth < target:
            return depth, "get as far as the best trials"
        return (depth if math.isinf(depth) else target), "reach the target"

    def _fastest(self, trials: Sequence[FrozenTrial], batch_size: int) -> tuple[float, int]:
        """Steps in which a trial with this batch size would be as fast as the best one, and that.

        Infinity where none has reached the target, or time is not what counts.
        """
        fastest = (math.inf, -1)
        for trial in trials if self.timed else ():
            of = entry(trial, PREDICTION)
            if of is None:
                continue
            steps = observed_steps(trial, self.predictor)
            curve = observed_curve(trial)
            if curve is not None and math.isinf(steps) and way_gone(trial) >= MOST_OF_THE_WAY:
                # It stopped at its target, which the smoothed loss of its batches lags behind.
                steps = curve.n_steps
            if math.isfinite(steps):
                sizes = np.array([of["batch_size"], batch_size])
                ratio = self.predictor.seconds_per_step(sizes)
                relative = float(ratio[0] / ratio[1])
                own = steps * (1.0 if math.isnan(relative) else relative)
                fastest = min(fastest, (own, trial.number))
        return fastest


def _chance(rest: tuple[float, float], left: float) -> float:
    """How likely as many steps as are left are enough."""
    if left <= 0:
        return 0.0
    steps, sd = np.array([max(rest[0], 1.0)]), np.array([rest[1]])
    return float(probability_below(steps, sd, np.array([left]))[0])


def _configuration(prediction: dict[str, Any]) -> tuple[float, int, float]:
    return prediction["learning_rate"], prediction["batch_size"], prediction["momentum"]


def _is_thrown_back(curve: LossCurve, running: Observation, initial_loss: float) -> bool:
    """Whether training is back where it began, in ample time to be elsewhere."""
    above = curve.losses > _NOT_LEARNED * initial_loss
    if not above[-1] or curve.losses[-1] < _RISEN * curve.losses.min():
        return False
    halved = _halved(running.predicted, running.expected)
    if halved is None:
        return False
    below = np.flatnonzero(~above)
    last = float(curve.steps[below[-1]]) if len(below) else 0.0
    return curve.n_steps - last > max(_AMPLE * halved, last)


def _halved(*log_steps: NDArray[np.float64]) -> float | None:
    """The latest of several predictions of when the loss is halved; None where there is none."""
    told = [logs[np.isfinite(logs) & (DEPTHS <= _HALVED)] for logs in log_steps]
    return max((math.exp(logs[-1]) for logs in told if len(logs)), default=None)
