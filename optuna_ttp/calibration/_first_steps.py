"""How fast training begins, by the trials in which only the spectrum can be wrong."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np

from optuna_ttp.calibration._errors import wildness
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._rules import CalibrationRules


def calm_start(observations: Sequence[Observation], rules: CalibrationRules) -> float:
    """Return the logarithm of how much faster than simulated trials passed their first levels.

    It is a mean in which trials near the edge of stability weigh little; NaN where all trials
    weigh less than a single calm one.
    """
    first = rules.first_steps
    early = -math.log(first.fraction) + 1e-9 >= DEPTHS
    total = weight = calm = 0.0
    for one in observations:
        seen = np.isfinite(one.observed) & np.isfinite(one.predicted) & early
        if not seen.any():
            continue
        precision = 1.0 / (one.errors[seen] ** 2 + first.level_sd**2)
        ahead = float((one.predicted - one.observed)[seen] @ precision / precision.sum())
        wild = float(wildness(one.instability, rules.errors)[seen].mean()) ** 2
        share = 1.0 / (1.0 + (wild + 1.0 / float(precision.sum())) / first.calm_sd**2)
        total, weight = total + share * ahead, weight + share
        calm += 1.0 / (1.0 + wild / first.calm_sd**2)
    return total / weight if calm >= first.least_weight else math.nan
