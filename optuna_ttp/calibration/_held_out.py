"""The errors of predictions that were made before each trial."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._loss_levels import deepest
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._rules import CalibrationRules
from optuna_ttp.calibration._trials import instability_sd


class HeldOut(NamedTuple):
    """The errors of predictions, compared with those of two trivial rules; see Calibration."""

    rank_agreement: float
    """Kendall's tau between predicted and observed times."""
    log_error: float
    """Weighted root mean square of the logarithmic errors."""
    baseline_error: float
    """The same error of the better of the rules."""
    compared_error: float
    """:attr:`log_error` over the trials that the rules predict."""
    n_compared: float
    """The sum of these trials' weights; that of a trial far from the edge of stability is one."""
    superiority: float
    """The weighted sum of predictions' minus the rule's squared errors, over its standard
    deviation for independent trials."""


def held_out(observations: Sequence[Observation], rules: CalibrationRules) -> HeldOut:
    """Compare the corrected times predicted before each trial, oldest first, with observed times.

    The two trivial rules are ``c / eta_e`` and ``c / eta_e + m / (1 - m)``, with ``c`` the mean
    over the trials before.
    """
    trust = rules.trust
    observed = np.array([o.observed for o in observations])
    expected = np.array([o.expected for o in observations])
    rates = np.log([[o.effective_learning_rate] for o in observations])
    lags = np.array([[o.lag] for o in observations])
    # Every trial counts once, with the deepest level that it passed.
    times = np.where(np.isfinite(expected), observed, np.nan)
    times = np.where(np.isfinite(times).any(axis=1, keepdims=True), times, observed)
    chosen = (np.arange(len(observed)), deepest(times))
    unreached = trust.unreached_error
    errors = np.where(np.isfinite(expected), observed - expected, unreached)[chosen]
    plain = _mean_before(observed + rates) - rates
    intrinsic = _mean_before(np.log(np.maximum(np.exp(observed) - lags, 1.0)) + rates)
    shifted = np.log(np.exp(intrinsic - rates) + lags)
    trivial = np.stack([(observed - plain)[chosen], (observed - shifted)[chosen]])
    # Old errors are left out: corrections learned since may have removed them.
    recent = np.arange(len(observed)) >= len(observed) - trust.n_recent
    compared = np.isfinite(trivial).all(axis=0) & recent
    # Trials near the edge of stability may have large errors with any spectrum.
    unstable = instability_sd(np.array([o.instability for o in observations]), rules.errors)[
        chosen
    ]
    weights = 1.0 / (1.0 + (unstable / trust.stable_sd) ** 2)
    squared = _mean_square(trivial[:, compared], weights[compared])
    better = trivial[int(np.argmin(squared)) if compared.any() else 0]
    ahead = (weights * (errors**2 - better**2))[compared]
    # Times are ranked at one depth: the deepest that at least half of the trials have passed.
    common = int(
        deepest(np.where(2 * np.isfinite(times).sum(axis=0) >= len(observed), 1.0, np.nan))
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


def _mean_square(errors: Floats, weights: Floats) -> Floats:
    """Return weighted mean squares over the last axis; NaN if it is empty."""
    if not len(weights):
        return np.full(errors.shape[:-1], np.nan)
    return np.asarray(np.square(errors) @ weights / weights.sum())


def _mean_before(values: Floats) -> Floats:
    """Return, for each row, the mean over the rows above it, without NaNs; NaN without any."""
    known = np.isfinite(values)
    total = np.cumsum(np.where(known, values, 0.0), axis=0) - np.where(known, values, 0.0)
    count = np.cumsum(known, axis=0) - known
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Return Kendall's tau; NaN for fewer than two values, zero if all of one side are equal."""
    if np.size(first) < 2:
        return math.nan
    from scipy.stats import kendalltau

    # Ranks, because the statistic does not take infinities.
    tau = kendalltau(
        np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    ).statistic
    # Without any difference in the predictions there is no ranking, hence no agreement.
    return 0.0 if math.isnan(tau) else float(tau)
