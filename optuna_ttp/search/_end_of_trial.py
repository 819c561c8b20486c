"""The prediction that is stored with a trial whose pruner stored none."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_ttp.search._call_order import warn_of_missing_call
from optuna_ttp.search._goal_of_study import half_of
from optuna_ttp.study import decision_of
from optuna_ttp.study import FINISHED
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import record_prediction
from optuna_ttp.study import resolve_for_trial
from optuna_ttp.study import TrialRecord
from optuna_ttp.study import trials_of
from optuna_ttp.study import write_record


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.study import HyperparameterMap
    from optuna_ttp.study import Learner


def record_at_end(
    study: Study,
    trial: FrozenTrial,
    state: TrialState,
    mapping: HyperparameterMap,
    learner: Learner,
) -> None:
    """Store a prediction of a finishing trial; warn if the study's pruner was never asked."""
    try:
        configuration = resolve_for_trial(mapping, study, trial)
    except MissingParameterError:
        # A trial may have been pruned before it suggested its parameters.
        if state == TrialState.COMPLETE:
            raise
        return
    if configuration is None:
        return
    if state == TrialState.COMPLETE and half_of(study.pruner) is not None:
        warn_of_missing_call(study, trial)
    started = time.perf_counter()
    trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
    # The prediction must not depend on this trial's own curve.
    others = [t for t in trials if t.number != trial.number]
    predictor = learner.informed(study, others)
    configuration = configuration.clipped(predictor.n_samples)
    record = record_prediction(
        predictor,
        configuration,
        predictor.estimate(*configuration),
        budget_steps=math.inf,
        prediction_seconds=time.perf_counter() - started,
    )
    write_record(study, trial, TrialRecord(trial.number, record, decision_of(trial)))
