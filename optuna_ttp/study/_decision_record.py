"""The record of the pruner's decision that is stored with a trial."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any

from optuna_ttp.study._attributes import MALFORMED
from optuna_ttp.study._attributes import mapping
from optuna_ttp.study._attributes import number
from optuna_ttp.study._attributes import or_none
from optuna_ttp.study._attributes import text
from optuna_ttp.study._attributes import Word


class Action(Word):
    """The action on a trial: it runs, is skipped before its first step, or is stopped later."""

    RUN = "run"
    SKIP = "skip"
    STOP = "stop"


class Objection(Word):
    """The objection to a trial.

    The trial is predicted to diverge, to miss the target within its own budget, to cost too much
    beside the best trial, or to exceed the study's budget; or its loss curve shows no chance.
    """

    DIVERGES = "diverges"
    BUDGET = "budget"
    COST = "cost"
    STUDY_BUDGET = "study_budget"
    CHANCE = "chance"


class Override(Word):
    """The reason why a trial runs in spite of an objection.

    Predictions are not trusted; trials with the same objection did well; no trial is skipped in
    shadow mode; too many trials in a row were skipped; or the trial was drawn for the audit.
    """

    UNTRUSTED = "untrusted"
    REFUTED = "refuted"
    SHADOW = "shadow"
    TURN = "turn"
    AUDIT = "audit"


@dataclass(frozen=True)
class DecisionRecord:
    """The decision about a trial, as it is stored.

    Attributes:
        action: The action on the trial.
        reason: The reason in words.
        objection: The objection to the trial, or None.
        override: The reason why the trial runs in spite of an objection, or None.
        seconds_left: Seconds that a stopped trial would still have taken, NaN if unknown.
        log_sd: Standard deviation of the logarithm of ``seconds_left``.
        is_predicted: False if the trial runs because it had no hyperparameters to predict for.
            Records of version 0.1.0, which did not store this, are read as True.
    """

    action: Action
    reason: str
    objection: Objection | None = None
    override: Override | None = None
    seconds_left: float = math.nan
    log_sd: float = 0.0
    is_predicted: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the values that are stored, under the names that version 0.1.0 gave them."""
        values: dict[str, Any] = {"decision": self.action.value, "reason": self.reason}
        if self.objection is not None:
            values["kind"] = self.objection.value
        if self.override is not None:
            values["override"] = self.override.value
        if self.action == Action.STOP:
            values["log_sd"] = self.log_sd
            values["seconds_left"] = or_none(self.seconds_left)
        if not self.is_predicted:
            values["predicted"] = False
        return values

    @classmethod
    def from_json(cls, values: Any) -> DecisionRecord | None:
        """Read the result of :meth:`to_json`; return None if the values are no decision."""
        try:
            values = mapping(values)
            objection, override = values.get("kind"), values.get("override")
            log_sd = number(values.get("log_sd", 0.0))
            return cls(
                Action(values["decision"]),
                text(values.get("reason", "")),
                None if objection is None else Objection(objection),
                None if override is None else Override(override),
                number(values.get("seconds_left")),
                0.0 if math.isnan(log_sd) else log_sd,
                values.get("predicted") is not False,
            )
        except MALFORMED:
            return None
