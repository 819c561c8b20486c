"""The prior of the errors of predicted times, before any trial."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._loss_levels import N_COVARIATES
from optuna_ttp.calibration._rules import GrowthPriorRules


@dataclass(frozen=True)
class PriorScale:
    """Factors on prior standard deviations: how far a network may be from its linearisation."""

    growth: float = 1.0
    """Factor on the prior standard deviation of the correction ``u``."""
    scatter: float = 1.5
    """Factor on the standard deviations of differences between trials: of their logarithmic
    times, of the part that instability adds, and of the effects of the configurations. By default
    that of a usual pretrained network."""

    @property
    def scales(self) -> tuple[float, float]:
        """The factors on two variances of logarithmic times, before any trial.

        The first is on the variance of stable trials, the second on that which instability adds.
        """
        return self.scatter**2, self.scatter**1.5


@lru_cache(maxsize=16)
def prior(prior_scale: PriorScale, rules: GrowthPriorRules) -> tuple[Floats, Floats]:
    """Return the prior mean ``(W,)`` and covariance ``(W, W)`` of the weights, before any trial.

    The weights are the correction ``u`` at :data:`KNOTS`, an integrated Gaussian process in the
    depth, and the effects of the covariates and of instability.
    """
    grid = np.linspace(0.0, KNOTS[-1], 241)
    apart = (grid[:, None] - grid[None, :]) / rules.slope_length
    width = grid[1] - grid[0]
    summed = np.tril(np.full((len(grid), len(grid)), width))
    summed[:, 0] *= 0.5
    summed -= np.diag(np.full(len(grid), 0.5 * width))
    integrated = summed @ (rules.slope_sd**2 * np.exp(-0.5 * apart**2)) @ summed.T
    at = np.array([np.interp(KNOTS, grid, row) for row in integrated])
    at = prior_scale.growth**2 * np.array([np.interp(KNOTS, grid, row) for row in at.T])
    n = len(KNOTS)
    whole = np.zeros((n + N_COVARIATES + 1,) * 2)
    whole[:n, :n] = at + rules.start_sd**2 + 1e-8 * np.eye(n)
    whole[n:, n:] = prior_scale.scatter**2 * np.diag(np.square(rules.effect_sds))
    return np.append(np.zeros(n), rules.effects), whole
