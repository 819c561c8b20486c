"""What a training log writes on its trial, and when."""

from __future__ import annotations

import json
import math
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest
import torch

import optuna_ttp
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.study import observed_curve
from optuna_ttp.study import observed_steps
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._learner import informed_by
from optuna_ttp.study._learner import observations_of
from tests.models import small_spectrum
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import quick_predictor
from tests.studies import storage
from tests.studies import STORAGES
from tests.studies import suggest
from tests.study.curves import curve_record
from tests.study.curves import recorded
from tests.study.curves import run
from tests.study.curves import study_of_curves


# Made-up curves that are late or early by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


@pytest.mark.parametrize("kind", STORAGES)
def test_a_curve_comes_back_from_every_storage(kind: str) -> None:
    with storage(kind) as store:
        study = optuna.create_study(storage=store)
        recorded(losses(50, 100), study)
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
    trial = recorded(losses(100, 1000))
    assert curve_record(trial).curve.n_steps == 1000
    curve = observed_curve(trial)
    assert curve is not None
    assert curve.steps[0] == 0 and curve.steps[-1] == 999


def test_a_curve_ends_where_the_loss_is_not_finite_any_more() -> None:
    values = losses(50, 100)
    values[60:] = math.nan
    trial = recorded(values)
    curve = observed_curve(trial)
    assert curve is not None
    assert curve.steps[-1] == 59
    assert curve.diverged
    assert np.isfinite(curve.losses).all()
    assert curve_record(trial).curve.n_steps == 100
    assert observed_steps(trial, quick_predictor()) == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_target_that_was_not_reached_before_the_loss_blew_up_is_never_reached(
    bad: float,
) -> None:
    assert observed_steps(recorded([*losses(50, 20), bad]), quick_predictor()) == math.inf


def test_nothing_is_observed_where_no_loss_is_finite() -> None:
    trial = recorded([math.nan, math.inf, math.nan])
    assert curve_record(trial).curve.diverged
    assert observed_curve(trial) is None
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_losses_at_the_edge_of_what_a_float_can_hold_are_json() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = recorded([1.0, *[1.7e308] * 10])
    json.dumps(trial.user_attrs, allow_nan=False)


def test_an_empty_log_says_so() -> None:
    with pytest.warns(UnusableCurveWarning, match="of trial 0 is left out: it is empty"):
        trial = recorded([])
    assert trial.user_attrs == {CURVE: {"trial": 0, "unusable": "it is empty", "kind": "empty"}}
    assert observed_curve(trial) is None
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_a_tensor_of_one_element_is_a_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = recorded(
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
    trial = recorded(losses(30_000, 100_000))
    # A text column of MySQL holds 65,535 bytes.
    assert len(json.dumps(trial.user_attrs[CURVE])) < 65_000
    assert observed_steps(trial, quick_predictor()) == pytest.approx(30_000, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 5, 40, 700])
def test_the_observed_time_is_that_of_the_curve(steps: int) -> None:
    observed = observed_steps(recorded(losses(steps, 3 * steps + 3)), quick_predictor())
    assert observed == pytest.approx(steps, rel=0.03, abs=1.5)


def test_the_noise_of_mini_batches_does_not_count_as_reaching_the_target() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.3, 1200))
    values = losses(400, 1200) * noise / noise.mean()
    target = quick_predictor().target.value
    first_dip = int(np.flatnonzero(values <= target)[0])
    assert first_dip < 250
    assert observed_steps(recorded(values), quick_predictor()) == pytest.approx(400, rel=0.1)


def test_a_target_in_accuracy_is_not_observed_in_losses() -> None:
    predictor = TrainingTimePredictor(small_spectrum(), target_accuracy=0.95)
    assert math.isnan(observed_steps(recorded(losses(5, 20)), predictor))


def test_a_curve_copied_from_another_trial_does_not_count() -> None:
    study = optuna.create_study()
    first = recorded(losses(5, 20), study)
    study.enqueue_trial({}, user_attrs=first.user_attrs)
    study.tell(study.ask(), 0.0)
    copied = study.trials[1]
    assert CURVE in copied.user_attrs
    assert observed_curve(copied) is None


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
    assert curve_record(trial.study.trials[0]).seconds_per_step == 0.25


@pytest.mark.parametrize(
    "bad", [None, "1", True, 10**400, torch.zeros(3), np.zeros((2, 1)), [1.0]]
)
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
    assert curve_record(trial).curve.n_steps == 40


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
    study = study_of_curves()
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
        pytest.warns(UnusableCurveWarning, match="second .* at step 0 after 60 steps") as warned,
        TrainingLog(trial) as log,
    ):
        for _ in range(200):
            log.step(0.01)
    assert len(warned) == 1
    assert curve_record(study.trials[0]).curve.n_steps == 60
    assert len(observations_of(study, quick_predictor())) == 1


def test_one_batch_that_overflows_is_no_divergence() -> None:
    predictor = quick_predictor()
    study = study_of_curves()
    with pytest.warns(UnusableCurveWarning, match="A loss of trial 0 is left out") as warned:
        for n in range(6):
            values = losses(12.0, 40)
            if n != 3:
                values[n] = math.inf
            study.tell(run(study, values, 0.1), 0.0)
        learned = informed_by(study, predictor)
    assert len(warned) == 1
    assert learned.calibration.n_observed == 6
    assert not any(o.diverged for o in observations_of(study, predictor))
    fine = float(predictor.estimate(0.1, 8, 0.0).p_diverges)
    assert float(learned.estimate(0.1, 8, 0.0).p_diverges) <= fine


@pytest.mark.parametrize(("last", "diverged"), [(1, False), (2, True)])
def test_a_single_bad_loss_at_the_end_of_a_good_curve_is_no_divergence(
    last: int, diverged: bool
) -> None:
    study = study_of_curves()
    study.tell(run(study, [*losses(12.0, 30), *[math.nan] * last], 0.1), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusableCurveWarning)
        [seen] = observations_of(study, quick_predictor())
    assert seen.diverged == diverged


def test_a_single_bad_loss_at_the_end_of_a_rising_curve_is_divergence() -> None:
    study = study_of_curves()
    rising = quick_predictor().initial_loss * np.geomspace(1.0, 100.0, 8)
    study.tell(run(study, [*rising, math.inf], 0.1), 0.0)
    [seen] = observations_of(study, quick_predictor())
    assert seen.diverged


@pytest.mark.parametrize("bad", ["no", 1, None])
def test_switches_that_are_no_booleans_are_refused(bad: Any) -> None:
    trial = optuna.create_study().ask()
    with pytest.raises(TypeError, match="measure_speed must be a bool but got"):
        TrainingLog(trial, measure_speed=bad)
    with pytest.raises(TypeError, match="averaged must be a bool but got"):
        optuna_ttp.learn_from_reports(trial, averaged=bad)


def test_a_log_that_outlives_its_trial_says_so_and_breaks_nothing() -> None:
    study = study_of_curves()
    trial = asked(study, FAST)
    trial.should_prune()
    with (
        pytest.warns(
            UnusableCurveWarning, match="end of the .* trial 0 .* behind step 32"
        ) as warned,
        TrainingLog(trial) as log,
    ):
        for value in losses(30.0, 50):
            log.step(value)
        study.tell(trial, 0.0)
    assert len(warned) == 1
    assert "before the trial ends" in str(warned[0].message)
    [seen] = observations_of(study, quick_predictor())
    assert seen.n_steps == 32
    assert list(optuna_ttp.report(study).unusable) == [0]


def test_a_log_that_nobody_closes_is_written_at_its_end() -> None:
    study = study_of_curves()

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


def test_a_log_that_is_open_behind_its_trial_is_named() -> None:
    study = study_of_curves()
    logs = []
    with pytest.warns(
        UnusableCurveWarning, match="trial 0 is left out: .* before it was"
    ) as warned:
        for _ in range(3):
            trial = asked(study, FAST)
            trial.should_prune()
            logs.append(TrainingLog(trial))
            for value in losses(12.0, 20):
                logs[-1].step(value)
            study.tell(trial, 0.0)
        assert observations_of(study, quick_predictor()) == []
    assert len(warned) == 1
    assert list(optuna_ttp.report(study).unusable) == [0, 1, 2]
