"""Trials with curves, and a study whose trials are predicted."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial

from optuna_ttp import BestMetric
from optuna_ttp import TrainingLog
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import CurveRecord
from optuna_ttp.study._curve_record import curve_attribute
from optuna_ttp.study._curve_record import stored_curve
from tests.studies import asked
from tests.studies import FAST
from tests.studies import quick_predictor


def recorded(values: Any, study: optuna.Study | None = None) -> FrozenTrial:
    """A finished trial whose log has recorded these losses."""
    study = study or optuna.create_study()
    trial = study.ask()
    with TrainingLog(trial) as log:
        for value in values:
            log.step(value)
    study.tell(trial, 0.0)
    return study.trials[trial.number]


def study_of_curves(*, with_pruner: bool = True, store: Any = None) -> optuna.Study:
    """A study whose trials are predicted by its sampler, and by a pruner if it has one."""
    predictor = quick_predictor()
    pruner = TTPPruner(predictor) if with_pruner else optuna.pruners.NopPruner()
    return optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0), pruner=pruner, storage=store
    )


def run(study: optuna.Study, values: Any, rate: float = 0.05, **steps: Any) -> optuna.Trial:
    """A trial that was predicted and has recorded this; it is still running."""
    trial = asked(study, {**FAST, "learning_rate": rate})
    trial.should_prune()
    with TrainingLog(trial) as log:
        for k, value in enumerate(values):
            log.step(value, **{name: place[k] for name, place in steps.items()})
    return trial


def curve_record(trial: BaseTrial) -> CurveRecord:
    """What a log has written on a trial, also if none of its losses was finite."""
    record = stored_curve(curve_attribute(trial))
    assert isinstance(record, CurveRecord)
    return record
