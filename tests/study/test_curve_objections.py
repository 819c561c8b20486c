"""Which training-loss curves cannot be used, and how a study is warned."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import warnings

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest
import torch

import optuna_ttp
from optuna_ttp import BestMetric
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPSampler
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.study import curve_of
from optuna_ttp.study import CurveRecord
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import observed_curve
from optuna_ttp.study._learner import informed_by
from optuna_ttp.study._learner import observations_of
from tests.models import vectors
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import quick_predictor
from tests.study.curves import recorded
from tests.study.curves import run
from tests.study.curves import study_of_curves


# Made-up curves that are late or early by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


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
    study = study_of_curves()
    with pytest.warns(
        UnusableCurveWarning, match=f"of trial 0 is left out: .*{message}"
    ) as warned:
        trial = run(study, values, step=steps)
    assert len(warned) == 1
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
    study = study_of_curves()
    trial = run(study, factor * losses(30.0, 40))
    if finished:
        study.tell(trial, 0.0)
    with pytest.warns(UnusableCurveWarning, match=message) as warned:
        assert observations_of(study, predictor) == []
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert informed_by(study, predictor).calibration.n_observed == 0


@pytest.mark.parametrize("ratio", [0.05, 4.0])
def test_one_easy_or_hard_mini_batch_at_first_is_not_another_loss(ratio: float) -> None:
    values = losses(30.0, 60)
    values[0] *= ratio
    record = curve_of(recorded(values))
    assert isinstance(record, CurveRecord)
    mean = quick_predictor().initial_loss
    # Where the losses of single samples differ by as much as they are, it may be luck.
    assert InitialLoss(mean, mean).objection(record, 2, stability=0.1) is None
    assert InitialLoss(mean, 0.1 * mean).objection(record, 2, stability=0.1) is not None


@pytest.mark.parametrize("share", [2, 4, 16])
@pytest.mark.parametrize("batch_size", [8, 24])
def test_a_loss_divided_for_the_accumulation_of_gradients_is_named(
    share: int, batch_size: int
) -> None:
    study = study_of_curves()
    trial = asked(study, {**FAST, "batch_size": batch_size})
    trial.should_prune()
    with TrainingLog(trial) as log:
        for value in losses(30.0, 60) / share:
            log.step(value)
    study.tell(trial, 0.0)
    with pytest.warns(UnusableCurveWarning, match="one that was divided"):
        assert observations_of(study, quick_predictor()) == []


def test_a_sum_over_other_samples_than_the_batch_is_named() -> None:
    study = study_of_curves()
    study.tell(run(study, 16.0 * losses(30.0, 60)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="or a sum over 16 samples instead"):
        assert observations_of(study, quick_predictor()) == []


def test_a_sum_is_named_where_the_log_begins_late() -> None:
    study = study_of_curves()
    study.tell(run(study, 8.0 * losses(300.0, 60), step=np.arange(5, 65)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="a sum over the batch of 8"):
        assert observations_of(study, quick_predictor()) == []


def test_training_that_is_thrown_far_up_is_still_the_same_loss() -> None:
    # Above the stability limit the mean over the first steps may be anything.
    study = study_of_curves()
    limit = float(quick_predictor().max_learning_rate(8, 0.0))
    trial = run(study, 8.0 * losses(300.0, 60), 2.0 * limit, step=np.arange(5, 65))
    study.tell(trial, 0.0)
    assert len(observations_of(study, quick_predictor())) == 1


def test_steps_that_go_on_counting_from_another_trial_are_named() -> None:
    study = study_of_curves()
    study.tell(run(study, losses(30.0, 60), step=1000 + np.arange(60)), 0.0)
    with pytest.warns(UnusableCurveWarning, match="begins after 1,000 steps, but still at"):
        assert observations_of(study, quick_predictor()) == []


def test_each_kind_of_curve_that_cannot_be_used_is_reported_once_a_study() -> None:
    study = study_of_curves()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for factor in (8.0, 0.25, 8.0, 0.25, 8.0):
            study.tell(run(study, factor * losses(30.0, 40)), 0.0)
            assert observations_of(study, quick_predictor()) == []
    kinds = [w.category for w in warned]
    assert kinds == [UnusableCurveWarning] * 2
    assert sorted(optuna_ttp.report(study).unusable) == [0, 1, 2, 3, 4]
    assert "Nothing could be learned from 5 training-loss curves" in str(optuna_ttp.report(study))


def test_a_log_that_begins_late_is_not_another_loss() -> None:
    study = study_of_curves()
    steps = np.arange(60, 120)
    study.tell(run(study, losses(30.0, 120)[steps], step=steps), 0.0)
    assert len(observations_of(study, quick_predictor())) == 1


def test_steps_that_jump_are_named_and_sparse_ones_are_not() -> None:
    study = study_of_curves()
    values = losses(30.0, 40)
    dense, jumping = list(range(40)), [*range(20), *range(10**6, 10**6 + 20)]
    sparse = [*range(20), *range(1000, 21000, 1000)]
    for places, named in ((dense, False), (sparse, False), (jumping, True)):
        study.tell(run(study, values, step=places), 0.0)
        if not named:
            continue
        with pytest.warns(UnusableCurveWarning, match="jump from 19 to 1,000,000, and go on"):
            seen = observations_of(study, quick_predictor())
    assert len(seen) == 2


def _recorded_at(places: Callable[[int, int], int]) -> tuple[optuna.Study, list[str]]:
    """A study with curves at these numbers, by the batch size and the step, and its warnings."""
    study = study_of_curves()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for batch_size in (4, 8, 12, 8):
            trial = asked(study, {**FAST, "batch_size": batch_size})
            trial.should_prune()
            with TrainingLog(trial) as log:
                for step, value in enumerate(losses(1.5, 20)):
                    log.step(value, step=places(batch_size, step))
            study.tell(trial, 0.0)
        for _ in range(2):
            observations_of(study, quick_predictor())
    return study, [str(w.message) for w in warned if "as many steps apart" in str(w.message)]


def test_samples_in_place_of_steps_are_named_and_left_out() -> None:
    study, warned = _recorded_at(lambda batch_size, step: batch_size * step)
    assert len(warned) == 1
    assert "Count optimiser steps, not samples" in warned[0]
    assert observations_of(study, quick_predictor()) == []
    report = optuna_ttp.report(study)
    assert list(report.unusable) == [0, 1, 2, 3]
    assert report.calibration.n_observed == 0


def test_a_log_of_every_eighth_step_is_not_taken_for_samples() -> None:
    study, warned = _recorded_at(lambda batch_size, step: 8 * step)
    assert not warned
    assert len(observations_of(study, quick_predictor())) == 4


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
    with warnings.catch_warnings(record=True) as warned:
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
    low = [
        str(w.message) for w in warned if "times the initial training loss on average" in str(w)
    ]
    assert len(low) == 1
    assert "0.05 times" in low[0]
    assert list(optuna_ttp.report(study).unusable) == list(range(6))


@pytest.mark.parametrize("end", [1.0, 1.5, 0.97])
def test_curves_that_never_come_down_are_named_once(end: float) -> None:
    study = study_of_curves()
    with pytest.warns(UnusableCurveWarning, match="None of the .* 5 trials has come") as warned:
        for _ in range(8):
            study.tell(run(study, quick_predictor().initial_loss * np.linspace(1, end, 30)), 0.0)
        asked(study, FAST).should_prune()
    assert len(warned) == 1


@pytest.mark.filterwarnings("always::optuna_ttp.UnusableCurveWarning")
def test_unusable_curves_never_break_a_study() -> None:
    study = study_of_curves()

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

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        study.optimize(objective, n_trials=6)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 6
    named = [w for w in warned if issubclass(w.category, UnusableCurveWarning)]
    assert len(named) == 3
    numbers = [o.n_steps for o in observations_of(study, quick_predictor())]
    assert len(numbers) == 4
    gaps = {t.number: curve.n_gaps for t in study.trials if (curve := observed_curve(t))}
    assert [number for number, n_gaps in gaps.items() if n_gaps] == [2]
