"""A trial's hyperparameters, and whether a missing one is conditional or a wrong name."""

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
    """Return a trial's hyperparameters, telling a conditional parameter from a wrong name.

    Args:
        mapping:
            The map.
        study:
            The study.
        trial:
            The trial, with its parameters suggested.

    Returns:
        The hyperparameters, or :obj:`None` where the map does not apply to this trial.

    Raises:
        ValueError:
            If the map reads a parameter that no trial of the study has.
    """
    try:
        return mapping.resolve(trial.params)
    except MissingParameterError:
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        seen = {name for t in trials for name in t.params}
        if mapping.parameters_read(trial.params) <= seen | set(trial.params):
            return None
        raise
