"""Observed loss curves in, a correction of the clock and a measure of trust out.

Linearised training is wrong by a factor that depends on the depth of the target much more than on
the hyperparameters: a few observed trials of a task tell most of it. Here the logarithm of
observed over predicted time gets one offset with a normal prior, in closed form; and trust is lost
where the predictions neither rank the observed times nor come close to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


# Standard deviations of log(observed / predicted): between tasks, and between trials of a task.
_PRIOR_SD = 0.7
_NOISE_SD = 0.25
_MIN_OBSERVATIONS = 5
_MIN_AGREEMENT = 0.2
# Typical errors below this (a factor 1.65) do no harm, even where a search has come down to trials
# that are so alike that noise decides their order.
_HARMLESS_ERROR = 0.5
# What counts as the error where a target was reached that was predicted to be out of reach.
_LARGE_ERROR = 3.0


@dataclass(frozen=True)
class Calibration:
    """What observed trials say about a predictor.

    Attributes:
        log_offset:
            Posterior mean of log(observed steps / predicted steps). Zero by default.
        n_observed:
            The number of trials behind it.
        rank_agreement:
            Kendall's tau of predicted and observed times; NaN for fewer than two trials.
        log_error:
            Root mean square of log(observed steps / corrected prediction); NaN for no trials.
    """

    log_offset: float = 0.0
    n_observed: int = 0
    rank_agreement: float = math.nan
    log_error: float = math.nan

    @property
    def factor(self) -> float:
        """By what predicted steps are multiplied."""
        return math.exp(self.log_offset)

    @property
    def typical_factor(self) -> float:
        """By what factor a predicted time is typically off: two until five trials have told.

        At least 1.5, because a few lucky trials prove little.
        """
        if self.n_observed < _MIN_OBSERVATIONS:
            return 2.0
        return max(1.5, math.exp(self.log_error))

    @property
    def trusted(self) -> bool:
        """Whether predictions may steer a search.

        They may until five observed trials say that they neither rank configurations (Kendall's
        tau below 0.2) nor come close (a typical error above a factor 1.65).
        """
        return (
            self.n_observed < _MIN_OBSERVATIONS
            or self.rank_agreement >= _MIN_AGREEMENT
            or self.log_error <= _HARMLESS_ERROR
        )


def calibrate(predicted: Sequence[float], observed: Sequence[float]) -> Calibration:
    """Learn from pairs of predicted and observed times.

    With ``d_i = log(observed_i / predicted_i) = u + e_i``, ``u ~ N(0, 0.7^2)`` and
    ``e_i ~ N(0, 0.25^2)``, the posterior mean of the offset ``u`` is
    ``sum_i d_i / (n + 0.25^2 / 0.7^2)``.

    Args:
        predicted:
            Steps as predicted without correction. A target that was predicted never to be reached
            counts for the ranking, not for the offset.
        observed:
            Steps as observed, of the same length.

    Returns:
        The offset, the count, the rank agreement and the error. Pairs that are NaN, not positive,
        or whose observed time is infinite are left out.

    Raises:
        ValueError:
            If the lengths differ.
    """
    if len(predicted) != len(observed):
        raise ValueError(
            "predicted and observed must have the same length but got "
            f"{len(predicted)} and {len(observed)}."
        )
    p, o = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    usable = (p > 0) & (o > 0) & np.isfinite(o)
    p, o = p[usable], o[usable]
    finite = np.isfinite(p)
    differences = np.log(o[finite] / p[finite])
    offset = differences.sum() / (len(differences) + _NOISE_SD**2 / _PRIOR_SD**2)
    errors = np.concatenate([differences - offset, np.full((~finite).sum(), _LARGE_ERROR)])
    log_error = float(np.sqrt((errors**2).mean())) if len(errors) else math.nan
    return Calibration(float(offset), len(p), _kendall(p, o), log_error)


def _kendall(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    if len(first) < 2:
        return math.nan
    from scipy.stats import kendalltau

    # Ranks, because the statistic does not take infinities.
    tau = kendalltau(
        np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    ).statistic
    # Without any difference in the predictions there is no ranking, hence no agreement.
    return 0.0 if math.isnan(tau) else float(tau)


def smooth(losses: ArrayLike, points: ArrayLike | None = None) -> NDArray[np.float64]:
    """Smooth a curve of mini-batch losses by a centred mean whose width grows with the step.

    The window covers 10 % of the step on each side, at least two points: wide enough for
    mini-batch noise, narrow on the logarithmic scale on which training times differ. At the end of
    the curve, where the window has one side only, a straight line through it takes the mean's
    place: a mean would lag behind, and a trial that stops at its target would never seem to reach
    it.

    Args:
        losses:
            One value a step, of shape ``(T,)``.
        points:
            Steps at which the smoothed curve is wanted, of shape ``(P,)``. All by default.

    Returns:
        The smoothed curve at these steps.
    """
    values = np.asarray(losses, dtype=np.float64)
    wanted = np.arange(len(values)) if points is None else np.asarray(points, dtype=np.int64)
    return np.array([_smoothed(values, int(t)) for t in wanted], dtype=np.float64)


def _smoothed(values: NDArray[np.float64], t: int) -> float:
    half = max(2, t // 10)
    start = max(0, t - half)
    window = values[start : t + half + 1]
    mean = float(window.mean())
    if t + half < len(values) or len(window) < 3 or not math.isfinite(mean):
        return mean
    x = np.arange(start, start + len(window)) - t
    centred = x - x.mean()
    slope = float(centred @ (window - mean) / (centred @ centred))
    # Losses do not go below what was seen just because they were falling.
    return max(mean - slope * float(x.mean()), float(window.min()))
