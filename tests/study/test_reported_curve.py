from __future__ import annotations

import math
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import learn_from_reports
from optuna_ttp import TrainingLog
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.calibration import LossCurve
from optuna_ttp.study import observed_curve
from optuna_ttp.study._learner import informed_by
from optuna_ttp.study._learner import observations_of
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import quick_predictor
from tests.studies import storage


def _study(store: Any = None) -> optuna.Study:
    predictor = quick_predictor()
    return optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0),
        pruner=TTPPruner(predictor),
        storage=store,
    )


def _run(study: optuna.Study, values: Any, *, rate: float = 0.05, **setting: Any) -> optuna.Trial:
    trial = asked(study, {**FAST, "learning_rate": rate})
    learn_from_reports(trial, **setting)
    trial.should_prune()
    for number, value in enumerate(values):
        trial.report(value, number)
    return trial


def test_reports_are_no_training_losses_unless_the_objective_says_so() -> None:
    study = _study()
    trial = asked(study, FAST)
    trial.should_prune()
    for number, value in enumerate(losses(12.0, 30)):
        trial.report(value, number)
    study.tell(trial, 0.0)
    assert observed_curve(study.trials[0]) is None
    assert observations_of(study, quick_predictor()) == []


@pytest.mark.parametrize("kind", ["inmemory", "sqlite"])
def test_the_curve_of_reports_is_that_of_a_log(kind: str) -> None:
    values = losses(20.0, 40)
    with storage(kind) as store:
        study = _study(store)
        study.tell(_run(study, values), 0.0)
        [trial] = optuna.load_study(study_name=study.study_name, storage=store).trials
    curve, expected = observed_curve(trial), LossCurve.of(values)
    assert curve is not None
    assert curve.n_steps == 40 and not curve.diverged
    np.testing.assert_allclose(curve.steps, expected.steps)
    np.testing.assert_allclose(curve.losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize("averaged", [True, False])
def test_epochs_are_placed_where_their_loss_was(averaged: bool) -> None:
    t = np.arange(400.0)
    every = np.exp(-t / 100.0)
    values = every.reshape(40, 10).mean(axis=1) if averaged else np.exp(-(t[9::10] + 1.0) / 100.0)
    study = _study()
    study.tell(_run(study, values, steps_per_report=10, averaged=averaged), 0.0)
    curve = observed_curve(study.trials[0])
    assert curve is not None
    assert curve.n_steps == 400
    times, _ = curve.log_first_passage_times(np.exp(-np.array([0.5, 1.0, 2.0])))
    np.testing.assert_allclose(np.exp(times), [50.0, 100.0, 200.0], rtol=0.02)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_trials_that_report_twice_as_long_correct_the_clock() -> None:
    predictor = quick_predictor()
    study = _study()
    for rate in (0.03, 0.04, 0.05, 0.06):
        steps = 2.0 * float(predictor.predict(rate, 8, 0.0).steps)
        study.tell(_run(study, losses(steps, math.ceil(1.2 * steps)), rate=rate), 0.0)
    calibration = informed_by(study, predictor).calibration
    assert calibration.n_observed == 4
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    plain = float(predictor.predict(0.05, 8, 0.0).steps)
    assert float(corrected.steps) == pytest.approx(2.0 * plain, rel=0.15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.5, 0.3], "must not be negative"),
        (list(8.0 * losses(20.0, 30)), "a sum over the batch of 8"),
        ([math.nan, math.inf, math.nan], "none of its losses is a finite number"),
        ([], "nothing was reported"),
        ([1.0], "it has a single value"),
    ],
)
def test_reports_that_cannot_be_training_losses_are_named_once(
    values: list[float], message: str
) -> None:
    study = _study()
    study.tell(_run(study, values), 0.0)
    with pytest.warns(
        UnusableCurveWarning, match=f"of trial 0 is left out: .*{message}"
    ) as warned:
        assert observations_of(study, quick_predictor()) == []
        assert observations_of(study, quick_predictor()) == []
    assert len(warned) == 1


@pytest.mark.parametrize("values", [[], [1.0]])
def test_a_trial_that_ended_early_may_have_reported_little(values: list[float]) -> None:
    study = _study()
    study.tell(_run(study, values), state=TrialState.PRUNED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert informed_by(study, quick_predictor()).calibration.n_observed == 0


def test_a_report_that_is_no_number_is_left_out() -> None:
    study = _study()
    values = losses(20.0, 40)
    values[[0, 7]] = math.nan
    study.tell(_run(study, values), 0.0)
    with pytest.warns(UnusableCurveWarning, match="2 losses of trial 0 are left out"):
        [seen] = observations_of(study, quick_predictor())
    assert not seen.diverged and seen.n_steps == 40


@pytest.mark.parametrize("log_first", [True, False])
def test_a_log_counts_where_a_trial_has_both(log_first: bool) -> None:
    study = _study()
    trial = asked(study, FAST)
    trial.should_prune()
    if not log_first:
        learn_from_reports(trial)
    with TrainingLog(trial) as log:
        for step, value in enumerate(losses(20.0, 40)):
            log.step(value)
            trial.report(0.5 * value, step)
    if log_first:
        learn_from_reports(trial)
    study.tell(trial, 0.0)
    curve = observed_curve(study.trials[0])
    assert curve is not None
    np.testing.assert_allclose(curve.losses[0], losses(20.0, 40)[0], rtol=1e-2)


@pytest.mark.parametrize("bad", [0, -3, 1.5, True, math.nan, "a", None])
def test_a_bad_number_of_steps_is_named(bad: Any) -> None:
    trial = optuna.create_study().ask()
    with pytest.raises((TypeError, ValueError), match=r"steps_per_report must be .* but got"):
        learn_from_reports(trial, steps_per_report=bad)


@pytest.mark.parametrize("bad", [None, 3, "trial"])
def test_what_is_no_trial_is_named(bad: Any) -> None:
    with pytest.raises(TypeError, match="trial must be the trial of the objective but got"):
        learn_from_reports(bad)
