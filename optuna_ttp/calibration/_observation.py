"""The prediction for a trial before it ran, and the observed times of the trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._loss_levels import deepest
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._loss_levels import N_COVARIATES
from optuna_ttp.calibration._rules import RULES


@dataclass(frozen=True, eq=False, repr=False)
class Observation:
    """The prediction for a trial before it ran, and the observed times of the trial."""

    predicted: Floats
    """Logarithm of the simulated step at each of the P :data:`DEPTHS`, shape ``(P,)``; NaN after
    the end of the simulation."""
    expected: Floats
    """These logarithms, corrected by the calibration of that time, shape ``(P,)``."""
    growth: Floats
    """Logarithm of the correction of the kernel in the simulation, at :data:`KNOTS`, shape
    ``(M,)``."""
    covariates: Floats
    """The configuration's :func:`covariates`, shape ``(F,)``."""
    instability: Floats
    """Learning rate over the largest stable one, times the predicted growth of the kernel at each
    of :data:`DEPTHS`, shape ``(P,)``."""
    effective_learning_rate: float
    """``eta / (1 - m)``."""
    lag: float
    """Steps ``m / (1 - m)`` by which momentum delays a gradient."""
    observed: Floats
    """Logarithm of the step at which each of :data:`DEPTHS` was passed, ``(P,)``; NaN if not."""
    errors: Floats
    """Standard errors of the observed logarithms, shape ``(P,)``."""
    n_steps: float
    """The number of steps that the trial has taken."""
    diverged: bool = False
    """True if the loss became infinite or NaN, or never recovered from a spike."""
    batch_size: int = 0
    """The batch size of the configuration; zero if it is not known."""
    seconds_per_step: float = math.nan
    """Median of the seconds of the trial's steps; NaN if they were not measured."""
    lost: float = 0.0
    """The number of steps that the trial probably lost in loss spikes."""

    def __repr__(self) -> str:
        passed = int(np.isfinite(self.observed).sum())
        return (
            f"Observation({self.n_steps:,.0f} steps, {passed} of {len(DEPTHS)} depths passed"
            f"{', diverged' if self.diverged else ''})"
        )

    @property
    def bound(self) -> float:
        """Logarithm of the steps, without those lost, in which the next level was not passed.

        It is a lower bound of that level's time; minus infinity, no bound, for a diverged trial.
        """
        return -math.inf if self.diverged else math.log(max(self.n_steps - self.lost, 1.0))

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name as values that JSON can store; NaN becomes :obj:`None`."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Observation:
        """Return the observation whose :meth:`to_json` returned these values.

        A :class:`ValueError` is raised if the values are no observation of this version.
        """
        lengths = {"growth": len(KNOTS), "covariates": N_COVARIATES}
        try:
            read = {
                name: _unplain(values.get(name, 0.0) if name == "lost" else values[name])
                for name in cls.__dataclass_fields__
            }
            for name, value in read.items():
                if isinstance(value, np.ndarray) and len(value) != lengths.get(name, len(DEPTHS)):
                    raise ValueError(f"{name} has {len(value)} values")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"These values are no observation: {error}.") from error
        return cls(**read)


def failed(
    observations: Sequence[Observation], late_factor: float = RULES.fit.late_factor
) -> Booleans:
    """Return a mask ``(n,)`` of trials that diverged or are late at their next level.

    A trial is late if it takes more than ``late_factor`` times the expected time of that level.
    """
    if not observations:
        return np.zeros(0, dtype=bool)
    following = deepest(np.array([o.observed for o in observations])) + 1
    # No level follows the last one, so that its time is NaN.
    expected = np.full((len(observations), len(DEPTHS) + 1), np.nan)
    expected[:, :-1] = [o.expected for o in observations]
    bounds = np.array([o.bound for o in observations])
    late = bounds - expected[np.arange(len(expected)), following] > math.log(late_factor)
    return np.asarray(late | np.array([o.diverged for o in observations]))


def _plain(value: Any) -> Any:
    """Return a number or an array as JSON stores it; not finite numbers become :obj:`None`."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return bool(value) if isinstance(value, bool | np.bool_) else int(value)


def _unplain(value: Any) -> Any:
    """Return the number or array of which :func:`_plain` returned the value."""
    if isinstance(value, list):
        return np.array([math.nan if v is None else v for v in value], dtype=np.float64)
    return math.nan if value is None else value
