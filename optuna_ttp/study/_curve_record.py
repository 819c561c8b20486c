"""The record of a trial's training loss: a curve, or how to read the trial's reports as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray
from optuna.trial import TrialState

from optuna_ttp.calibration import LossCurve
from optuna_ttp.study._attributes import attribute_of
from optuna_ttp.study._attributes import count
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._attributes import MALFORMED
from optuna_ttp.study._attributes import mapping
from optuna_ttp.study._attributes import number
from optuna_ttp.study._attributes import numbers
from optuna_ttp.study._attributes import or_none
from optuna_ttp.study._attributes import positive
from optuna_ttp.study._attributes import text
from optuna_ttp.study._unusable_curve import CurveFault
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class CurveRecord:
    """The training-loss curve of a trial.

    Attributes:
        curve: The smoothed curve, rounded as it is stored; it has no point if no loss was finite.
        first_loss: The first finite loss that was recorded, not smoothed; NaN if there is none.
        seconds_per_step: Median of the seconds from one step to the next; NaN if it was not
            measured.
    """

    curve: LossCurve
    first_loss: float
    seconds_per_step: float = math.nan

    @classmethod
    def of(
        cls, losses: ArrayLike, steps: ArrayLike, seconds_per_step: float = math.nan
    ) -> CurveRecord:
        """Smooth mini-batch losses: ``losses[i]`` is the loss before step ``steps[i]``, ``(T,)``.

        Raise ValueError if there are none, if a loss is negative or if steps do not ascend.
        """
        values = np.asarray(losses, dtype=np.float64)
        curve = LossCurve.of(values, steps)
        finite = values[np.isfinite(values)]
        rounded = replace(
            curve,
            losses=_rounded(curve.losses, ".6g"),
            errors=_rounded(curve.errors, ".3g"),
        )
        first_loss = float(finite[0]) if len(finite) else math.nan
        return cls(rounded, first_loss, float(f"{seconds_per_step:.4g}"))

    def followed_by(self, later: CurveRecord) -> CurveRecord:
        """Return this record joined with the record of the steps after its last one."""
        joined = replace(
            later.curve,
            steps=np.concatenate([self.curve.steps, later.curve.steps]),
            losses=np.concatenate([self.curve.losses, later.curve.losses]),
            errors=np.concatenate([self.curve.errors, later.curve.errors]),
            n_gaps=self.curve.n_gaps + later.curve.n_gaps,
        )
        return replace(later, curve=joined, first_loss=self.first_loss)

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored, under the names that version 0.1.0 gave them."""
        return {
            "n_steps": self.curve.n_steps,
            "diverged": bool(self.curve.diverged),
            "n_gaps": self.curve.n_gaps,
            "first": or_none(self.first_loss),
            "steps": [int(s) if s == int(s) else float(s) for s in self.curve.steps],
            "losses": self.curve.losses.tolist(),
            "errors": self.curve.errors.tolist(),
            "seconds_per_step": or_none(self.seconds_per_step),
        }

    @classmethod
    def from_json(cls, values: Any) -> CurveRecord | None:
        """Read the result of :meth:`to_json`; return None if the values are not a curve."""
        try:
            values = mapping(values)
            curve = LossCurve(
                numbers(values["steps"]),
                numbers(values["losses"]),
                numbers(values["errors"]),
                count(values["n_steps"]),
                bool(values["diverged"]),
                count(values.get("n_gaps", 0)),
            )
            first_loss = number(values["first"])
            seconds_per_step = number(values.get("seconds_per_step"))
        except MALFORMED:
            return None
        possible = _is_possible(curve, first_loss)
        return cls(curve, first_loss, seconds_per_step) if possible else None


@dataclass(frozen=True)
class ReportedCurveRecord:
    """The meaning of the values that a trial reports, if they are its training loss.

    Attributes:
        steps_per_report: Optimiser steps from one report to the next.
        averaged: True if a value is the mean over the mini-batches of its steps, False if it is
            the training loss after them.
    """

    steps_per_report: int
    averaged: bool

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored, under the names that version 0.1.0 gave them."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: Any) -> ReportedCurveRecord | None:
        """Read the result of :meth:`to_json`; return None if the values are no such record."""
        try:
            per_report = int(positive(count(mapping(values)["steps_per_report"])))
            return cls(per_report, bool(values["averaged"]))
        except MALFORMED:
            return None

    def read(self, values: Mapping[int, float]) -> CurveRecord:
        """Return the curve of a trial's reports, at least one value by the number of the report.

        Raise ValueError if a value or a number is negative.
        """
        reports = sorted(values)
        # A mean over steps counts as the loss of their middle.
        per_report = self.steps_per_report
        ahead = 0.5 * (per_report - 1) if self.averaged else float(per_report)
        steps = np.array([n * per_report + ahead for n in reports])
        losses = [math.nan if values[n] is None else float(values[n]) for n in reports]
        record = CurveRecord.of(losses, steps)
        n_steps = int((reports[-1] + 1) * per_report)
        return replace(record, curve=replace(record.curve, n_steps=n_steps))


StoredCurve = CurveRecord | ReportedCurveRecord | UnusableCurve


def stored_curve(values: dict[str, Any] | None) -> StoredCurve | None:
    """Read the attribute of a trial's curve; return None if there is none or it is malformed."""
    if values is None:
        return None
    if "steps_per_report" in values:
        return ReportedCurveRecord.from_json(values)
    # A log stores why it has refused its losses.
    if "unusable" in values:
        try:
            return UnusableCurve(
                CurveFault(values.get("kind", "values")), text(values["unusable"])
            )
        except MALFORMED:
            return None
    return CurveRecord.from_json(values)


def curve_attribute(trial: BaseTrial) -> dict[str, Any] | None:
    """Return the stored attribute of a trial's own curve, not of a trial it repeats, or None."""
    return attribute_of(trial, CURVE)


def curve_of(trial: FrozenTrial) -> CurveRecord | UnusableCurve | None:
    """Return a trial's recorded curve with at least one loss, from its reports if they are losses.

    Return an :class:`UnusableCurve` with the reason if there is none, or None if nothing was
    recorded.
    """
    stored = stored_curve(curve_attribute(trial))
    if isinstance(stored, ReportedCurveRecord):
        stored = _reported(stored, trial)
    if isinstance(stored, CurveRecord) and not len(stored.curve.steps):
        return UnusableCurve(CurveFault.INFINITE, "none of its losses is a finite number")
    return stored


def observed_curve(trial: FrozenTrial) -> LossCurve | None:
    """Return the smoothed training-loss curve of a trial, or None if it has no usable one."""
    record = curve_of(trial)
    return record.curve if isinstance(record, CurveRecord) else None


def lost_steps(trial: FrozenTrial) -> int:
    """Return the number of steps for which a trial's last losses were infinite or NaN.

    It is zero if the last loss is finite, or is a single one that may come from an overflow. If
    a trial reported only losses that are not finite, it is the number of its reports.
    """
    record = curve_of(trial)
    if isinstance(record, CurveRecord):
        curve = record.curve
        return int(curve.n_steps - 1 - curve.steps[-1]) if curve.diverged else 0
    if record is None or record.kind != CurveFault.INFINITE:
        return 0
    stored = stored_curve(curve_attribute(trial))
    n_reports = len(trial.intermediate_values)
    return stored.curve.n_steps if isinstance(stored, CurveRecord) else n_reports


def measured_seconds(trial: FrozenTrial) -> float:
    """Return the median of a trial's seconds per step; NaN if they were not measured."""
    record = curve_of(trial)
    return record.seconds_per_step if isinstance(record, CurveRecord) else math.nan


def _reported(
    stored: ReportedCurveRecord, trial: FrozenTrial
) -> CurveRecord | UnusableCurve | None:
    reported = trial.intermediate_values
    completed = trial.state == TrialState.COMPLETE
    if not reported:
        return UnusableCurve(CurveFault.EMPTY, "nothing was reported") if completed else None
    try:
        record = stored.read(reported)
    except ValueError as error:
        return UnusableCurve(CurveFault.VALUES, str(error).rstrip("."))
    if completed and len(reported) == 1:
        return UnusableCurve(CurveFault.SHORT, "it has a single value")
    return record


def _rounded(values: NDArray[np.float64], form: str) -> NDArray[np.float64]:
    return np.array([float(format(value, form)) for value in values], dtype=np.float64)


def _is_possible(curve: LossCurve, first_loss: float) -> bool:
    """Return True if stored numbers are in their ranges and can be used as a curve."""
    steps, losses, errors = curve.steps, curve.losses, curve.errors
    if not len(steps) == len(losses) == len(errors):
        return False
    if not len(steps):
        return True
    # Comparisons with NaN are False. A log writes no loss below 1e-30, and no error above 1.5.
    ascending = len(steps) == 1 or np.diff(steps).min() > 0.0
    begins_and_ends = steps[0] >= 0.0 and steps[-1] <= curve.n_steps
    positive_losses = losses.min() > 1e-40 and losses.max() < 1e305 and first_loss >= 0.0
    known_errors = errors.min() >= 0.0 and errors.max() < 10.0
    return bool(ascending and begins_and_ends and positive_losses and known_errors)
