"""The decision of a pruner about a trial, as one process remembers it."""

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


# The largest number of decisions that are remembered; others are read from the storage.
_MOST_REMEMBERED = 1024


@dataclass
class DecidedTrial:
    """A trial about which the pruner has decided.

    Attributes:
        prediction: The trial's prediction; None if its hyperparameters were unknown.
        record: The decision as it is stored with the trial.
        decision: The answer to the objective.
        n_params: The number of suggested parameters when nothing could be predicted, else zero.
        n_steps: The number of steps of the trial's loss curve at its last check.
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
        """Make it from the stored records; in shadow mode the decision never prunes."""
        prune = record.action != Action.RUN and not shadow
        return cls(prediction, record, Decision(prune, record.reason), n_params)

    def is_out_of_date(self, trial: FrozenTrial) -> bool:
        """Return True if there is no prediction and the trial has got further parameters since."""
        return self.prediction is None and len(trial.params) > self.n_params


class _DecidedTrials(dict[int, DecidedTrial]):
    """The decisions of one pruner about the trials of a study, by the number of the trial."""


def remembered(study: Study, pruner: object, trial: FrozenTrial) -> DecidedTrial | None:
    """Return a pruner's decision about a trial in this process; None if none or out of date."""
    decided = state_of(study).part_of(pruner, _DecidedTrials).get(trial.number)
    return None if decided is None or decided.is_out_of_date(trial) else decided


def remember(study: Study, pruner: object, trial: FrozenTrial, decided: DecidedTrial) -> None:
    """Keep a pruner's decision about a trial; the oldest is forgotten beyond 1,024 decisions."""
    state = state_of(study)
    with state.lock:
        decided_trials = state.part_of(pruner, _DecidedTrials)
        while len(decided_trials) >= _MOST_REMEMBERED:
            decided_trials.pop(next(iter(decided_trials)))
        decided_trials[trial.number] = decided
