"""One line of a report: a trial's prediction, the decision about it, and its seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import paid_seconds
from optuna_ttp.study import prediction_of
from optuna_ttp.study import PredictionRecord
from optuna_ttp.study import progress_to_target


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class LedgerLine:
    """One trial of a report. Numbers that are not known are NaN.

    Attributes:
        number:
            The trial's number.
        state:
            The name of the trial's state in Optuna.
        params:
            The trial's parameters, values by name.
        outcome:
            The predicted outcome, or :obj:`None` if there is no prediction.
        predicted_steps:
            Predicted optimiser steps to the target.
        predicted_seconds:
            Predicted seconds to the target.
        decision:
            ``"run"``, ``"skip"`` (before its first step), ``"stop"`` (while it ran), or
            :obj:`None` if there was no decision.
        kind:
            The objection to the trial: ``"diverges"``, ``"budget"``, ``"cost"``,
            ``"study_budget"`` or ``"chance"``; :obj:`None` if there was none.
        override:
            The reason why it ran despite the objection: ``"untrusted"``, ``"refuted"``,
            ``"shadow"``, ``"turn"`` or ``"audit"``; :obj:`None` for all other trials.
        reason:
            The reason of the decision, in words.
        paid_seconds:
            Seconds from the trial's start to its end.
        avoided_seconds:
            Estimated seconds that the decision avoided. For a skipped trial this is its budget
            times the average share that trials which ran used of theirs, or without a budget their
            mean seconds; for a stopped trial it is the predicted rest of its training.
        avoided_sd:
            The standard deviation of that estimate, in seconds.
        prediction_seconds:
            Seconds that the prediction took.
        value:
            The objective value, if there is a single one.
        was_wrong:
            For a trial that ran despite its prediction: True if skipping it would have been wrong,
            because it reached the target within its budget or became the best trial, else False.
            :obj:`None` for all other trials, and if this is unknown.
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
        """Return the line of a trial; ``best`` is the number of the study's best trial or None."""
        prediction, decision = prediction_of(trial), decision_of(trial)
        avoided, avoided_sd = typical.avoided(prediction, decision)
        values = trial.values or []
        objection = None if decision is None else decision.objection
        override = None if decision is None else decision.override
        return cls(
            number=trial.number,
            state=trial.state.name,
            params=dict(trial.params),
            outcome=None if prediction is None else prediction.outcome.value,
            predicted_steps=math.nan if prediction is None else prediction.steps,
            predicted_seconds=math.nan if prediction is None else prediction.seconds,
            decision=None if decision is None else decision.action.value,
            kind=None if objection is None else objection.value,
            override=None if override is None else override.value,
            reason="" if decision is None else decision.reason,
            paid_seconds=paid_seconds(trial),
            avoided_seconds=avoided,
            avoided_sd=avoided_sd,
            prediction_seconds=0.0 if prediction is None else prediction.prediction_seconds,
            value=values[0] if len(values) == 1 else math.nan,
            was_wrong=None if override is None else _was_wrong(trial, best),
        )


@dataclass(frozen=True)
class TypicalCost:
    """The cost of a study's finished trials that were not skipped.

    Attributes:
        seconds: Mean seconds of these trials; NaN if there are none.
        share: Mean share of its budget that a trial used; one if none had a budget.
        seconds_sd: Standard deviation of the seconds; NaN for fewer than two trials.
        share_sd: Standard deviation of the share; NaN for fewer than two trials with a budget.
    """

    seconds: float
    share: float
    seconds_sd: float
    share_sd: float

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> TypicalCost:
        """Return the cost of the trials among ``trials`` that finished and were not skipped."""
        seconds, shares = [], []
        for trial in trials:
            paid = paid_seconds(trial)
            prediction, decision = prediction_of(trial), decision_of(trial)
            is_skipped = decision is not None and decision.action == Action.SKIP
            if is_skipped or not math.isfinite(paid):
                continue
            seconds.append(paid)
            if prediction is not None and prediction.budget_seconds > 0.0:
                shares.append(min(1.0, paid / prediction.budget_seconds))
        return cls(
            sum(seconds) / len(seconds) if seconds else math.nan,
            sum(shares) / len(shares) if shares else 1.0,
            float(np.std(seconds, ddof=1)) if len(seconds) > 1 else math.nan,
            float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan,
        )

    def avoided(
        self, prediction: PredictionRecord | None, decision: DecisionRecord | None
    ) -> tuple[float, float]:
        """Return the seconds that a decision avoided, and their standard deviation; else zeros."""
        if decision is None or decision.action == Action.RUN:
            return 0.0, 0.0
        if decision.action == Action.STOP:
            return decision.seconds_left, decision.seconds_left * decision.log_sd
        # Few trials use up their budget: wrapped pruners and the objective end them early.
        if prediction is None or math.isnan(prediction.budget_seconds):
            return self.seconds, self.seconds_sd
        budget = prediction.budget_seconds
        return self.share * budget, self.share_sd * budget


def _was_wrong(trial: FrozenTrial, best: int | None) -> bool | None:
    """Return True if a trial reached its target or is the best, else False; None if unknown."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if trial.number == best:
        return True
    progress = progress_to_target(trial)
    if math.isnan(progress):
        return False if trial.state == TrialState.COMPLETE and best is not None else None
    return progress >= 1.0
