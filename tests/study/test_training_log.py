from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
import pytest
import torch

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
from optuna_ttp.study import curve_of
from optuna_ttp.study import CurveRecord
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import observed_curve
from optuna_ttp.study import observed_steps
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._learner import informed_by
from optuna_ttp.study._learner import observations_of
from tests.models import small_spectrum
from tests.models import vectors
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import observe_and_predict
from tests.studies import quick_predictor
from tests.studies import SPACE
from tests.studies import storage
from tests.studies import STORAGES
from tests.studies import suggest


# Made-up curves that are late or early by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


def _recorded(values: Any, study: optuna.Study | None = None) -> optuna.trial.FrozenTrial:
    study = study or optuna.create_study()
    trial = study.ask()
    with TrainingLog(trial) as log:
        for value in values:
            log.step(value)
    study.tell(trial, 0.0)
    return study.trials[trial.number]


@pytest.mark.parametrize("kind", STORAGES)
def test_a_curve_comes_back_from_every_storage(kind: str) -> None:
    with storage(kind) as store:
        study = optuna.create_study(storage=store)
        _recorded(losses(50, 100), study)
        [trial] = optuna.load_study(study_name=study.study_name, storage=store).trials
    curve = observed_curve(trial)
    assert curve is not None
    steps = curve.steps
    assert steps[0] == 0 and steps[-1] == 99
    assert curve.n_steps == 100 and not curve.diverged
    assert (np.diff(steps) > 0).all()
    np.testing.assert_allclose(curve.losses, losses(50, 100)[steps.astype(int)], rtol=2e-3)
    np.testing.assert_array_equal(np.isfinite(curve.errors), True)


@pytest.mark.parametrize("kind", ["inmemory", "sqlite"])
def test_what_was_recorded_so_far_survives_a_killed_process(kind: str) -> None:
    with storage(kind) as store:
        study = optuna.create_study(storage=store)
        trial = study.ask()
        log = TrainingLog(trial)
        for loss in losses(50, 32):
            log.step(loss)
        [stored] = study.get_trials()
        assert stored.state == TrialState.RUNNING
        curve = observed_curve(stored)
        assert curve is not None
        assert curve.steps[-1] == 31


def test_a_curve_stays_that_of_the_whole_training_as_it_grows() -> None:
    trial = _recorded(losses(100, 1000))
    assert trial.user_attrs[CURVE]["n_steps"] == 1000
    curve = observed_curve(trial)
    assert curve is not None
    assert curve.steps[0] == 0 and curve.steps[-1] == 999


def test_a_curve_ends_where_the_loss_is_not_finite_any_more() -> None:
    values = losses(50, 100)
    values[60:] = math.nan
    trial = _recorded(values)
    curve = observed_curve(trial)
    assert curve is not None
    assert curve.steps[-1] == 59
    assert curve.diverged
    assert np.isfinite(curve.losses).all()
    assert trial.user_attrs[CURVE]["n_steps"] == 100
    assert observed_steps(trial, quick_predictor()) == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_target_that_was_not_reached_before_the_loss_blew_up_is_never_reached(
    bad: float,
) -> None:
    assert observed_steps(_recorded([*losses(50, 20), bad]), quick_predictor()) == math.inf


def test_nothing_is_observed_where_no_loss_is_finite() -> None:
    trial = _recorded([math.nan, math.inf, math.nan])
    assert trial.user_attrs[CURVE]["diverged"]
    assert observed_curve(trial) is None
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_losses_at_the_edge_of_what_a_float_can_hold_are_json() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = _recorded([1.0, *[1.7e308] * 10])
    json.dumps(trial.user_attrs, allow_nan=False)


def test_an_empty_log_says_so() -> None:
    with pytest.warns(UnusableCurveWarning, match="of trial 0 is left out: it is empty"):
        trial = _recorded([])
    assert trial.user_attrs == {CURVE: {"trial": 0, "unusable": "it is empty", "kind": "empty"}}
    assert observed_curve(trial) is None
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_a_tensor_of_one_element_is_a_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = _recorded(
            [torch.tensor(0.5, requires_grad=True), torch.tensor([0.25]), np.float32(0.2)]
        )
    curve = observed_curve(trial)
    assert curve is not None and len(curve.steps) == 3


@pytest.mark.parametrize(
    ("error", "state"),
    [(optuna.TrialPruned, TrialState.PRUNED), (RuntimeError, TrialState.FAIL)],
)
def test_a_trial_that_stopped_early_keeps_its_curve(
    error: type[Exception], state: TrialState
) -> None:
    def objective(trial: optuna.Trial) -> float:
        with TrainingLog(trial) as log:
            for loss in losses(50, 10):
                log.step(loss)
            raise error

    study = optuna.create_study()
    study.optimize(objective, n_trials=1, catch=(RuntimeError,))
    [trial] = study.trials
    assert trial.state == state
    curve = observed_curve(trial)
    assert curve is not None
    assert curve.steps.tolist() == list(range(10))


def test_the_curve_of_a_long_training_stays_small() -> None:
    trial = _recorded(losses(30_000, 100_000))
    # A text column of MySQL holds 65,535 bytes.
    assert len(json.dumps(trial.user_attrs[CURVE])) < 65_000
    assert observed_steps(trial, quick_predictor()) == pytest.approx(30_000, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 5, 40, 700])
def test_the_observed_time_is_that_of_the_curve(steps: int) -> None:
    observed = observed_steps(_recorded(losses(steps, 3 * steps + 3)), quick_predictor())
    assert observed == pytest.approx(steps, rel=0.03, abs=1.5)


def test_the_noise_of_mini_batches_does_not_count_as_reaching_the_target() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.3, 1200))
    values = losses(400, 1200) * noise / noise.mean()
    target = quick_predictor().target.value
    first_dip = int(np.flatnonzero(values <= target)[0])
    assert first_dip < 250
    assert observed_steps(_recorded(values), quick_predictor()) == pytest.approx(400, rel=0.1)


def test_a_target_in_accuracy_is_not_observed_in_losses() -> None:
    predictor = TrainingTimePredictor(small_spectrum(), target_accuracy=0.95)
    assert math.isnan(observed_steps(_recorded(losses(5, 20)), predictor))


def test_a_curve_copied_from_another_trial_does_not_count() -> None:
    study = optuna.create_study()
    first = _recorded(losses(5, 20), study)
    study.enqueue_trial({}, user_attrs=first.user_attrs)
    study.tell(study.ask(), 0.0)
    copied = study.trials[1]
    assert CURVE in copied.user_attrs
    assert observed_curve(copied) is None


# What a study's trials teach


def _study(*, with_pruner: bool = True, store: Any = None) -> optuna.Study:
    predictor = quick_predictor()
    pruner = TTPPruner(predictor) if with_pruner else optuna.pruners.NopPruner()
    return optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0), pruner=pruner, storage=store
    )


def _run(study: optuna.Study, values: Any, rate: float = 0.05, **steps: Any) -> optuna.Trial:
    """A trial that was predicted and has recorded this; it is still running."""
    trial = asked(study, {**FAST, "learning_rate": rate})
    trial.should_prune()
    with TrainingLog(trial) as log:
        for k, value in enumerate(values):
            log.step(value, **{name: place[k] for name, place in steps.items()})
    return trial


@pytest.mark.parametrize("with_pruner", [False, True], ids=["sampler", "pruner"])
def test_trials_that_take_twice_as_long_correct_the_clock(with_pruner: bool) -> None:
    predictor = quick_predictor()
    study = _study(with_pruner=with_pruner)
    add_observed(study, lambda steps: 2.0 * steps)
    calibration = informed_by(study, predictor).calibration
    assert calibration.n_observed == 6
    # The first one was told before anything was known, so it ranks among the fast ones.
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
    study = _study()
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.04, 0.05, 0.06) * 4)
    calibration = informed_by(study, predictor).calibration
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    assert float(corrected.steps) == pytest.approx(
        2.0 * float(predictor.predict(0.05, 8, 0.0).steps), rel=0.1
    )


def test_trials_that_train_on_behind_their_target_are_no_errors() -> None:
    predictor = quick_predictor()
    study = _study()
    for rate in (0.05, 0.07, 0.1, 0.15):
        steps = float(predictor.predict(rate, 8, 0.0).steps)
        study.tell(_run(study, losses(steps, math.ceil(2.5 * steps)), rate), 0.0)
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
    study = _study(with_pruner=False)
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
    study = _study(with_pruner=False)
    study.enqueue_trial(FAST)
    study.optimize(lambda t: t.suggest_float("learning_rate", 0.01, 1.0) + _rest(t), n_trials=1)
    _recorded(losses(5, 20), study)
    calibration = informed_by(study, predictor).calibration
    assert calibration.n_observed == 0
    assert not calibration.weights.any()


def _rest(trial: optuna.Trial) -> float:
    return trial.suggest_int("batch_size", 1, 24) + trial.suggest_float("momentum", 0.0, 0.9)


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PRUNED, TrialState.FAIL])
def test_partial_curves_count(state: TrialState) -> None:
    predictor = quick_predictor()
    study = _study()
    trial = _run(study, losses(60.0, 40))
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
    study = _study()
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
    study = _study()
    study.tell(_run(study, [*losses(60.0, 40), math.nan, math.nan]), 0.0)
    [seen] = observations_of(study, quick_predictor())
    assert seen.diverged and seen.n_steps == 42


def test_a_retried_trial_does_not_count_twice() -> None:
    predictor = quick_predictor()
    study = _study()
    trial = _run(study, losses(60.0, 40))
    study.tell(trial, state=TrialState.FAIL)
    [failed] = study.trials
    study.enqueue_trial(failed.params, user_attrs=failed.user_attrs)
    again = study.ask(SPACE)
    assert CURVE in study.trials[1].user_attrs
    assert len(observations_of(study, predictor)) == 1
    study.tell(again, 0.0)
    assert len(observations_of(study, predictor)) == 1
    assert informed_by(study, predictor).calibration.n_observed == 1


# Every k-th step


def test_steps_may_be_recorded_now_and_then() -> None:
    every, some = (optuna.create_study().ask() for _ in range(2))
    values = losses(300.0, 900)
    with TrainingLog(every) as log, TrainingLog(some) as sparse:
        for step, value in enumerate(values):
            log.step(value)
            if step % 10 == 0:
                sparse.step(value, step=step)
    curves = [observed_curve(t.study.trials[0]) for t in (every, some)]
    first, other = curves
    assert first is not None and other is not None
    assert other.n_steps == 891
    assert set(other.steps) <= set(range(0, 900, 10))
    np.testing.assert_allclose(other.losses, values[other.steps.astype(int)], rtol=5e-3)
    levels = values[0] * np.exp(-np.array([0.3, 0.7, 1.5]))
    np.testing.assert_allclose(
        other.log_first_passage_times(levels)[0],
        first.log_first_passage_times(levels)[0],
        atol=0.02,
    )


def test_a_step_without_a_number_is_the_next_one() -> None:
    trial = optuna.create_study().ask()
    with TrainingLog(trial) as log:
        log.step(1.0, step=10)
        log.step(0.9)
        log.step(0.8, step=20)
        log.step(0.7)
    curve = observed_curve(trial.study.trials[0])
    assert curve is not None
    assert curve.steps.tolist() == [10, 11, 20, 21]
    assert curve.n_steps == 22


def test_the_time_of_a_step_is_that_between_recorded_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(np.arange(100.0))
    monkeypatch.setattr("optuna_ttp.study._training_log.time.perf_counter", lambda: next(clock))
    trial = optuna.create_study().ask()
    with TrainingLog(trial) as log:
        for k in range(10):
            log.step(1.0, step=4 * k)
    assert trial.study.trials[0].user_attrs[CURVE]["seconds_per_step"] == 0.25


# Curves that cannot be used


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ([1.0, -0.5, 0.3, -0.2], [0, 1, 2, 3], "negative: -0.5 at step 1"),
        ([1.0, -math.inf, 0.3], [0, 1, 2], "negative: -inf at step 1"),
        ([1.0, 0.9, 0.8, 0.7], [0, 5, 5, 4], "do not ascend: 5 came after 5"),
        ([1.0, 0.9], [-1, 0], "no numbers of optimiser steps: -1"),
        ([1.0, 0.9], [0, 10**18], f"no numbers of optimiser steps: {10**18}"),
        ([1.0, 0.9], [0.5, 1.5], "no numbers of optimiser steps: 0.5"),
        ([1.0, 0.9], [0.0, math.nan], "no numbers of optimiser steps: nan"),
        ([1.0, 0.9], [0.0, math.inf], "no numbers of optimiser steps: inf"),
    ],
)
def test_a_curve_that_cannot_be_one_is_reported_once_and_left_out(
    values: list[float], steps: list[float], message: str
) -> None:
    study = _study()
    with pytest.warns(UnusableCurveWarning, match=f"of trial 0 is left out: .*{message}") as told:
        trial = _run(study, values, step=steps)
    assert len(told) == 1
    study.tell(trial, 0.0)
    assert observed_curve(study.trials[0]) is None
    # No second warning.
    assert observations_of(study, quick_predictor()) == []
    json.dumps(study.trials[0].user_attrs, allow_nan=False)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (8.0, "about 8 times the initial training loss .* a sum over the batch of 8 instead"),
        (100.0, "must be another loss"),
        (0.01, "must be another loss"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_loss_is_named_once_and_left_out(
    factor: float, message: str, finished: bool
) -> None:
    predictor = quick_predictor()
    study = _study()
    trial = _run(study, factor * losses(30.0, 40))
    if finished:
        study.tell(trial, 0.0)
    with pytest.warns(UnusableCurveWarning, match=message) as told:
        assert observations_of(study, predictor) == []
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert informed_by(study, predictor).calibration.n_observed == 0


@pytest.mark.filterwarnings("always::optuna_ttp.UnusableCurveWarning")
def test_unusable_curves_never_break_a_study() -> None:
    study = _study()

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 0.05, 0.2, log=True)
        trial.suggest_int("batch_size", 8, 8)
        trial.suggest_float("momentum", 0.0, 0.0)
        if trial.should_prune():
            raise optuna.TrialPruned
        values = losses(20.0, 30) * (8.0 if trial.number == 1 else 1.0)
        values[5] = {0: -1.0, 2: math.nan}.get(trial.number, values[5])
        with TrainingLog(trial) as log:
            for value in values:
                log.step(value)
        return rate

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        study.optimize(objective, n_trials=6)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 6
    named = [w for w in told if issubclass(w.category, UnusableCurveWarning)]
    assert len(named) == 3
    numbers = [o.n_steps for o in observations_of(study, quick_predictor())]
    assert len(numbers) == 4
    assert [t.number for t in study.trials if t.user_attrs[CURVE].get("n_gaps")] == [2]


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
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UnusableCurveWarning)
        after.optimize(lambda t: objective(t, new), n_trials=8)
    named = [str(w.message) for w in told if issubclass(w.category, UnusableCurveWarning)]
    assert len(named) == (0 if predicted else 1)
    assert all("not found under their names among its parameters 'bs', 'lr'" in n for n in named)
    assert {t.state for t in after.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(set(t.params) == set(new) for t in after.trials[4:])
    observed = observations_of(after, predictor)
    ran = [t for t in after.trials if observed_curve(t) is not None]
    assert len(observed) == len(ran) - (0 if predicted else 4)
    assert informed_by(after, predictor).calibration.n_observed == len(observed)


@pytest.mark.parametrize("ratio", [0.05, 4.0])
def test_one_easy_or_hard_mini_batch_at_first_is_not_another_loss(ratio: float) -> None:
    values = losses(30.0, 60)
    values[0] *= ratio
    record = curve_of(_recorded(values))
    assert isinstance(record, CurveRecord)
    mean = quick_predictor().initial_loss
    # Where the losses of single samples differ by as much as they are, it may be luck.
    assert InitialLoss(mean, mean).objection(record, 2, stability=0.1) is None
    assert InitialLoss(mean, 0.1 * mean).objection(record, 2, stability=0.1) is not None


@pytest.mark.parametrize("share", [2, 4, 16])
@pytest.mark.parametrize("size", [8, 24])
def test_a_loss_divided_for_the_accumulation_of_gradients_is_named(share: int, size: int) -> None:
    study = _study()
    trial = asked(study, {**FAST, "batch_size": size})
    trial.should_prune()
    with TrainingLog(trial) as log:
        for value in losses(30.0, 60) / share:
            log.step(value)
    study.tell(trial, 0.0)
    with pytest.warns(UnusableCurveWarning, match="one that was divided"):
        assert observations_of(study, quick_predictor()) == []


def test_a_sum_over_other_samples_than_the_batch_is_named() -> None:
    study = _study()
    study.tell(_run(study, 16.0 * losses(30.0, 60)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="or a sum over 16 samples instead"):
        assert observations_of(study, quick_predictor()) == []


def test_a_sum_is_named_where_the_log_begins_late() -> None:
    study = _study()
    study.tell(_run(study, 8.0 * losses(300.0, 60), step=np.arange(5, 65)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="a sum over the batch of 8"):
        assert observations_of(study, quick_predictor()) == []


def test_training_that_is_thrown_far_up_is_still_the_same_loss() -> None:
    # Above the stability limit the mean over the first steps may be anything.
    study = _study()
    limit = float(quick_predictor().max_learning_rate(8, 0.0))
    trial = _run(study, 8.0 * losses(300.0, 60), 2.0 * limit, step=np.arange(5, 65))
    study.tell(trial, 0.0)
    assert len(observations_of(study, quick_predictor())) == 1


def test_steps_that_go_on_counting_from_another_trial_are_named() -> None:
    study = _study()
    study.tell(_run(study, losses(30.0, 60), step=1000 + np.arange(60)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="begins after 1,000 steps, but still at"):
        assert observations_of(study, quick_predictor()) == []


@pytest.mark.parametrize("bad", [None, "1.0", True, torch.zeros(3), np.zeros((2, 1)), [1.0]])
def test_what_is_no_loss_is_named(bad: Any) -> None:
    log = TrainingLog(optuna.create_study().ask())
    with pytest.raises(TypeError, match=r"loss must be a number, or a tensor of one .* but got"):
        log.step(bad)


@pytest.mark.parametrize("bad", ["3", True, [3], torch.zeros(2)])
def test_what_is_no_step_is_named(bad: Any) -> None:
    log = TrainingLog(optuna.create_study().ask())
    with pytest.raises(TypeError, match="step must be a whole number of optimiser steps but got"):
        log.step(1.0, step=bad)


@pytest.mark.parametrize("place", [np.int64(3), torch.tensor(3), 3.0, np.float32(3.0)])
def test_a_step_may_be_any_whole_number(place: Any) -> None:
    trial = optuna.create_study().ask()
    with TrainingLog(trial) as log:
        log.step(1.0, step=place)
        log.step(0.9)
    curve = observed_curve(trial.study.trials[0])
    assert curve is not None and curve.steps.tolist() == [3, 4]


@pytest.mark.parametrize("bad", [None, 3, "trial"])
def test_what_is_no_trial_is_named(bad: Any) -> None:
    with pytest.raises(TypeError, match="trial must be the trial of the objective but got"):
        TrainingLog(bad)


def test_an_objective_can_be_tried_without_a_study() -> None:
    trial = optuna.trial.FixedTrial({})
    with TrainingLog(trial) as log:  # type: ignore[arg-type]
        for value in losses(30.0, 40):
            log.step(value)
    assert trial.user_attrs[CURVE]["n_steps"] == 40


def test_a_single_loss_is_named_and_a_trial_that_is_pruned_at_once_is_not() -> None:
    def objective(trial: optuna.Trial) -> float:
        with TrainingLog(trial) as log:
            if trial.number == 0:
                raise optuna.TrialPruned
            log.step(1.0)
            if trial.number == 1:
                raise optuna.TrialPruned
        return 0.0

    study = optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.optimize(objective, n_trials=2)
    with pytest.warns(UnusableCurveWarning, match="of trial 2 is left out: it has a single loss"):
        study.optimize(objective, n_trials=1)


def test_of_a_second_log_only_what_goes_on_counts() -> None:
    study = _study()
    trial = asked(study, FAST)
    trial.should_prune()
    values = losses(30.0, 60)
    with TrainingLog(trial) as log:
        for value in values[:25]:
            log.step(value)
    with TrainingLog(trial) as log:
        for step, value in enumerate(values[25:], 25):
            log.step(value, step=step)
    curve = observed_curve(study.trials[0])
    assert curve is not None and curve.n_steps == 60
    assert (np.diff(curve.steps) > 0).all()
    np.testing.assert_allclose(curve.losses, values[curve.steps.astype(int)], rtol=2e-2)
    with (
        pytest.warns(UnusableCurveWarning, match="second .* at step 0 after 60 steps") as told,
        TrainingLog(trial) as log,
    ):
        for _ in range(200):
            log.step(0.01)
    assert len(told) == 1
    assert study.trials[0].user_attrs[CURVE]["n_steps"] == 60
    assert len(observations_of(study, quick_predictor())) == 1


def test_each_kind_of_curve_that_cannot_be_used_is_reported_once_a_study() -> None:
    study = _study()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for factor in (8.0, 0.25, 8.0, 0.25, 8.0):
            study.tell(_run(study, factor * losses(30.0, 40)), 0.0)
            assert observations_of(study, quick_predictor()) == []
    kinds = [w.category for w in told]
    assert kinds == [UnusableCurveWarning] * 2
    assert sorted(optuna_ttp.report(study).unusable) == [0, 1, 2, 3, 4]
    assert "Nothing could be learned from 5 training-loss curves" in str(optuna_ttp.report(study))


def test_one_batch_that_overflows_is_no_divergence() -> None:
    predictor = quick_predictor()
    study = _study()
    with pytest.warns(UnusableCurveWarning, match="A loss of trial 0 is left out") as told:
        for n in range(6):
            values = losses(12.0, 40)
            if n != 3:
                values[n] = math.inf
            study.tell(_run(study, values, 0.1), 0.0)
        learned = informed_by(study, predictor)
    assert len(told) == 1
    assert learned.calibration.n_observed == 6
    assert not any(o.diverged for o in observations_of(study, predictor))
    fine = float(predictor.estimate(0.1, 8, 0.0).p_diverges)
    assert float(learned.estimate(0.1, 8, 0.0).p_diverges) <= fine


@pytest.mark.parametrize(
    ("factor", "named"), [(0.1, True), (0.5, True), (1.2, False), (4.0, True)]
)
def test_training_that_does_not_begin_as_predicted_is_named(factor: float, named: bool) -> None:
    """As where steps are counted ten times too slowly, or the spectrum is another network's."""
    study = _study()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        add_observed(study, lambda steps: factor * steps)
    begins = [str(w.message) for w in told if "Training begins" in str(w.message)]
    assert len(begins) == named
    calibration = optuna_ttp.report(study).calibration
    assert calibration.starts_as_predicted != named
    assert ("training begins" in str(optuna_ttp.report(study))) == named
    if factor > 0.2:
        assert calibration.start_factor == pytest.approx(1.0 / factor, rel=0.15)


@pytest.mark.parametrize(("last", "diverged"), [(1, False), (2, True)])
def test_a_single_bad_loss_at_the_end_of_a_good_curve_is_no_divergence(
    last: int, diverged: bool
) -> None:
    study = _study()
    study.tell(_run(study, [*losses(12.0, 30), *[math.nan] * last], 0.1), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusableCurveWarning)
        [seen] = observations_of(study, quick_predictor())
    assert seen.diverged == diverged


def test_a_single_bad_loss_at_the_end_of_a_rising_curve_is_divergence() -> None:
    study = _study()
    rising = quick_predictor().initial_loss * np.geomspace(1.0, 100.0, 8)
    study.tell(_run(study, [*rising, math.inf], 0.1), 0.0)
    [seen] = observations_of(study, quick_predictor())
    assert seen.diverged


@pytest.mark.parametrize("end", [1.0, 1.5, 0.97])
def test_curves_that_never_come_down_are_named_once(end: float) -> None:
    study = _study()
    with pytest.warns(UnusableCurveWarning, match="None of the .* 5 trials has come") as told:
        for _ in range(8):
            study.tell(_run(study, quick_predictor().initial_loss * np.linspace(1, end, 30)), 0.0)
        asked(study, FAST).should_prune()
    assert len(told) == 1


def test_a_sampler_alone_says_that_predictions_are_not_trusted() -> None:
    study = optuna.create_study(sampler=TTPSampler(quick_predictor(), FastestToTarget(), seed=0))
    # The faster the prediction, the slower the training.
    with pytest.warns(UnreliablePredictionWarning, match="Predictions are ignored") as told:
        add_observed(study, lambda steps: 2000.0 / steps)
    assert len([w for w in told if "Predictions are ignored" in str(w.message)]) == 1


# Trials for which nothing was predicted before they ran


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
    told = float(predictor.predict(0.06, 8, 0.0).steps)
    assert float(learned.predict(0.06, 8, 0.0).steps) == pytest.approx(2.0 * told, rel=0.15)
    # Sampler and pruner learn from them, too.
    study.sampler, study.pruner = TTPSampler(predictor, BestMetric(), seed=0), TTPPruner(predictor)
    after = asked(study, {**FAST, "learning_rate": 0.06})
    after.should_prune()
    [predicted] = [
        t.user_attrs["ttp:record"]["prediction"]["steps"]
        for t in study.trials
        if t.number == after.number
    ]
    assert predicted == pytest.approx(2.0 * told, rel=0.15)


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


def test_a_log_that_begins_late_is_not_another_loss() -> None:
    study = _study()
    steps = np.arange(60, 120)
    study.tell(_run(study, losses(30.0, 120)[steps], step=steps), 0.0)
    assert len(observations_of(study, quick_predictor())) == 1


# Several processes


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
        told = [pool.submit(observe_and_predict, url, ()).result() for _ in range(3)]
    told.append(observe_and_predict(url, ()))
    assert len(study.trials) == 4
    assert all(n_observed == 4 for n_observed, _ in told)
    assert all(steps == told[0][1] for _, steps in told)
    plain = quick_predictor().predict([0.05, 0.1], 8, 0.0).steps
    assert (np.array(told[0][1]) > 1.2 * plain).all()


# What a newcomer does wrong


@pytest.mark.parametrize("bad", ["no", 1, None])
def test_switches_that_are_no_booleans_are_refused(bad: Any) -> None:
    trial = optuna.create_study().ask()
    with pytest.raises(TypeError, match="measure_speed must be a bool but got"):
        TrainingLog(trial, measure_speed=bad)
    with pytest.raises(TypeError, match="averaged must be a bool but got"):
        optuna_ttp.learn_from_reports(trial, averaged=bad)


def test_a_log_that_outlives_its_trial_says_so_and_breaks_nothing() -> None:
    study = _study()
    trial = asked(study, FAST)
    trial.should_prune()
    with (
        pytest.warns(
            UnusableCurveWarning, match="end of the .* trial 0 .* behind step 32"
        ) as told,
        TrainingLog(trial) as log,
    ):
        for value in losses(30.0, 50):
            log.step(value)
        study.tell(trial, 0.0)
    assert len(told) == 1
    assert "before the trial ends" in str(told[0].message)
    [seen] = observations_of(study, quick_predictor())
    assert seen.n_steps == 32
    assert list(optuna_ttp.report(study).unusable) == [0]


def test_a_log_that_nobody_closes_is_written_at_its_end() -> None:
    study = _study()

    def objective(trial: optuna.Trial) -> float:
        trial.should_prune()
        log = TrainingLog(trial)
        for value in losses(30.0, 50):
            log.step(value)
        return 0.0

    study.enqueue_trial(FAST)
    study.optimize(lambda t: objective(_suggested(t)), n_trials=1)
    [seen] = observations_of(study, quick_predictor())
    assert seen.n_steps == 50


def _suggested(trial: optuna.Trial) -> optuna.Trial:
    suggest(trial)
    return trial


def test_steps_that_jump_are_named_and_sparse_ones_are_not() -> None:
    study = _study()
    values = losses(30.0, 40)
    dense, jumping = list(range(40)), [*range(20), *range(10**6, 10**6 + 20)]
    sparse = [*range(20), *range(1000, 21000, 1000)]
    for places, named in ((dense, False), (sparse, False), (jumping, True)):
        study.tell(_run(study, values, step=places), 0.0)
        if not named:
            continue
        with pytest.warns(UnusableCurveWarning, match="jump from 19 to 1,000,000, and go on"):
            seen = observations_of(study, quick_predictor())
    assert len(seen) == 2


def _recorded_at(places: Callable[[int, int], int]) -> tuple[optuna.Study, list[str]]:
    """A study with curves at these numbers, by the batch size and the step, and its warnings."""
    study = _study()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for size in (4, 8, 12, 8):
            trial = asked(study, {**FAST, "batch_size": size})
            trial.should_prune()
            with TrainingLog(trial) as log:
                for step, value in enumerate(losses(1.5, 20)):
                    log.step(value, step=places(size, step))
            study.tell(trial, 0.0)
        for _ in range(2):
            observations_of(study, quick_predictor())
    return study, [str(w.message) for w in told if "as many steps apart" in str(w.message)]


def test_samples_in_place_of_steps_are_named_and_left_out() -> None:
    study, told = _recorded_at(lambda size, step: size * step)
    assert len(told) == 1
    assert "Count optimiser steps, not samples" in told[0]
    assert observations_of(study, quick_predictor()) == []
    report = optuna_ttp.report(study)
    assert list(report.unusable) == [0, 1, 2, 3]
    assert report.calibration.n_observed == 0


def test_a_log_of_every_eighth_step_is_not_taken_for_samples() -> None:
    study, told = _recorded_at(lambda size, step: 8 * step)
    assert not told
    assert len(observations_of(study, quick_predictor())) == 4


def test_tiny_learning_rates_are_learned_from_without_divisions_by_zero() -> None:
    """The step over the stability limit was rounded to zero when it was written down."""
    predictor = quick_predictor()
    study = _study()
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


def test_losses_of_small_batches_that_are_too_low_are_named_together() -> None:
    """A single first loss of four samples may be low by chance, those of several trials not."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.mul_(8.0)
    task = optuna_ttp.FineTuningTask(model, vectors(40))
    spectrum = optuna_ttp.compute_spectrum(task, engine="exact", measure_speed=False)
    predictor = TrainingTimePredictor(spectrum, target_fraction=0.5, max_steps=2000)
    params = {"learning_rate": 0.2 * float(predictor.max_learning_rate(4)), "batch_size": 4}
    study = optuna.create_study(sampler=TTPSampler(predictor, BestMetric(), seed=0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(6):
            trial = asked(study, {**params, "momentum": 0.0})
            with TrainingLog(trial) as log:
                for step in range(30):
                    log.step(0.05 * predictor.initial_loss * 0.95**step)
            study.tell(trial, 0.0)
            if number == 0:
                assert len(observations_of(study, predictor)) == 1
    assert observations_of(study, predictor) == []
    low = [str(w.message) for w in told if "times the initial training loss on average" in str(w)]
    assert len(low) == 1
    assert "0.05 times" in low[0]
    assert list(optuna_ttp.report(study).unusable) == list(range(6))


def test_a_log_that_is_kept_open_behind_its_trial_is_named() -> None:
    study = _study()
    kept = []
    with pytest.warns(UnusableCurveWarning, match="trial 0 is left out: .* before it was") as told:
        for _ in range(3):
            trial = asked(study, FAST)
            trial.should_prune()
            kept.append(TrainingLog(trial))
            for value in losses(12.0, 20):
                kept[-1].step(value)
            study.tell(trial, 0.0)
        assert observations_of(study, quick_predictor()) == []
    assert len(told) == 1
    assert list(optuna_ttp.report(study).unusable) == [0, 1, 2]
