"""What a pruner has decided about a trial by now, as one process remembers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_ttp.study import Action
from optuna_ttp.study import Decision
from optuna_ttp.study import state_of


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.study import DecisionRecord
    from optuna_ttp.study import PredictionRecord


# Decisions about so many trials are remembered; others are read from the storage.
_MOST_REMEMBERED = 1024


@dataclass
class DecidedTrial:
    """A trial that was decided about.

    Attributes:
        prediction: What was predicted for the trial; None where its hyperparameters were unknown.
        record: What is written on the trial of the decision.
        decision: What the objective is answered.
        n_params: How many parameters had been suggested when nothing could be predicted.
        n_steps: Up to which step the trial's own curve was looked at.
    """

    prediction: PredictionRecord | None
    record: DecisionRecord
    decision: Decision
    n_params: int = 0
    n_steps: float = 0.0

    @classmethod
    def of(
        cls,
        prediction: PredictionRecord | None,
        record: DecisionRecord,
        *,
        shadow: bool,
        n_params: int = 0,
    ) -> DecidedTrial:
        """Take it from what is written on the trial; in shadow mode no trial is pruned."""
        prune = record.action != Action.RUN and not shadow
        return cls(prediction, record, Decision(prune, record.reason), n_params)

    def is_out_of_date(self, trial: FrozenTrial) -> bool:
        """Whether nothing could be predicted, and parameters have been suggested since."""
        return self.prediction is None and len(trial.params) > self.n_params


class _DecidedTrials(dict[int, DecidedTrial]):
    """What one pruner has decided about the trials of a study, by their numbers."""


def remembered(study: Study, pruner: object, trial: FrozenTrial) -> DecidedTrial | None:
    """Return what a pruner has decided about a trial in this process; None if out of date."""
    decided = state_of(study).part_of(pruner, _DecidedTrials).get(trial.number)
    return None if decided is None or decided.is_out_of_date(trial) else decided


def remember(study: Study, pruner: object, trial: FrozenTrial, decided: DecidedTrial) -> None:
    """Remember what a pruner has decided about a trial, and forget the oldest where it is much."""
    state = state_of(study)
    with state.lock:
        decided_trials = state.part_of(pruner, _DecidedTrials)
        while len(decided_trials) >= _MOST_REMEMBERED:
            decided_trials.pop(next(iter(decided_trials)))
        decided_trials[trial.number] = decided
