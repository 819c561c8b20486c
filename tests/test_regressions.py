"""What users ran into."""

from __future__ import annotations

import logging

import numpy as np
import optuna
import pytest
import torch

from optuna_ttp import BestMetric
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import HyperparameterMap
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import prediction_of
from tests.models import mlp
from tests.models import separated
from tests.models import small_predictor


@pytest.mark.filterwarnings("ignore::optuna_ttp.UnreliablePredictionWarning")
def test_a_target_below_what_label_smoothing_allows_is_refused() -> None:
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    x, y = separated(24)
    task = FineTuningTask(mlp(), (x, y), loss=loss)
    spectrum = compute_spectrum(task, measure_speed=False, show_progress_bar=False)
    # The loss of the best outputs: the logarithms of the smoothed targets.
    smoothed = torch.full((24, 3), 0.1)
    smoothed[torch.arange(24), y] += 0.7
    floor = loss(smoothed.log(), y).item()
    assert TrainingTimePredictor(spectrum, target_loss=floor * 1.01).target.value > floor
    with pytest.raises(ValueError, match=f"must be above {floor:.4g}, the lowest"):
        TrainingTimePredictor(spectrum, target_loss=floor * 0.99)
    with pytest.raises(ValueError, match="must be above"):
        TrainingTimePredictor(spectrum, target_fraction=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95, 0.99])
def test_score_follows_predict_also_where_momentum_outlasts_training(momentum: float) -> None:
    predictor = small_predictor()
    limit = float(predictor.max_learning_rate(8, momentum))
    for share in (0.02, 0.1, 0.4):
        predicted = float(predictor.predict(share * limit, 8, momentum).seconds)
        scored = float(predictor.score(share * limit, 8, momentum))
        assert predicted / 2 <= scored <= predicted * 2


def test_score_and_predict_agree_on_what_is_reached() -> None:
    predictor = small_predictor()
    generator = np.random.default_rng(0)
    rates = 10.0 ** generator.uniform(-5, 1, 200)
    sizes = 2 ** generator.integers(0, 4, 200)
    momenta = 1 - 10.0 ** generator.uniform(-2, 0, 200)
    reached = np.isfinite(predictor.predict(rates, sizes, momenta).seconds)
    scored = np.isfinite(predictor.score(rates, sizes, momenta))
    assert 0.3 < reached.mean() < 0.95
    assert (reached == scored).mean() > 0.9


@pytest.mark.filterwarnings("ignore:Training begins")
@pytest.mark.parametrize("with_pruner", [False, True])
def test_trials_that_stop_at_their_target_are_learned_from(with_pruner: bool) -> None:
    predictor = small_predictor()
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0),
        pruner=TTPPruner(predictor) if with_pruner else optuna.pruners.NopPruner(),
    )

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 0.002, 0.02, log=True)
        size = trial.suggest_categorical("batch_size", [8, 16])
        momentum = trial.suggest_float("momentum", 0.0, 0.5)
        if trial.should_prune():
            raise optuna.TrialPruned
        n_steps = int(3 * float(predictor.predict(rate, size, momentum).steps))
        with TrainingLog(trial) as log:
            for step in range(n_steps + 1):
                log.step(predictor.initial_loss * 0.5 ** (step / n_steps))
        return rate

    study.optimize(objective, n_trials=6)
    last = study.trials[-1]
    told = prediction_of(last)
    assert told is not None
    p = last.params
    plain = predictor.predict(p["learning_rate"], p["batch_size"], p["momentum"])
    assert told.steps / float(plain.steps) == pytest.approx(3.0, rel=0.15)


def test_a_study_with_several_objectives_keeps_no_trial_running() -> None:
    predictor = small_predictor()
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=TTPSampler(predictor, BestMetric()),
        pruner=TTPPruner(predictor),
    )
    with pytest.raises(ValueError, match="several objectives"):
        study.ask()
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


def test_names_that_are_not_mapped_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(pruner=TTPPruner(small_predictor(), BestMetric()))
    optuna.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="optuna"):
            study.optimize(
                lambda trial: trial.suggest_float("lr", 0, 1) + trial.should_prune(), n_trials=3
            )
    finally:
        optuna.logging.disable_propagation()
    told = [r.getMessage() for r in caplog.records if "nothing is predicted" in r.getMessage()]
    # Once: another trial would be another message.
    assert len(set(told)) == 1
    assert "'lr'" in told[0] and "HyperparameterMap" in told[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("batch_size", 0.5),
        ("batch_size", 0),
        ("momentum", 1.0),
        ("momentum", -0.1),
    ],
)
def test_fixed_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"A fixed {field} must be .* but got"):
        HyperparameterMap(**{field: value})
