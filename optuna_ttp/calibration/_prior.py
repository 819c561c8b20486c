"""What is believed of the clock's errors before any trial."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._loss_levels import N_COVARIATES
from optuna_ttp.calibration._prior_scale import PriorScale


# The constants below, and those of the errors, maximise, roughly, the likelihood of held-out times
# after one to five trials of the first draw of each network in benchmarks/accuracy; the other
# draws test them.
# Prior of `u`: standard deviation of its slope per unit of depth, over which depths the slope goes
# along, and its standard deviation at the start.
_SLOPE_SD = 0.35
_SLOPE_LENGTH = 0.6
_START_SD = 0.15
# Prior of the effects of the covariates and of instability on the logarithm of the speed: means
# and standard deviations. Large steps are slower than predicted on all networks.
_EFFECTS = (-0.09, -0.09, 0.0)
_EFFECT_SDS = (0.07, 0.1, 0.14)


@lru_cache(maxsize=16)
def prior(prior_scale: PriorScale) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the prior of the weights: an integrated Gaussian process, and effects.

    Args:
        prior_scale:
            How far the kernel may be from the predicted one.

    Returns:
        Mean ``(W,)`` and covariance ``(W, W)``.
    """
    grid = np.linspace(0.0, KNOTS[-1], 241)
    apart = (grid[:, None] - grid[None, :]) / _SLOPE_LENGTH
    width = grid[1] - grid[0]
    summed = np.tril(np.full((len(grid), len(grid)), width))
    summed[:, 0] *= 0.5
    summed -= np.diag(np.full(len(grid), 0.5 * width))
    integrated = summed @ (_SLOPE_SD**2 * np.exp(-0.5 * apart**2)) @ summed.T
    at = np.array([np.interp(KNOTS, grid, row) for row in integrated])
    at = prior_scale.growth**2 * np.array([np.interp(KNOTS, grid, row) for row in at.T])
    whole = np.zeros((len(KNOTS) + N_COVARIATES + 1,) * 2)
    whole[: len(KNOTS), : len(KNOTS)] = at + _START_SD**2 + 1e-8 * np.eye(len(KNOTS))
    whole[len(KNOTS) :, len(KNOTS) :] = prior_scale.scatter**2 * np.diag(np.square(_EFFECT_SDS))
    mean = np.append(np.zeros(len(KNOTS)), _EFFECTS)
    return mean, whole
