"""What a study's trials teach a predictor."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
import gc
import math
import multiprocessing
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

import optuna_ttp
from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import HyperparameterMap
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.calibration import Calibration
from optuna_ttp.study import Learner
from optuna_ttp.study import observed_curve
from optuna_ttp.study import prediction_of
from optuna_ttp.study import trials_of
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._learner import informed_by
from optuna_ttp.study._learner import observations_of
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import observe_and_predict
from tests.studies import quick_predictor
from tests.studies import SPACE
from tests.study.curves import recorded
from tests.study.curves import run
from tests.study.curves import study_of_curves


# Made-up curves that are late or early by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


@pytest.mark.parametrize("with_pruner", [False, True], ids=["sampler", "pruner"])
def test_trials_that_take_twice_as_long_correct_the_clock(with_pruner: bool) -> None:
    predictor = quick_predictor()
    study = study_of_curves(with_pruner=with_pruner)
    add_observed(study, lambda steps: 2.0 * steps)
    calibration = informed_by(study, predictor).calibration
    assert calibration.n_observed == 6
    # The first one was warned before anything was known, so it ranks among the fast ones.
    assert calibration.rank_agreement > 0.7
    assert calibration.trusted
    # The first trial was off by two, the others less and less.
    assert calibration.log_error < math.log(2.0)
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    assert float(corrected.steps) == pytest.approx(
        2.0 * float(predictor.predict(0.05, 8, 0.0).steps), rel=0.1
    )


def test_predictions_that_were_already_corrected_are_not_corrected_twice() -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.04, 0.05, 0.06) * 4)
    calibration = informed_by(study, predictor).calibration
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    assert float(corrected.steps) == pytest.approx(
        2.0 * float(predictor.predict(0.05, 8, 0.0).steps), rel=0.1
    )


def test_trials_that_train_on_behind_their_target_are_no_errors() -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    for rate in (0.05, 0.07, 0.1, 0.15):
        steps = float(predictor.predict(rate, 8, 0.0).steps)
        study.tell(run(study, losses(steps, math.ceil(2.5 * steps)), rate), 0.0)
    calibration = informed_by(study, predictor).calibration
    # The curve has another shape than the prediction, but it is at the target on time.
    assert calibration.log_error < 0.5
    assert calibration.rank_agreement > 0.8
    assert calibration.trusted
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    assert float(corrected.steps) == pytest.approx(
        float(predictor.predict(0.05, 8, 0.0).steps), rel=0.1
    )


def test_trials_for_another_target_of_the_task_count_and_those_of_another_task_do_not() -> None:
    predictor = quick_predictor()
    study = study_of_curves(with_pruner=False)
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.05, 0.1, 0.2))
    other_target = TrainingTimePredictor(small_spectrum(), target_fraction=0.6)
    assert informed_by(study, other_target).calibration.n_observed == 3
    metadata = replace(small_spectrum().metadata, fingerprint="0" * 64)
    other_task = TrainingTimePredictor(
        replace(small_spectrum(), metadata=metadata), target_fraction=0.5
    )
    assert other_task.target == predictor.target
    assert informed_by(study, other_task).calibration.n_observed == 0
    assert informed_by(study, predictor).calibration.n_observed == 3


def test_trials_without_a_curve_or_without_a_prediction_teach_nothing() -> None:
    predictor = quick_predictor()
    study = study_of_curves(with_pruner=False)
    study.enqueue_trial(FAST)
    study.optimize(lambda t: t.suggest_float("learning_rate", 0.01, 1.0) + _rest(t), n_trials=1)
    recorded(losses(5, 20), study)
    calibration = informed_by(study, predictor).calibration
    assert calibration.n_observed == 0
    assert not calibration.weights.any()


def _rest(trial: optuna.Trial) -> float:
    return trial.suggest_int("batch_size", 1, 24) + trial.suggest_float("momentum", 0.0, 0.9)


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PRUNED, TrialState.FAIL])
def test_partial_curves_count(state: TrialState) -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    trial = run(study, losses(60.0, 40))
    if state != TrialState.RUNNING:
        study.tell(trial, state=state)
    assert study.trials[0].state == state
    [seen] = observations_of(study, predictor)
    assert seen.n_steps == 40 and not seen.diverged
    assert np.isfinite(seen.observed).sum() >= 3
    assert np.isfinite(seen.predicted).sum() >= 3
    assert informed_by(study, predictor).calibration.n_observed == 1


def test_a_running_trial_counts_with_what_it_has_recorded_by_now() -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    trial = asked(study, {**FAST, "learning_rate": 0.05})
    trial.should_prune()
    log = TrainingLog(trial)
    values = losses(60.0, 64)
    for value in values[:32]:
        log.step(value)
    assert observations_of(study, predictor)[0].n_steps == 32
    for value in values[32:]:
        log.step(value)
    assert observations_of(study, predictor)[0].n_steps == 64
    study.tell(trial, 0.0)
    assert observations_of(study, predictor)[0].n_steps == 64


def test_a_diverged_trial_is_known_to_have() -> None:
    study = study_of_curves()
    study.tell(run(study, [*losses(60.0, 40), math.nan, math.nan]), 0.0)
    [seen] = observations_of(study, quick_predictor())
    assert seen.diverged and seen.n_steps == 42


@pytest.mark.filterwarnings("ignore::optuna_ttp.CallOrderWarning")
def test_a_retried_trial_does_not_count_twice() -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    trial = run(study, losses(60.0, 40))
    study.tell(trial, state=TrialState.FAIL)
    [failed] = study.trials
    study.enqueue_trial(failed.params, user_attrs=failed.user_attrs)
    again = study.ask(SPACE)
    assert CURVE in study.trials[1].user_attrs
    assert len(observations_of(study, predictor)) == 1
    study.tell(again, 0.0)
    assert len(observations_of(study, predictor)) == 1
    assert informed_by(study, predictor).calibration.n_observed == 1


@pytest.mark.parametrize("predicted", [True, False])
def test_trials_whose_parameters_had_other_names_never_break_a_study(predicted: bool) -> None:
    """What was predicted for them is stored; what was not can no longer be, and is left out."""
    predictor = quick_predictor()

    def objective(trial: optuna.Trial, names: tuple[str, str, str]) -> float:
        rate = trial.suggest_float(names[0], 0.05, 0.2, log=True)
        trial.suggest_int(names[1], 4, 8)
        trial.suggest_float(names[2], 0.0, 0.5)
        if trial.should_prune():
            raise optuna.TrialPruned
        with TrainingLog(trial) as log:
            for value in losses(2.0 / rate, 60):
                log.step(value)
        return rate

    def steered(names: HyperparameterMap) -> dict[str, Any]:
        return {
            "sampler": TTPSampler(predictor, BestMetric(), hyperparameters=names, seed=0),
            "pruner": TTPPruner(predictor, hyperparameters=names),
        }

    old, new = ("lr", "bs", "mom"), ("learning_rate", "batch_size", "momentum")
    store = optuna.storages.InMemoryStorage()
    before = optuna.create_study(
        storage=store, study_name="s", **(steered(HyperparameterMap(*old)) if predicted else {})
    )
    before.optimize(lambda t: objective(t, old), n_trials=4)
    after = optuna.load_study(storage=store, study_name="s", **steered(HyperparameterMap(*new)))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UnusableCurveWarning)
        after.optimize(lambda t: objective(t, new), n_trials=8)
    named = [str(w.message) for w in warned if issubclass(w.category, UnusableCurveWarning)]
    assert len(named) == (0 if predicted else 1)
    assert all("not found under their names among its parameters 'bs', 'lr'" in n for n in named)
    assert {t.state for t in after.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(set(t.params) == set(new) for t in after.trials[4:])
    observed = observations_of(after, predictor)
    ran = [t for t in after.trials if observed_curve(t) is not None]
    assert len(observed) == len(ran) - (0 if predicted else 4)
    assert informed_by(after, predictor).calibration.n_observed == len(observed)


@pytest.mark.parametrize(
    ("factor", "named"), [(0.1, True), (0.5, True), (1.2, False), (4.0, True)]
)
def test_training_that_does_not_begin_as_predicted_is_named(factor: float, named: bool) -> None:
    """As where steps are counted ten times too slowly, or the spectrum is another network's."""
    study = study_of_curves()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        add_observed(study, lambda steps: factor * steps)
    begins = [str(w.message) for w in warned if "Training begins" in str(w.message)]
    assert len(begins) == named
    calibration = optuna_ttp.report(study).calibration
    assert calibration.starts_as_predicted != named
    assert ("training begins" in str(optuna_ttp.report(study))) == named
    if factor > 0.2:
        assert calibration.start_factor == pytest.approx(1.0 / factor, rel=0.15)


def test_a_sampler_alone_says_that_predictions_are_not_trusted() -> None:
    study = optuna.create_study(sampler=TTPSampler(quick_predictor(), FastestToTarget(), seed=0))
    # The faster the prediction, the slower the training.
    with pytest.warns(UnreliablePredictionWarning, match="Predictions are ignored") as warned:
        add_observed(study, lambda steps: 2000.0 / steps)
    assert len([w for w in warned if "Predictions are ignored" in str(w.message)]) == 1


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_trials_that_nothing_was_predicted_for_count_with_what_would_have_been(
    state: TrialState,
) -> None:
    predictor = quick_predictor()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for rate in (0.05, 0.07, 0.1):
        trial = asked(study, {**FAST, "learning_rate": rate})
        steps = 2.0 * float(predictor.predict(rate, 8, 0.0).steps)
        with TrainingLog(trial) as log:
            for value in losses(steps, math.ceil(1.5 * steps)):
                log.step(value)
        study.tell(trial, 0.0 if state == TrialState.COMPLETE else None, state=state)
    assert {t.state for t in study.trials} == {state}
    learned = informed_by(study, predictor)
    assert learned.calibration.n_observed == 3
    uncorrected = float(predictor.predict(0.06, 8, 0.0).steps)
    assert float(learned.predict(0.06, 8, 0.0).steps) == pytest.approx(2.0 * uncorrected, rel=0.15)
    # Sampler and pruner learn from them, too.
    study.sampler, study.pruner = TTPSampler(predictor, BestMetric(), seed=0), TTPPruner(predictor)
    after = asked(study, {**FAST, "learning_rate": 0.06})
    after.should_prune()
    prediction = prediction_of(study.trials[after.number])
    assert prediction is not None
    assert prediction.steps == pytest.approx(2.0 * uncorrected, rel=0.15)


def test_a_trial_that_failed_for_its_hyperparameters_teaches_nothing() -> None:
    predictor = quick_predictor()
    study = optuna.create_study()
    study.enqueue_trial({"learning_rate": -1.0, "batch_size": 8, "momentum": 0.0})
    trial = study.ask({**SPACE, "learning_rate": FloatDistribution(-2.0, 1.0)})
    with TrainingLog(trial) as log:
        for value in losses(30.0, 40):
            log.step(value)
    study.tell(trial, state=TrialState.FAIL)
    assert observations_of(study, predictor) == []


def test_processes_on_one_storage_learn_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="shared", storage=url)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        first, second = (
            pool.submit(observe_and_predict, url, (0.05, 0.1)),
            pool.submit(observe_and_predict, url, (0.07, 0.15)),
        )
        first.result(), second.result()
        learned = [pool.submit(observe_and_predict, url, ()).result() for _ in range(3)]
    learned.append(observe_and_predict(url, ()))
    assert len(study.trials) == 4
    assert all(n_observed == 4 for n_observed, _ in learned)
    assert all(steps == learned[0][1] for _, steps in learned)
    plain = quick_predictor().predict([0.05, 0.1], 8, 0.0).steps
    assert (np.array(learned[0][1]) > 1.2 * plain).all()


@pytest.mark.filterwarnings("ignore::optuna_ttp.CallOrderWarning")
def test_tiny_learning_rates_are_learned_from_without_divisions_by_zero() -> None:
    """The step over the stability limit was rounded to zero when it was written down."""
    predictor = quick_predictor()
    study = study_of_curves()
    for rate in (1e-5, 2e-5, 1e-4, 0.1):
        trial = asked(study, {**FAST, "learning_rate": rate})
        with TrainingLog(trial) as log:
            for value in losses(1.2 / rate, 50):
                log.step(value)
        study.tell(trial, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        learned = informed_by(study, predictor)
        learned.estimate(0.1, 8, 0.0)
    for seen in observations_of(study, predictor):
        assert (seen.instability[np.isfinite(seen.instability)] > 0.0).all()


def _observed_study() -> optuna.Study:
    study = optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner())
    add_observed(study, lambda steps: 2.0 * steps)
    return study


def test_a_predictor_at_the_address_of_a_forgotten_one_is_asked_itself() -> None:
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
