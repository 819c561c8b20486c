"""The record of a prediction that is stored with its trial."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import N_COVARIATES
from optuna_ttp.prediction import Outcome
from optuna_ttp.study._attributes import count
from optuna_ttp.study._attributes import MALFORMED
from optuna_ttp.study._attributes import mapping
from optuna_ttp.study._attributes import number
from optuna_ttp.study._attributes import numbers
from optuna_ttp.study._attributes import or_none
from optuna_ttp.study._attributes import positive
from optuna_ttp.study._attributes import text


if TYPE_CHECKING:
    from optuna_ttp.prediction import Prediction


# Upper bound of a stored logarithm's magnitude; those of steps and kernel growth are far smaller.
_LARGEST_LOGARITHM = 300.0

# Upper bound of a stored instability: what is computed of larger ones may be infinite.
_LARGEST_INSTABILITY = 1e100


@dataclass(frozen=True)
class FirstPassageRecord:
    """The predicted first passage times of a trial, stored for its later calibration.

    Attributes:
        predicted: Logarithms of the predicted steps to each of ``DEPTHS``, as simulated; NaN below
            the target. Shape ``(P,)``.
        expected: Logarithms of these steps as corrected by earlier trials, shape ``(P,)``.
        growth: Logarithms of the simulated growth of the kernel at ``KNOTS``, shape ``(M,)``.
        covariates: The configuration's covariates, shape ``(F,)``.
        instability: Learning rate over the largest stable one at each of ``DEPTHS``, ``(P,)``.
    """

    predicted: tuple[float, ...]
    expected: tuple[float, ...]
    growth: tuple[float, ...]
    covariates: tuple[float, ...]
    instability: tuple[float, ...]

    @classmethod
    def of(cls, prediction: Prediction) -> FirstPassageRecord:
        """Return the record of a prediction, rounded as it is stored."""
        return cls(
            _rounded(prediction.log_first_passage_times),
            _rounded(prediction.expected_log_first_passage_times),
            _rounded(prediction.log_growth),
            _rounded(prediction.covariates),
            _rounded(prediction.instability, "{:.5g}"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored."""
        return {name: list(map(or_none, values)) for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, values: Any) -> FirstPassageRecord:
        """Read the result of :meth:`to_json`; raise one of ``MALFORMED`` for other values."""
        record = cls(**{name: _tuple(mapping(values)[name]) for name in cls.__annotations__})
        lengths = {name: len(value) for name, value in vars(record).items()}
        n_levels = len(DEPTHS)
        shapes = {"predicted": n_levels, "expected": n_levels, "instability": n_levels}
        shapes |= {"growth": len(KNOTS), "covariates": N_COVARIATES}
        if lengths != shapes:
            raise ValueError(f"{shapes} values were expected but got {lengths}.")
        logarithms = (*record.predicted, *record.expected, *record.growth)
        if any(abs(value) > _LARGEST_LOGARITHM for value in logarithms):
            raise ValueError("A logarithm is too large.")
        if not all(0.0 <= value <= _LARGEST_INSTABILITY for value in record.instability):
            raise ValueError("The instability must be finite and not negative.")
        return record


@dataclass(frozen=True)
class PredictionRecord:
    """The prediction for a trial, as it is stored. Unknown numbers are NaN.

    Attributes:
        fingerprint: The fingerprint of the task; empty if unknown.
        spectrum_seconds: Seconds that the spectrum behind the prediction took to compute.
        initial_loss: Training loss of the task at the pretrained weights.
        initial_loss_sd: Standard deviation of the initial losses of single samples.
        target: The target's value.
        learning_rate: The trial's learning rate.
        batch_size: The trial's batch size, at most the number of samples.
        momentum: The trial's momentum.
        outcome: The predicted outcome.
        steps: Predicted optimiser steps to the target; NaN if it is not reached.
        seconds: Predicted seconds to the target.
        stability: Learning rate over the largest stable one.
        budget_steps: The trial's budget in optimiser steps; NaN if it has none.
        budget_seconds: The trial's budget in seconds.
        max_steps: The horizon of the prediction, in steps.
        prediction_seconds: Seconds that the prediction took.
        first_passages: The predicted first passage times; None if they were not stored.
    """

    fingerprint: str
    spectrum_seconds: float
    initial_loss: float
    initial_loss_sd: float
    target: float
    learning_rate: float
    batch_size: int
    momentum: float
    outcome: Outcome
    steps: float
    seconds: float
    stability: float
    budget_steps: float
    budget_seconds: float
    max_steps: float
    prediction_seconds: float
    first_passages: FirstPassageRecord | None

    @property
    def configuration(self) -> tuple[float, int, float]:
        """Learning rate, batch size and momentum."""
        return self.learning_rate, self.batch_size, self.momentum

    @property
    def cost(self) -> float:
        """Predicted seconds, or steps if the seconds are unknown; NaN if both are."""
        return self.steps if math.isnan(self.seconds) else self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored, under the names that version 0.1.0 gave them."""
        values = {
            name: or_none(value) if isinstance(value, float) else value
            for name, value in vars(self).items()
            if name != "first_passages"
        }
        values["outcome"] = self.outcome.value
        if self.first_passages is not None:
            values["ladder"] = self.first_passages.to_json()
        return values

    @classmethod
    def from_json(cls, values: Any) -> PredictionRecord | None:
        """Read the result of :meth:`to_json`; return None if the values are no prediction.

        The configuration and the outcome must be there, and first passage times must be complete
        if there are any; other values may be missing.
        """
        try:
            values = mapping(values)
            stored = values.get("ladder")
            record = cls(
                fingerprint=text(values.get("fingerprint", "")),
                spectrum_seconds=_or_zero(values.get("spectrum_seconds")),
                initial_loss=number(values.get("initial_loss")),
                initial_loss_sd=number(values.get("initial_loss_sd")),
                target=number(values.get("target")),
                learning_rate=positive(values["learning_rate"]),
                batch_size=_batch_size(values["batch_size"]),
                momentum=number(values["momentum"]),
                outcome=Outcome(values["outcome"]),
                steps=number(values.get("steps")),
                seconds=number(values.get("seconds")),
                stability=number(values.get("stability")),
                budget_steps=number(values.get("budget_steps")),
                budget_seconds=number(values.get("budget_seconds")),
                max_steps=number(values.get("max_steps")),
                prediction_seconds=_or_zero(values.get("prediction_seconds")),
                first_passages=None if stored is None else FirstPassageRecord.from_json(stored),
            )
        except MALFORMED:
            return None
        return record if record.is_possible() else None

    def is_possible(self) -> bool:
        """Return True if the numbers are in their ranges, so that they can be used."""
        if self.first_passages is not None and math.isnan(
            self.initial_loss + self.initial_loss_sd
        ):
            return False
        # Unknown numbers are NaN, for which all comparisons are False.
        impossible = self.initial_loss <= 0.0 or self.initial_loss_sd < 0.0 or self.target <= 0.0
        return 0.0 <= self.momentum < 1.0 and not impossible


def _rounded(values: NDArray[np.float64], digits: str = "{:.4f}") -> tuple[float, ...]:
    return tuple(float(digits.format(v)) if math.isfinite(v) else math.nan for v in values)


def _tuple(values: Any) -> tuple[float, ...]:
    """Return a list of numbers as a tuple, with NaN for each None and infinity."""
    return tuple(v if math.isfinite(v) else math.nan for v in numbers(values).tolist())


def _or_zero(value: Any) -> float:
    result = number(value)
    return 0.0 if math.isnan(result) else result


def _batch_size(value: Any) -> int:
    result = count(value)
    if not 1 <= result < 2**31:
        raise ValueError(f"A batch size was expected but got {value!r}.")
    return result
