"""The posterior of the corrections of predicted times, from observed trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp.calibration._calibration import Calibration
from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.calibration._held_out import held_out
from optuna_ttp.calibration._observation import failed
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._paths import corrected
from optuna_ttp.calibration._prior import prior
from optuna_ttp.calibration._prior import PriorScale
from optuna_ttp.calibration._rules import CalibrationRules
from optuna_ttp.calibration._rules import DivergenceRules
from optuna_ttp.calibration._rules import RULES
from optuna_ttp.calibration._trials import Trials


def calibrate(
    observations: Sequence[Observation],
    prior_scale: PriorScale | None = None,
    *,
    rules: CalibrationRules = RULES,
) -> Calibration:
    """Return the calibration of a predictor by observed trials, oldest first.

    Trials that passed no level are left out, and only the newest 128 trials determine the
    correction. By default the prior is that of a usual pretrained network. The result also has
    the errors of the predictions that were made before each trial ran.
    """
    every = [o for o in observations if _n_seen(o) > 0]
    usable = every[-rules.fit.most_trials :]
    prior_scale = prior_scale or PriorScale()
    diverged = np.array([o.diverged for o in observations], dtype=bool)
    divergence = _limit(observations, diverged, rules.divergence)
    failure = _limit(observations, failed(observations, rules.fit.late_factor), rules.failure)
    if not usable:
        nothing = Calibration.none(prior_scale, rules)
        return replace(nothing, divergence=divergence, failure=failure)
    mean, covariance = prior(prior_scale, rules.growth_prior)
    trials = Trials.of(usable, rules.errors)
    precision = np.linalg.inv(covariance)
    weights = mean
    importance = np.ones(len(usable))
    scales = expected = prior_scale.scales
    logs, slopes = corrected(trials.simulated, weights, rules.growth_prior)
    for _ in range(rules.fit.n_rounds):
        observed, errors = trials.with_bounds(logs)
        seen = np.isfinite(observed) & np.isfinite(logs)
        inverse = trials.precision(errors, seen, scales)
        x = np.where(seen[:, :, None], slopes, 0.0)
        y = np.where(seen, observed - logs, 0.0) + x @ weights
        weighted = np.einsum("n,npq,nqw->npw", importance, inverse, x)
        posterior = precision + np.einsum("npv,npw->vw", x, weighted)
        weights = np.linalg.solve(
            posterior, precision @ mean + np.einsum("np,npw->w", y, weighted)
        )
        logs, slopes = corrected(trials.simulated, weights, rules.growth_prior)
        away = np.where(seen, observed - logs, 0.0)
        # The scale of the errors is learned from times that were observed, not from bounds.
        away = np.where(np.isfinite(trials.observed), away, 0.0)
        squares = trials.ratios(away, errors, seen, scales)
        importance = (rules.fit.robustness + 1.0) / (rules.fit.robustness + squares)
        scales = trials.scales(away, errors, seen, importance, expected)
    return Calibration(
        weights,
        np.linalg.inv(posterior),
        *scales,
        rules.errors.scale_weight + len(usable),
        len(every),
        *held_out(every[-rules.trust.most_compared :], rules),
        divergence,
        failure,
        rules,
    )


def _n_seen(observation: Observation) -> int:
    """Return the number of levels that a trial passed; zero if it has no prediction."""
    if not np.isfinite(observation.predicted).any() or observation.n_steps < 1:
        return 0
    return int(np.isfinite(observation.observed).sum())


def _limit(
    observations: Sequence[Observation], failures: Booleans, rules: DivergenceRules
) -> DivergenceLimit:
    """Return the limit learned from trials that failed (a mask ``(n,)``) or passed a level."""
    counted = [
        # At the first level the kernel has hardly grown.
        (o.instability[0], failure)
        for o, failure in zip(observations, failures, strict=True)
        if failure or np.isfinite(o.observed).any()
    ]
    return DivergenceLimit.of([s for s, _ in counted], [f for _, f in counted], rules)
