"""What a study's trials teach a predictor, and what is remembered of it."""

from __future__ import annotations

import gc

import optuna
from optuna.samplers import RandomSampler
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import Calibration
from optuna_ttp.study import Learner
from optuna_ttp.study import trials_of
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import make_pruner
from tests.studies import quick_predictor


# Made-up curves that are late by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


def _observed_study() -> optuna.Study:
    study = optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner())
    add_observed(study, lambda steps: 2.0 * steps)
    return study


def test_a_predictor_at_the_address_of_a_forgotten_one_gets_its_own_answer() -> None:
    """Nothing kept a predictor alive that had learned, but its address was remembered."""
    study = _observed_study()
    other_predictor = TrainingTimePredictor(small_spectrum(), target_fraction=0.7, max_steps=60)
    first = quick_predictor().calibrated(Calibration.none())
    address = id(first)
    Learner(first, HyperparameterMap()).informed(study, trials_of(study))
    del first
    gc.collect()
    others = []
    for _ in range(1000):
        others.append(other_predictor.calibrated(Calibration.none()))
        if id(others[-1]) == address:
            break
    learner = Learner(others[-1], HyperparameterMap())
    assert learner.last(study) is others[-1]
    learned = learner.informed(study, trials_of(study))
    assert learned.target == other_predictor.target
