"""What was predicted for a trial before it ran, and what was seen of it."""

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
    """What was predicted for a trial before it ran, and what was seen of it."""

    predicted: Floats
    """Logarithm of the predicted step at each of :data:`DEPTHS`, as simulated; NaN behind the end
    of the simulation. Shape ``(P,)``."""
    expected: Floats
    """The same as corrected by what had been learned then."""
    growth: Floats
    """Logarithm of the correction of the kernel that it was simulated with, at :data:`KNOTS`,
    shape ``(M,)``."""
    covariates: Floats
    """Of the configuration, shape ``(F,)``; see :func:`covariates`."""
    instability: Floats
    """Learning rate over the largest stable one, times what the kernel was predicted to have grown
    by, at each of :data:`DEPTHS`, shape ``(P,)``."""
    effective_learning_rate: float
    """``eta / (1 - m)``."""
    lag: float
    """Steps by which momentum lags behind."""
    observed: Floats
    """Logarithm of the step at which each of :data:`DEPTHS` was passed; NaN where not seen."""
    errors: Floats
    """Its standard error."""
    n_steps: float
    """Steps that the trial has taken."""
    diverged: bool = False
    """Whether its loss became infinite or NaN, or stayed where a spike had left it."""
    batch_size: int = 0
    """Of the configuration; zero where it is not known."""
    seconds_per_step: float = math.nan
    """Median over its steps; NaN where it was not measured."""
    lost: float = 0.0
    """Steps that it probably lost in loss spikes."""

    def __repr__(self) -> str:
        passed = int(np.isfinite(self.observed).sum())
        return (
            f"Observation({self.n_steps:,.0f} steps, {passed} of {len(DEPTHS)} depths passed"
            f"{', diverged' if self.diverged else ''})"
        )

    @property
    def bound(self) -> float:
        """Logarithm of the steps in which the trial did not pass its next level.

        Minus infinity where it diverged: nobody knows how late a trial would have been that never
        came back.
        """
        return -math.inf if self.diverged else math.log(max(self.n_steps - self.lost, 1.0))

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON takes; NaN as :obj:`None`."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Observation:
        """Read what :meth:`to_json` returned.

        A :class:`ValueError` says that the values are no observation, or one of another version of
        this package.
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
    """Tell which of n trials diverged, or missed their next level by a factor of its time."""
    if not observations:
        return np.zeros(0, dtype=bool)
    following = deepest(np.array([o.observed for o in observations])) + 1
    # Nothing follows the last level.
    expected = np.full((len(observations), len(DEPTHS) + 1), np.nan)
    expected[:, :-1] = [o.expected for o in observations]
    bounds = np.array([o.bound for o in observations])
    late = bounds - expected[np.arange(len(expected)), following] > math.log(late_factor)
    return np.asarray(late | np.array([o.diverged for o in observations]))


def _plain(value: Any) -> Any:
    """Return a value, or the values of an array, as JSON has them; NaN as :obj:`None`."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return bool(value) if isinstance(value, bool | np.bool_) else int(value)


def _unplain(value: Any) -> Any:
    """Return the value, or the array, that :func:`_plain` made plain."""
    if isinstance(value, list):
        return np.array([math.nan if v is None else v for v in value], dtype=np.float64)
    return math.nan if value is None else value
