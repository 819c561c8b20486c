"""The posterior of the clock's correction, from observed trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from optuna_ttp.calibration._calibration import Calibration
from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.calibration._errors import failure_limit
from optuna_ttp.calibration._errors import SCALE_WEIGHT
from optuna_ttp.calibration._first_steps import calm_start
from optuna_ttp.calibration._held_out import held_out
from optuna_ttp.calibration._observation import failed
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._paths import corrected
from optuna_ttp.calibration._prior import prior
from optuna_ttp.calibration._prior_scale import PriorScale
from optuna_ttp.calibration._trials import Trials


# Degrees of freedom with which a trial that does not fit loses its weight.
_ROBUSTNESS = 4.0
_ROUNDS = 4
# Learned from the newest so many trials: enough, and quick.
_MOST_TRIALS = 128
# So many are compared with rules that learn from the trials before.
_MOST_COMPARED = 256


def calibrate(
    observations: Sequence[Observation], prior_scale: PriorScale | None = None
) -> Calibration:
    """Learn from trials.

    Args:
        observations:
            Trials, oldest first. Those of which nothing was seen are left out, and only the newest
            128 shape the correction.
        prior_scale:
            How far the network may be from its linearisation. That of a usual one by default.

    Returns:
        The posterior, and how good the predictions were that were made before each trial.
    """
    every = [o for o in observations if _n_seen(o) > 0]
    usable = every[-_MOST_TRIALS:]
    prior_scale = prior_scale or PriorScale()
    mean, covariance = prior(prior_scale)
    divergence, failure = _divergence(observations), _failure(observations)
    if not usable:
        return replace(Calibration.none(prior_scale), divergence=divergence, failure=failure)
    trials = Trials.of(usable)
    precision = np.linalg.inv(covariance)
    weights = mean
    importance = np.ones(len(usable))
    scales = expected = prior_scale.scales
    logs, slopes = corrected(trials.passages, weights)
    for _ in range(_ROUNDS):
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
        logs, slopes = corrected(trials.passages, weights)
        away = np.where(seen, observed - logs, 0.0)
        own = np.where(np.isfinite(trials.observed), away, 0.0)
        squares = trials.ratios(own, errors, seen, scales)
        importance = (_ROBUSTNESS + 1.0) / (_ROBUSTNESS + squares)
        scales = trials.scales(own, errors, seen, importance, expected)
    return Calibration(
        weights,
        np.linalg.inv(posterior),
        *scales,
        SCALE_WEIGHT + len(usable),
        len(every),
        *held_out(every[-_MOST_COMPARED:]),
        calm_start(usable),
        divergence,
        failure,
    )


def _n_seen(observation: Observation) -> int:
    if not np.isfinite(observation.predicted).any() or observation.n_steps < 1:
        return 0
    return int(np.isfinite(observation.observed).sum())


def _divergence(observations: Sequence[Observation]) -> DivergenceLimit:
    """A trial diverged, or it passed a level; one that did neither tells nothing."""
    telling = [o for o in observations if o.diverged or np.isfinite(o.observed).any()]
    # At the first level the kernel has hardly grown.
    stability = [o.instability[0] for o in telling]
    return DivergenceLimit.of(stability, [o.diverged for o in telling])


def _failure(observations: Sequence[Observation]) -> DivergenceLimit:
    late = failed(observations)
    telling = [
        (o.instability[0], f)
        for o, f in zip(observations, late, strict=True)
        if f or np.isfinite(o.observed).any()
    ]
    return failure_limit([s for s, _ in telling], [f for _, f in telling])
