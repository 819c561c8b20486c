from __future__ import annotations

import optuna
import pytest

from optuna_ttp import FastestToTarget
from optuna_ttp import SamplerRules
from optuna_ttp import SGD
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import prediction_of
from tests.models import small_spectrum


def _objective(trial: optuna.Trial) -> float:
    trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    trial.suggest_int("batch_size", 1, 24)
    if trial.should_prune():
        raise optuna.TrialPruned
    return float(trial.number)


def _study(optimizer: SGD, base: optuna.samplers.BaseSampler) -> optuna.Study:
    predictor = TrainingTimePredictor(
        small_spectrum(), target_fraction=0.5, max_steps=60, optimizer=optimizer
    )
    rules = SamplerRules(n_candidates=3, exploration=0.0)
    sampler = TTPSampler(predictor, FastestToTarget(), base, seed=0, rules=rules)
    return optuna.create_study(sampler=sampler, pruner=TTPPruner(predictor))


@pytest.mark.parametrize("base", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_trials_without_a_momentum_have_that_of_the_optimiser(
    base: type[optuna.samplers.RandomSampler],
) -> None:
    study = _study(SGD(momentum=0.9), base(seed=0))
    study.optimize(_objective, n_trials=6)
    for trial in study.trials:
        prediction = prediction_of(trial)
        assert prediction is not None
        assert prediction.momentum == 0.9


def test_trials_without_a_momentum_are_refused_where_no_optimiser_gives_one() -> None:
    study = _study(SGD(nesterov=True), optuna.samplers.RandomSampler(seed=0))
    with pytest.raises(MissingParameterError, match="reads momentum from the parameter"):
        study.optimize(_objective, n_trials=6)
