"""What is written on a trial of the pruner's decision about it."""

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
    """What is done with a trial: it runs, is skipped before its first step, or stopped later."""

    RUN = "run"
    SKIP = "skip"
    STOP = "stop"


class Objection(Word):
    """What speaks against a trial.

    It is predicted to diverge, to miss its own budget, to cost too much in comparison with the
    best trial, or to exceed the budget of the study; or, once it runs, it has no chance any more.
    """

    DIVERGES = "diverges"
    BUDGET = "budget"
    COST = "cost"
    STUDY_BUDGET = "study_budget"
    CHANCE = "chance"


class Override(Word):
    """Why a trial runs although something speaks against it.

    Predictions are not trusted; trials with the same objection did well; nothing is skipped in
    shadow mode; too many trials in a row were skipped; or it was drawn for the audit.
    """

    UNTRUSTED = "untrusted"
    REFUTED = "refuted"
    SHADOW = "shadow"
    TURN = "turn"
    AUDIT = "audit"


@dataclass(frozen=True)
class DecisionRecord:
    """What was decided about a trial.

    Attributes:
        action: What is done with the trial.
        reason: The reason in words.
        objection: What speaks against the trial, if anything does.
        override: Why the trial runs nevertheless, if it does.
        seconds_left: Of a stopped trial: the seconds that it would have gone on for, NaN if
            unknown.
        log_sd: Of a stopped trial: the standard deviation of the logarithm of those seconds.
    """

    action: Action
    reason: str
    objection: Objection | None = None
    override: Override | None = None
    seconds_left: float = math.nan
    log_sd: float = 0.0

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
        return values

    @classmethod
    def from_json(cls, values: Any) -> DecisionRecord | None:
        """Read what :meth:`to_json` returned; :obj:`None` if the values are no decision."""
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
            )
        except MALFORMED:
            return None
