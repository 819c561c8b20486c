"""How far the logarithmic times of a trial are expected to be off."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


# The product of stability and kernel growth from which on instability makes times scatter.
_SCATTERS = 0.6
# The learning rate over the largest stable one from which on a loss spike at the start delays a
# trial by nobody knows how much, and the standard deviation that this comes to.
_CATAPULTS = 0.3
_CATAPULT_SD = 1.0
# Errors of a trial's logarithmic times: common to neighbouring rungs over such a length, more of
# it with instability, and of single rungs.
TRIAL_SD = 0.02
_INSTABILITY_SD = 0.175
RUNG_SD = 0.025
# Weight of the prior of the errors' scale, in trials, and what a trial counts for it.
SCALE_WEIGHT = 2.0


def wildness(instability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation that comes with instability.

    Args:
        instability:
            See :class:`Observation`, rungs in the last axis.

    Returns:
        The same shape; what was unstable once stays so.
    """
    lasting = np.log1p(np.fmax.accumulate(instability, axis=-1) / _SCATTERS)
    return _INSTABILITY_SD * lasting + catapult(instability)[..., None]


def catapult(instability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation that comes with a loss spike at the start.

    Args:
        instability:
            See :class:`Observation`, rungs in the last axis.

    Returns:
        The shape without the last axis.
    """
    share = instability[..., 0] / (instability[..., 0] + _CATAPULTS)
    return np.asarray(_CATAPULT_SD * share**3)
