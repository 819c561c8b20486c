"""How far the logarithmic times of a trial are expected to be off."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.calibration._divergence import DivergenceLimit


# The product of stability and kernel growth from which on instability makes times scatter.
_SCATTERS = 0.6
# The learning rate over the largest stable one from which on a loss spike at the start delays a
# trial by nobody knows how much, and the standard deviation that this comes to.
_CATAPULTS = 0.3
_CATAPULT_SD = 1.0
# Errors of a trial's logarithmic times: common to neighbouring levels over such a length, more of
# it with instability, and of single levels.
TRIAL_SD = 0.02
_INSTABILITY_SD = 0.175
LEVEL_SD = 0.025
# The learning rate over the largest stable one from which on half of all networks do not do as
# predicted, and how far, in nats, networks differ. Of the configurations above it that are
# predicted to reach their target on the first draws in benchmarks/search, 41 of 47 of the digits'
# do, and 3 of 73 of the other four tasks'.
_HALF_FAIL = 1.0
_FAILURE_SD = 1.2
# Weight of the prior of the errors' scale, in trials, and what a trial counts for it.
SCALE_WEIGHT = 2.0


def failure_limit(stability: ArrayLike = (), failed: ArrayLike = ()) -> DivergenceLimit:
    """Return from which learning rate on trials do not do as predicted.

    Args:
        stability:
            Learning rates of trials over the largest stable one, positive, shape ``(n,)``.
        failed:
            Whether they did not, shape ``(n,)``.

    Returns:
        What is believed of it.
    """
    return DivergenceLimit.of(stability, failed, half=_HALF_FAIL, spread=_FAILURE_SD)


def wildness(instability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation that comes with instability.

    Args:
        instability:
            See :class:`Observation`, levels in the last axis.

    Returns:
        The same shape; what was unstable once stays so.
    """
    lasting = np.log1p(np.fmax.accumulate(instability, axis=-1) / _SCATTERS)
    return _INSTABILITY_SD * lasting + catapult(instability)[..., None]


def catapult(instability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation that comes with a loss spike at the start.

    Args:
        instability:
            See :class:`Observation`, levels in the last axis.

    Returns:
        The shape without the last axis.
    """
    share = instability[..., 0] / (instability[..., 0] + _CATAPULTS)
    return np.asarray(_CATAPULT_SD * share**3)
