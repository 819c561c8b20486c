"""How far the logarithmic times of a trial are expected to be off."""

from __future__ import annotations

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._rules import ErrorRules


def wildness(instability: Floats, rules: ErrorRules) -> Floats:
    """Return the standard deviation of logarithmic times that comes with instability.

    The instability of :class:`Observation` has the levels in its last axis, and so has the result:
    what was unstable once stays so.
    """
    lasting = np.log1p(np.fmax.accumulate(instability, axis=-1) / rules.instability_from)
    return rules.instability_sd * lasting + catapult(instability, rules)[..., None]


def catapult(instability: Floats, rules: ErrorRules) -> Floats:
    """Return the standard deviation that comes with a loss spike at the start of training.

    It depends on the instability at the first level; the last axis, that of the levels, goes.
    """
    share = instability[..., 0] / (instability[..., 0] + rules.catapult_from)
    return np.asarray(rules.catapult_sd * share**3)
