"""How good the predictions were that were made before each trial."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.calibration._errors import wildness
from optuna_ttp.calibration._loss_levels import deepest
from optuna_ttp.calibration._observation import Observation


# The newest so many trials say how good predictions are.
_RECENT = 15
# What counts as the error where a prediction was out of reach.
_LARGE_ERROR = 3.0
# Errors of calm trials that are of no interest; others weigh less by what instability adds.
_CALM_SD = 0.2


class HeldOut(NamedTuple):
    """How good predictions were, and two trivial rules.

    Attributes:
        rank_agreement:
            Kendall's tau.
        log_error:
            Root mean square of the logarithmic errors.
        baseline_error:
            That of the better of the rules.
        compared_error:
            That of the predictions over those trials that the rules predict.
        n_compared:
            What those trials weigh. A calm one weighs one.
        superiority:
            The sum of how much less the squared errors of the rule are than those of predictions,
            over its standard deviation if no trial knew of another.
    """

    rank_agreement: float
    log_error: float
    baseline_error: float
    compared_error: float
    n_compared: float
    superiority: float


def held_out(observations: Sequence[Observation]) -> HeldOut:
    """Return rank agreement and errors of what was predicted before each trial, and of rules.

    Args:
        observations:
            Trials, oldest first, of each of which something was seen.

    Returns:
        How good they were.
    """
    observed = np.array([o.observed for o in observations])
    expected = np.array([o.expected for o in observations])
    rates = np.log([[o.effective_learning_rate] for o in observations])
    lags = np.array([[o.lag] for o in observations])
    # Every trial counts once, with the deepest level that it was seen on.
    told = np.where(np.isfinite(expected), observed, np.nan)
    told = np.where(np.isfinite(told).any(axis=1, keepdims=True), told, observed)
    chosen = (np.arange(len(observed)), deepest(told))
    errors = np.where(np.isfinite(expected), observed - expected, _LARGE_ERROR)[chosen]
    plain = _mean_before(observed + rates) - rates
    intrinsic = _mean_before(np.log(np.maximum(np.exp(observed) - lags, 1.0)) + rates)
    shifted = np.log(np.exp(intrinsic - rates) + lags)
    rules = np.stack([(observed - plain)[chosen], (observed - shifted)[chosen]])
    # Old errors are forgotten: what was learned since may have mended them.
    recent = np.arange(len(observed)) >= len(observed) - _RECENT
    compared = np.isfinite(rules).all(axis=0) & recent
    # What is near the edge of stability may be off whatever the spectrum.
    wild = wildness(np.array([o.instability for o in observations]))[chosen]
    weights = 1.0 / (1.0 + (wild / _CALM_SD) ** 2)
    squared = _mean_square(rules[:, compared], weights[compared])
    better = rules[int(np.argmin(squared)) if compared.any() else 0]
    ahead = (weights * (errors**2 - better**2))[compared]
    # Times are ranked at one depth: the deepest that at least half of the trials have passed.
    common = int(
        deepest(np.where(2 * np.isfinite(told).sum(axis=0) >= len(observed), 1.0, np.nan))
    )
    there = np.isfinite(observed[:, common]) & recent
    late = np.where(np.isfinite(expected), expected, np.inf)
    return HeldOut(
        _kendall(late[there, common], observed[there, common]),
        float(np.sqrt(_mean_square(errors[recent], weights[recent]))),
        float(np.sqrt(squared.min())),
        float(np.sqrt(_mean_square(errors[compared], weights[compared]))),
        float(weights[compared].sum()),
        float(ahead.sum() / max(float(np.linalg.norm(ahead)), 1e-12)),
    )


def _mean_square(errors: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted, over the last axis; NaN where there is nothing."""
    if not len(weights):
        return np.full(errors.shape[:-1], np.nan)
    return np.asarray(np.square(errors) @ weights / weights.sum())


def _mean_before(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the rows above each, of what is not NaN."""
    known = np.isfinite(values)
    total = np.cumsum(np.where(known, values, 0.0), axis=0) - np.where(known, values, 0.0)
    count = np.cumsum(known, axis=0) - known
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _kendall(first: ArrayLike, second: ArrayLike) -> float:
    if np.size(first) < 2:
        return math.nan
    from scipy.stats import kendalltau

    # Ranks, because the statistic does not take infinities.
    tau = kendalltau(
        np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    ).statistic
    # Without any difference in the predictions there is no ranking, hence no agreement.
    return 0.0 if math.isnan(tau) else float(tau)
