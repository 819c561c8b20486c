"""How fast training begins, by the trials that nothing but the spectrum can be to blame for."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np

from optuna_ttp.calibration._errors import wildness
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._observation import Observation


# The first steps: until the loss is at 70 %. There the network is still the pretrained one.
_FIRST = -math.log(0.7) + 1e-9
# Errors of calm trials' times that are of no interest, as standard deviations: of single levels,
# and of a whole trial; others weigh less.
_LEVEL_SD = 0.05
_CALM_SD = 0.2
# Trials that weigh less than one calm one tell nothing.
_LEAST = 1.0


def calm_start(observations: Sequence[Observation]) -> float:
    """Return how much faster than simulated calm trials passed their first levels.

    Args:
        observations:
            Trials.

    Returns:
        The logarithm of a factor, a mean in which trials near the edge of stability weigh little;
        NaN where all weigh less than a single calm one.
    """
    total = weight = calm = 0.0
    for one in observations:
        seen = np.isfinite(one.observed) & np.isfinite(one.predicted) & (DEPTHS <= _FIRST)
        if not seen.any():
            continue
        precision = 1.0 / (one.errors[seen] ** 2 + _LEVEL_SD**2)
        ahead = float((one.predicted - one.observed)[seen] @ precision / precision.sum())
        wild = float(wildness(one.instability)[seen].mean()) ** 2
        share = 1.0 / (1.0 + (wild + 1.0 / float(precision.sum())) / _CALM_SD**2)
        total, weight = total + share * ahead, weight + share
        calm += 1.0 / (1.0 + wild / _CALM_SD**2)
    return total / weight if calm >= _LEAST else math.nan
