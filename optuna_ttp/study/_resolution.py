"""A trial's hyperparameters, with missing parameters told apart: conditional or wrongly named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_ttp.study._hyperparameters import MissingParameterError
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import trials_of


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.study._hyperparameters import Configuration
    from optuna_ttp.study._hyperparameters import HyperparameterMap


def resolve_for_trial(
    mapping: HyperparameterMap, study: Study, trial: FrozenTrial
) -> Configuration | None:
    """Return the hyperparameters of a trial whose parameters have been suggested.

    It is None if the map does not apply to the trial, for example because a parameter that it
    reads belongs to another branch of a conditional space. Raise MissingParameterError if no trial
    of the study has that parameter, so that its name must be wrong.
    """
    try:
        return mapping.resolve(trial.params)
    except MissingParameterError:
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        seen = {name for t in trials for name in t.params}
        if mapping.parameters_read(trial.params) <= seen | set(trial.params):
            return None
        raise
