"""The predicted time, cost, loss and probability of success of many configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._candidates import Candidates
    from optuna_ttp.search._sampler_rules import ForecastRules


@dataclass(frozen=True, eq=False)
class Forecast:
    """The predictions for K configurations.

    Attributes:
        log_seconds: Logarithm of the seconds (steps, if the seconds per step are not known) to
            the target, shape ``(K,)``; infinite if the target is out of reach.
        log_cost: Logarithm of the expected seconds (or steps) of a trial, shape ``(K,)``: up to
            its limit, or up to the target if the trial ends there.
        depth: Logarithm of the initial training loss over the predicted training loss at the
            trial's limit (without a limit: at the predictor's horizon), shape ``(K,)``.
        log_success: Logarithm of the probability that training does not fail at its learning
            rate, times the probability of reaching the target within the limit, shape ``(K,)``.
        stability: Learning rate over the largest stable learning rate, shape ``(K,)``.
        lag: Delay of momentum ``m``, ``m / (1 - m)`` steps, over a trial's steps, shape ``(K,)``.
        sd: Standard deviation of the logarithm of a predicted time.
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
        candidates: Candidates,
        limit: NDArray[np.float64],
        rules: ForecastRules,
        *,
        ends_at_target: bool,
    ) -> Forecast:
        """Return the forecast of K candidates by a predictor that trials have corrected.

        ``limit`` holds the largest number of steps per trial, shape ``(K,)``, infinite if there is
        no limit. With ``ends_at_target`` a trial ends once it reaches the target.
        """
        from optuna_ttp.calibration import probability_below

        learning_rate, batch_size = candidates.learning_rate, candidates.batch_size
        momentum = candidates.momentum
        seconds = predictor.score(
            learning_rate, batch_size, momentum, simulate_outside=not predictor.has_surface
        )
        per_step = predictor.seconds_per_step(batch_size)
        per_step = np.where(np.isnan(per_step), 1.0, per_step)
        horizon = np.where(np.isfinite(limit), limit, predictor.max_steps)
        stability = learning_rate / predictor.max_learning_rate(batch_size, momentum)
        sd = rules.largest_sd
        if predictor.calibration.n_observed >= 3:
            sd = float(np.clip(predictor.calibration.log_error, rules.least_sd, rules.largest_sd))
        steps = seconds / per_step
        reached = probability_below(steps, np.full(len(steps), sd), horizon)
        stable = 1.0 - predictor.calibration.failure.probability(stability)
        with np.errstate(divide="ignore"):
            log_seconds = np.log(seconds)
        spent = np.where(np.isfinite(limit), limit, np.inf) * per_step
        cost = np.minimum(seconds, spent) if ends_at_target else spent
        cost = np.where(np.isfinite(cost), cost, horizon * per_step)
        return cls(
            log_seconds,
            np.log(cost),
            predictor.depth_after(learning_rate, batch_size, momentum, horizon),
            np.log(np.maximum(reached * stable, rules.least_probability)),
            stability,
            momentum / (1.0 - momentum) / horizon,
            sd,
        )
