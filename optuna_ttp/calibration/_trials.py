"""Observed trials, stacked, and the errors that their times are expected to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._errors import catapult
from optuna_ttp.calibration._errors import LEVEL_SD
from optuna_ttp.calibration._errors import SCALE_WEIGHT
from optuna_ttp.calibration._errors import TRIAL_SD
from optuna_ttp.calibration._errors import wildness
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import deepest
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._observation import Observation


_TRIAL_LENGTH = 0.7
# A trial that went on without reaching its next level tells that it is later, within this error.
_CENSORED_ERROR = 0.15


@dataclass(frozen=True, eq=False)
class Trials:
    """The observations, stacked."""

    passages: SimulatedFirstPassages
    observed: NDArray[np.float64]
    errors: NDArray[np.float64]
    bound: NDArray[np.float64]
    delay: NDArray[np.float64]
    told: NDArray[np.bool_]

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> Trials:
        """Stack observations.

        Args:
            observations:
                Of each of which something was predicted.

        Returns:
            The trials.
        """
        return cls(
            SimulatedFirstPassages(
                DEPTHS[None, :],
                np.array([_extended(o.predicted) for o in observations]),
                np.array([o.growth for o in observations]),
                np.array([o.covariates for o in observations]),
                np.array([o.instability for o in observations]),
                np.array([o.lag for o in observations]),
            ),
            # What nothing was predicted for, behind the target, tells nothing.
            np.array(
                [np.where(np.isfinite(o.predicted), o.observed, np.nan) for o in observations]
            ),
            np.array([o.errors for o in observations]),
            np.array([o.bound for o in observations]),
            np.array([math.log(o.n_steps / max(o.n_steps - o.lost, 1.0)) for o in observations]),
            np.isfinite([o.predicted for o in observations]),
        )

    def with_bounds(
        self, logs: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Observed times and errors; where a trial has not got as far as expected, its end."""
        observed, errors = self.observed.copy(), self.errors.copy()
        last = deepest(observed)
        rows = np.flatnonzero(last + 1 < observed.shape[1])
        following = last[rows] + 1
        late = self.told[rows, following] & (logs[rows, following] < self.bound[rows])
        rows, following = rows[late], following[late]
        observed[rows, following] = self.bound[rows]
        # A spike may have delayed it by any part of that, as far as one is to be expected.
        away = self.bound[rows] - logs[rows, following]
        spike = np.minimum(catapult(self.passages.instability[rows]), 1.0)
        errors[rows, following] = np.hypot(
            _CENSORED_ERROR, np.maximum(spike * away, self.delay[rows])
        )
        return observed, errors

    def precision(
        self,
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        scales: tuple[float, float],
    ) -> NDArray[np.float64]:
        """Inverse covariance of the errors of each trial; zero where nothing was seen."""
        both = seen[:, :, None] & seen[:, None, :]
        common = self.common(scales)
        own = np.where(seen, np.nan_to_num(errors) ** 2 + scales[0] * LEVEL_SD**2, 1.0)
        covariance = np.where(both, common, 0.0) + own[:, :, None] * np.eye(len(DEPTHS))
        return np.where(both, np.linalg.inv(covariance), 0.0)

    def common(self, scales: tuple[float, float]) -> NDArray[np.float64]:
        """Covariance of what the levels of a trial have in common, ``(n, P, P)``."""
        apart = (DEPTHS[:, None] - DEPTHS[None, :]) / _TRIAL_LENGTH
        wild = wildness(self.passages.instability)
        # What comes with instability stays with the trial from then on.
        lasting = np.minimum(wild[:, :, None], wild[:, None, :]) ** 2
        return np.asarray(scales[0] * TRIAL_SD**2 * np.exp(-0.5 * apart**2) + scales[1] * lasting)

    def ratios(
        self,
        away: NDArray[np.float64],
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        scales: tuple[float, float],
    ) -> NDArray[np.float64]:
        """Mean squared error of each trial over what is expected of it, ``(n,)``."""
        calm = scales[0] * (TRIAL_SD**2 + LEVEL_SD**2)
        wild = scales[1] * wildness(self.passages.instability) ** 2
        whole = wild + calm + np.nan_to_num(errors) ** 2
        share = seen / np.maximum(seen.sum(axis=1), 1)[:, None]
        return np.asarray((share * away**2 / whole).sum(axis=1))

    def scales(
        self,
        away: NDArray[np.float64],
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        importance: NDArray[np.float64],
        expected: tuple[float, float],
    ) -> tuple[float, float]:
        """Scales of the errors' variances: of calm trials, and of what instability adds."""
        wild = expected[1] * wildness(self.passages.instability) ** 2
        calm = expected[0] * (TRIAL_SD**2 + LEVEL_SD**2)
        whole = wild + calm + np.nan_to_num(errors) ** 2
        share = seen / np.maximum(seen.sum(axis=1), 1)[:, None]
        # A trial counts for the one or the other by what its errors are expected to come from.
        unstable = (share * wild / whole).sum(axis=1)
        ratio = self.ratios(away, errors, seen, expected)
        stable = importance * (1.0 - unstable)
        one = (SCALE_WEIGHT + (stable * ratio).sum()) / (SCALE_WEIGHT + stable.sum())
        two = (SCALE_WEIGHT + (unstable * ratio).sum()) / (SCALE_WEIGHT + unstable.sum())
        return expected[0] * float(one), expected[1] * float(two)


def _extended(log_steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Go on behind the end of a simulation as it was going."""
    known = np.flatnonzero(np.isfinite(log_steps))
    last = known[-1]
    slope = 0.5
    if len(known) > 1:
        run = DEPTHS[last] - DEPTHS[known[-2]]
        slope = max(slope, (log_steps[last] - log_steps[known[-2]]) / run)
    behind = np.arange(len(log_steps)) > last
    return np.where(behind, log_steps[last] + slope * (DEPTHS - DEPTHS[last]), log_steps)
