"""The record of prediction and decision that is stored with a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_ttp.study._attributes import attribute_of
from optuna_ttp.study._attributes import count
from optuna_ttp.study._attributes import MALFORMED
from optuna_ttp.study._attributes import mapping
from optuna_ttp.study._attributes import number
from optuna_ttp.study._attributes import PAID
from optuna_ttp.study._attributes import RECORD
from optuna_ttp.study._decision_record import Action
from optuna_ttp.study._decision_record import DecisionRecord
from optuna_ttp.study._optuna_compat import write_user_attr
from optuna_ttp.study._prediction_record import PredictionRecord


if TYPE_CHECKING:
    import optuna
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class TrialRecord:
    """The prediction for a trial and the newest decision about it.

    Attributes:
        number: The trial's number.
        prediction: The prediction before the first step, or None.
        decision: The newest decision about the trial, or None.
    """

    number: int
    prediction: PredictionRecord | None = None
    decision: DecisionRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored, under the names that version 0.1.0 gave them."""
        values: dict[str, Any] = {"trial": self.number}
        if self.prediction is not None:
            values["prediction"] = self.prediction.to_json()
        if self.decision is not None:
            values["decision"] = self.decision.to_json()
        return values

    @classmethod
    def from_json(cls, values: Any) -> TrialRecord | None:
        """Read the result of :meth:`to_json`; return None if the values are no record.

        A malformed prediction or decision becomes None.
        """
        try:
            values = mapping(values)
            trial_number = count(values["trial"])
        except MALFORMED:
            return None
        return cls(
            trial_number,
            PredictionRecord.from_json(values.get("prediction")),
            DecisionRecord.from_json(values.get("decision")),
        )


def record_of(trial: BaseTrial) -> TrialRecord | None:
    """Return the record that is stored with a trial, or None."""
    return TrialRecord.from_json(attribute_of(trial, RECORD))


def prediction_of(trial: BaseTrial) -> PredictionRecord | None:
    """Return the prediction that is stored with a trial, or None."""
    return PredictionRecord.from_json((attribute_of(trial, RECORD) or {}).get("prediction"))


def decision_of(trial: BaseTrial) -> DecisionRecord | None:
    """Return the decision that is stored with a trial, or None."""
    return DecisionRecord.from_json((attribute_of(trial, RECORD) or {}).get("decision"))


def write_record(study: optuna.Study, trial: FrozenTrial, record: TrialRecord) -> None:
    """Store a record with a running trial, in place of an earlier one."""
    write_user_attr(study, trial, RECORD, record.to_json())


def n_skipped_in_a_row(trials: Sequence[FrozenTrial]) -> int:
    """Return the number of newest trials that were skipped, undecided running ones aside."""
    n_skipped = 0
    for trial in sorted(trials, key=lambda t: t.number, reverse=True):
        decision = decision_of(trial)
        if decision is None and trial.state == TrialState.RUNNING:
            continue  # The decision about this trial is not made yet.
        if decision is None or decision.action != Action.SKIP:
            break
        n_skipped += 1
    return n_skipped


def paid_seconds(trial: FrozenTrial) -> float:
    """Return the seconds that a trial took, by its own clock if stored; NaN if it is running."""
    try:
        seconds = number(mapping(attribute_of(trial, PAID))["seconds"])
    except MALFORMED:
        seconds = math.nan
    if seconds >= 0.0:
        return seconds
    return math.nan if trial.duration is None else trial.duration.total_seconds()
