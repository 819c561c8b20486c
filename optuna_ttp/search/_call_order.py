"""Warnings of an objective that calls ``should_prune()`` too early for a prediction, or never."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.exceptions import CallOrderWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import is_first_warning
from optuna_ttp.study import MissingParameterError


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.study import HyperparameterMap


_CURE = (
    "Call trial.should_prune() after the suggestions and before training: if it returns True, "
    "raise optuna.TrialPruned."
)


def decision_without_prediction(trial: FrozenTrial) -> DecisionRecord:
    """Return the decision to run a trial that gives the hyperparameter map no hyperparameters.

    Either the trial has no parameter yet, or the map does not apply to it.
    """
    cause = "no parameter had been suggested when should_prune() was called"
    if trial.params:
        cause = "the hyperparameter map does not apply to this trial"
    return DecisionRecord(Action.RUN, f"no prediction: {cause}", is_predicted=False)


def warn_of_early_call(
    study: Study, trial: FrozenTrial, others: Sequence[FrozenTrial], mapping: HyperparameterMap
) -> None:
    """Warn once per study if the objective calls ``should_prune()`` before it suggests parameters.

    The warning needs a finished trial among ``others`` without a prediction whose parameters now
    give hyperparameters: otherwise the study may have no such parameters.
    """
    too_early = (one for one in others if one.state.is_finished() and _was_early(one, mapping))
    earlier = next(too_early, None)
    if earlier is not None and is_first_warning(study, "early call"):
        warn_caller(
            f"should_prune() was called before the hyperparameters of trial {earlier.number} were "
            f"suggested, and so it is for trial {trial.number}: nothing is predicted, and no "
            f"trial can be skipped. {_CURE}",
            CallOrderWarning,
        )


def _was_early(trial: FrozenTrial, mapping: HyperparameterMap) -> bool:
    """Return True if a trial got no prediction, but its parameters now give hyperparameters."""
    decision = decision_of(trial)
    if decision is None or decision.is_predicted:
        return False
    try:
        return mapping.resolve(trial.params) is not None
    except (MissingParameterError, TypeError, ValueError):
        return False


def warn_of_missing_call(study: Study, trial: FrozenTrial) -> None:
    """Warn once per study if a completing trial has no decision of the study's pruner."""
    if decision_of(trial) is None and is_first_warning(study, "missing call"):
        warn_caller(
            f"should_prune() was never called in trial {trial.number}, so TTPPruner can skip and "
            f"stop no trial. {_CURE}",
            CallOrderWarning,
        )
