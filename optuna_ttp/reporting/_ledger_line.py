"""What is known of one trial: its prediction, the decision about it, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from optuna_ttp.study import DECISION
from optuna_ttp.study import entry
from optuna_ttp.study import or_nan
from optuna_ttp.study import paid_seconds
from optuna_ttp.study import PREDICTION
from optuna_ttp.study import progress_to_target
from optuna_ttp.study import SKIP
from optuna_ttp.study import STOP


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class LedgerLine:
    """One trial of a report. Numbers that are not known are NaN.

    Attributes:
        number:
            The trial's number.
        state:
            The name of its state in Optuna.
        params:
            Its parameters.
        outcome:
            The predicted outcome, or :obj:`None` where nothing was predicted.
        predicted_steps:
            Predicted optimiser steps to the target.
        predicted_seconds:
            Predicted seconds to the target.
        decision:
            ``"run"``, ``"skip"`` (before its first step), ``"stop"`` (while it ran), or
            :obj:`None` where nothing was decided.
        kind:
            Why its prediction or its loss curve was bad: ``"diverges"``, ``"budget"``, ``"cost"``,
            ``"study_budget"`` or ``"chance"``; :obj:`None` where it was not.
        override:
            Why it ran despite that: ``"untrusted"``, ``"refuted"``, ``"shadow"``, ``"turn"`` or
            ``"audit"``; :obj:`None` for all other trials.
        reason:
            The reason of the decision, in words.
        paid_seconds:
            Seconds from the trial's start to its end.
        avoided_seconds:
            Estimated seconds that the decision avoided. For a skipped trial this is the share of
            its budget that the trials which ran used on average, or their mean seconds where there
            is no budget; for a stopped trial it is how much longer it was predicted to run.
        avoided_sd:
            The standard deviation of that estimate, in seconds.
        prediction_seconds:
            Seconds that its prediction took.
        value:
            Its objective value, where it has a single one.
        was_wrong:
            For a trial that ran despite its prediction: whether skipping it would have been wrong,
            because it reached the target within its budget or became the best trial. :obj:`None`
            for all other trials, and where this cannot be known.
    """

    number: int
    state: str
    params: dict[str, Any]
    outcome: str | None
    predicted_steps: float
    predicted_seconds: float
    decision: str | None
    kind: str | None
    override: str | None
    reason: str
    paid_seconds: float
    avoided_seconds: float
    avoided_sd: float
    prediction_seconds: float
    value: float
    was_wrong: bool | None

    @classmethod
    def of(cls, trial: FrozenTrial, typical: TypicalCost, best: int | None) -> LedgerLine:
        """Read a trial. ``best`` is the number of the best trial, if there is one."""
        prediction = entry(trial, PREDICTION) or {}
        decision = entry(trial, DECISION) or {}
        avoided, avoided_sd = typical.avoided(prediction, decision)
        values = trial.values or []
        return cls(
            number=trial.number,
            state=trial.state.name,
            params=dict(trial.params),
            outcome=prediction.get("outcome"),
            predicted_steps=or_nan(prediction.get("steps")),
            predicted_seconds=or_nan(prediction.get("seconds")),
            decision=decision.get("decision"),
            kind=decision.get("kind"),
            override=decision.get("override"),
            reason=decision.get("reason", ""),
            paid_seconds=paid_seconds(trial),
            avoided_seconds=avoided,
            avoided_sd=avoided_sd,
            prediction_seconds=float(prediction.get("prediction_seconds", 0.0)),
            value=values[0] if len(values) == 1 else math.nan,
            was_wrong=_was_wrong(trial, best) if decision.get("override") else None,
        )


@dataclass(frozen=True)
class TypicalCost:
    """What the trials of a study took that were not skipped.

    Attributes:
        seconds:
            Their mean seconds; NaN where none ran.
        share:
            The mean share of their budget that they used; one where none had a budget.
        seconds_sd:
            Standard deviation of their seconds; NaN where fewer than two ran.
        share_sd:
            Standard deviation of the share; NaN where fewer than two had a budget.
    """

    seconds: float
    share: float
    seconds_sd: float
    share_sd: float

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> TypicalCost:
        """Return the mean and the standard deviation over the trials that were not skipped."""
        seconds, shares = [], []
        for trial in trials:
            paid = paid_seconds(trial)
            decision = (entry(trial, DECISION) or {}).get("decision")
            if decision == SKIP or not math.isfinite(paid):
                continue
            seconds.append(paid)
            budget = (entry(trial, PREDICTION) or {}).get("budget_seconds")
            if budget:
                shares.append(min(1.0, paid / budget))
        return cls(
            sum(seconds) / len(seconds) if seconds else math.nan,
            sum(shares) / len(shares) if shares else 1.0,
            float(np.std(seconds, ddof=1)) if len(seconds) > 1 else math.nan,
            float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan,
        )

    def avoided(self, prediction: dict[str, Any], decision: dict[str, Any]) -> tuple[float, float]:
        """Return the seconds that a decision avoided, and their standard deviation."""
        if decision.get("decision") == STOP:
            seconds = or_nan(decision.get("seconds_left"))
            return seconds, seconds * float(decision.get("log_sd", 0.0))
        if decision.get("decision") != SKIP:
            return 0.0, 0.0
        # Few trials use up their budget: wrapped pruners and the objective end them early.
        budget = prediction.get("budget_seconds")
        if budget is None:
            return self.seconds, self.seconds_sd
        return self.share * budget, self.share_sd * budget


def _was_wrong(trial: FrozenTrial, best: int | None) -> bool | None:
    """Return whether a trial did well although its prediction was bad; None if unknown."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if trial.number == best:
        return True
    progress = progress_to_target(trial)
    if math.isnan(progress):
        return False if trial.state == TrialState.COMPLETE and best is not None else None
    return progress >= 1.0
