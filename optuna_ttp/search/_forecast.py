"""What is to be expected of many configurations before any of them has run."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study import TrialBudget


# Standard deviation of the logarithm of a predicted time before trials have told.
_UNTOLD_SD = math.log(2.0)
_LEAST_SD = 0.1
# What is never reached counts as so many times the longest time that is.
_NEVER = 4.0
# The least probability of success that is told from none.
_LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is expected of K configurations.

    Attributes:
        log_seconds:
            Logarithm of the seconds (steps, where the time of a step is not known) to the target,
            shape ``(K,)``; infinite where it is out of reach.
        log_cost:
            Logarithm of what a trial is expected to cost: the time to the target, or its budget
            where that is what it trains for, shape ``(K,)``.
        depth:
            Logarithm of the initial training loss over that at the trial's budget, ``(K,)``;
            that at the target where there is no budget.
        log_success:
            Logarithm of the probability that training does as predicted, as far as its learning
            rate tells, and reaches the target within the budget, ``(K,)``.
        stability:
            Learning rate over the largest stable one, ``(K,)``.
        lag:
            Steps by which momentum lags behind, over those of a trial, ``(K,)``.
        sd:
            Standard deviation of the logarithm of a predicted time.
    """

    log_seconds: NDArray[np.float64]
    log_cost: NDArray[np.float64]
    depth: NDArray[np.float64]
    log_success: NDArray[np.float64]
    stability: NDArray[np.float64]
    lag: NDArray[np.float64]
    sd: float

    @classmethod
    def of(
        cls,
        predictor: SearchPredictor,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        budget: TrialBudget,
        *,
        trains_to_budget: bool,
    ) -> Forecast:
        """Look ahead, in microseconds a configuration.

        Args:
            predictor:
                As trials have corrected it.
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.
            budget:
                Of a trial.
            trains_to_budget:
                Whether a trial goes on to the end of its budget, instead of up to the target.

        Returns:
            The forecast.
        """
        from optuna_ttp.calibration import probability_below

        seconds = predictor.score(
            learning_rate, batch_size, momentum, simulate_outside=not predictor.has_surface
        )
        per_step = predictor.seconds_per_step(batch_size)
        per_step = np.where(np.isnan(per_step), 1.0, per_step)
        limit = budget.steps(predictor, batch_size)
        horizon = np.where(np.isfinite(limit), limit, predictor.max_steps)
        stability = learning_rate / predictor.max_learning_rate(batch_size, momentum)
        told = predictor.calibration.n_observed >= 3
        sd = _UNTOLD_SD
        if told:
            sd = float(np.clip(predictor.calibration.log_error, _LEAST_SD, _UNTOLD_SD))
        steps = seconds / per_step
        reached = probability_below(steps, np.full(len(steps), sd), horizon)
        stable = 1.0 - predictor.calibration.failure.probability(stability)
        with np.errstate(divide="ignore"):
            log_seconds = np.log(seconds)
        spent = np.where(np.isfinite(limit), limit, np.inf) * per_step
        cost = spent if trains_to_budget else np.minimum(seconds, spent)
        cost = np.where(np.isfinite(cost), cost, horizon * per_step)
        return cls(
            log_seconds,
            np.log(cost),
            predictor.depth_after(learning_rate, batch_size, momentum, horizon),
            np.log(np.maximum(reached * stable, _LEAST_PROBABILITY)),
            stability,
            momentum / (1.0 - momentum) / horizon,
            sd,
        )
