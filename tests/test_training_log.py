from __future__ import annotations

from dataclasses import replace
import json
import math
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest
import torch

from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.training_log import calibration_of
from optuna_ttp.training_log import CURVE
from optuna_ttp.training_log import observed_curve
from optuna_ttp.training_log import observed_steps
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import FAST
from tests.studies import losses
from tests.studies import quick_predictor
from tests.studies import storage
from tests.studies import STORAGES


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
    steps, smoothed = curve
    assert steps[0] == 0 and steps[-1] == 99
    assert (np.diff(steps) > 0).all()
    # A window of a tenth of the step to each side hardly bends an exponential curve.
    np.testing.assert_allclose(smoothed[3:-3], losses(50, 100)[steps.astype(int)][3:-3], rtol=0.02)


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
        assert curve[0][-1] == 31


def test_a_curve_stays_that_of_the_whole_training_as_it_grows() -> None:
    trial = _recorded(losses(100, 1000))
    assert trial.user_attrs[CURVE]["n_steps"] == 1000
    curve = observed_curve(trial)
    assert curve is not None
    assert curve[0][0] == 0 and curve[0][-1] == 999


def test_a_curve_ends_where_the_loss_is_not_finite() -> None:
    values = losses(50, 100)
    values[60] = math.nan
    trial = _recorded(values)
    curve = observed_curve(trial)
    assert curve is not None
    assert curve[0][-1] == 59
    assert np.isfinite(curve[1]).all()
    assert trial.user_attrs[CURVE]["n_steps"] == 100
    assert observed_steps(trial, quick_predictor()) == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_target_that_was_not_reached_before_the_loss_blew_up_is_never_reached(
    bad: float,
) -> None:
    assert observed_steps(_recorded([*losses(50, 20), bad]), quick_predictor()) == math.inf


def test_nothing_is_observed_where_the_first_loss_is_not_finite() -> None:
    trial = _recorded([math.nan, 1.0, 0.1])
    curve = observed_curve(trial)
    assert curve is not None and len(curve[0]) == 0
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_losses_at_the_edge_of_what_a_float_can_hold_are_json() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = _recorded([1.0, *[1.7e308] * 10])
    json.dumps(trial.user_attrs, allow_nan=False)


def test_an_empty_log_writes_nothing() -> None:
    trial = _recorded([])
    assert trial.user_attrs == {}
    assert observed_curve(trial) is None
    assert math.isnan(observed_steps(trial, quick_predictor()))


def test_a_tensor_of_one_element_is_a_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = _recorded(
            [torch.tensor(0.5, requires_grad=True), torch.tensor([0.25]), np.float32(0.2)]
        )
    curve = observed_curve(trial)
    assert curve is not None and len(curve[0]) == 3


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
    assert curve[0].tolist() == list(range(10))


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


@pytest.mark.parametrize("with_pruner", [False, True], ids=["sampler", "pruner"])
def test_trials_that_take_twice_as_long_correct_the_clock(with_pruner: bool) -> None:
    predictor = quick_predictor()
    pruner = TTPPruner(predictor) if with_pruner else optuna.pruners.NopPruner()
    study = optuna.create_study(sampler=TTPSampler(predictor, seed=0), pruner=pruner)
    add_observed(study, lambda steps: 2.0 * steps)
    calibration = calibration_of(study, predictor)
    assert calibration.n_observed == 6
    assert calibration.rank_agreement > 0.8
    assert calibration.trusted
    # Six trials outweigh the prior: 2 ** (6 / (6 + 0.25 ** 2 / 0.7 ** 2)) = 1.97.
    assert calibration.factor == pytest.approx(1.97, rel=0.1)
    corrected = predictor.calibrated(calibration).predict(0.05, 8, 0.0)
    assert float(corrected.steps) == pytest.approx(
        calibration.factor * float(predictor.predict(0.05, 8, 0.0).steps), rel=0.03
    )


def test_predictions_that_were_already_corrected_are_not_corrected_twice() -> None:
    predictor = quick_predictor()
    study = optuna.create_study(sampler=TTPSampler(predictor), pruner=TTPPruner(predictor))
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.04, 0.05, 0.06) * 5)
    assert calibration_of(study, predictor).factor == pytest.approx(2.0, rel=0.05)


def test_trials_of_another_task_or_target_do_not_count() -> None:
    predictor = quick_predictor()
    study = optuna.create_study(sampler=TTPSampler(predictor, seed=0))
    add_observed(study, lambda steps: 2.0 * steps)
    other_target = TrainingTimePredictor(small_spectrum(), target_fraction=0.4)
    assert calibration_of(study, other_target).n_observed == 0
    metadata = replace(small_spectrum().metadata, fingerprint="0" * 64)
    other_task = TrainingTimePredictor(
        replace(small_spectrum(), metadata=metadata), target_fraction=0.5
    )
    assert other_task.target == predictor.target
    assert calibration_of(study, other_task).n_observed == 0


def test_trials_without_a_curve_or_without_a_prediction_teach_nothing() -> None:
    predictor = quick_predictor()
    study = optuna.create_study(sampler=TTPSampler(predictor, seed=0))
    study.enqueue_trial(FAST)
    study.optimize(lambda t: t.suggest_float("learning_rate", 0.01, 1.0) + _rest(t), n_trials=1)
    _recorded(losses(5, 20), study)
    assert calibration_of(study, predictor).n_observed == 0
    assert calibration_of(study, predictor).factor == 1.0


def _rest(trial: optuna.Trial) -> float:
    return trial.suggest_int("batch_size", 1, 24) + trial.suggest_float("momentum", 0.0, 0.9)
