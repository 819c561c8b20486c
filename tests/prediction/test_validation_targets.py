"""Targets of the loss and accuracy of held-out samples, against real training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.task import FineTuningTask
from tests.predictors import predictor_with
from tests.validated import linear_spectrum
from tests.validated import LOSSES
from tests.validated import spectrum_of
from tests.validated import train
from tests.validated import validated_spectrum
from tests.validated import validated_task


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("batch_size", "momentum", "settings"),
    [(12, 0.0, {}), (5, 0.9, {}), (5, 0.8, {"nesterov": True, "weight_decay": 0.2})],
    ids=str,
)
def test_validation_curves_are_those_of_real_training_of_a_linear_model(
    batch_size: int, momentum: float, settings: dict[str, Any], loss: str
) -> None:
    real = train(validated_task(loss), LOSSES[loss], batch_size, 60, 0.03, momentum, 3, **settings)
    curves = simulate(
        LinearisedModel.from_spectrum(spectrum_of(loss), dtype=torch.float64),
        SGDConfigurations.of(0.03, momentum, **settings),
        np.array([batch_size]),
        max_steps=np.array([60]),
        full_curves=True,
        exact=True,
        seed=3,
    )
    steps = curves.steps[0].astype(int)
    assert set(curves.curves) == set(real)
    for name, values in real.items():
        np.testing.assert_allclose(curves.curves[name][0], values[steps], rtol=1e-8, err_msg=name)
    # They are no copy of the training curves.
    assert not np.allclose(real["validation_loss"], real["loss"], rtol=0.05)


def test_validation_curves_are_recorded_where_they_are_wanted() -> None:
    plain = TrainingTimePredictor(spectrum_of(), target_fraction=0.6)
    assert set(plain.predict(0.05, 12).curves) == {"loss", "accuracy"}
    full = plain.predict(0.05, 12, max_steps=60, full_curve=True)
    assert set(full.curves) == {"loss", "accuracy", "validation_loss", "validation_accuracy"}
    wanted = TrainingTimePredictor(spectrum_of(), target_validation_loss=0.9).predict(0.05, 12)
    assert set(wanted.curves) == set(full.curves)
    without = TrainingTimePredictor(linear_spectrum(), target_fraction=0.6)
    assert set(without.predict(0.05, 12, max_steps=60, full_curve=True).curves) == {
        "loss",
        "accuracy",
    }


def test_single_real_output_has_a_validation_loss_only() -> None:
    x, y = (
        torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),
        torch.arange(8.0)[:, None],
    )
    torch.manual_seed(0)
    task = FineTuningTask(torch.nn.Linear(6, 1), (x, y), "mse", validation_data=(x + 0.1, y))
    one = validated_spectrum(task)
    predictor = TrainingTimePredictor(one, target_fraction=0.9)
    curves = predictor.predict(1e-3, 8, max_steps=20, full_curve=True).curves
    assert set(curves) == {"loss", "validation_loss"}
    with pytest.raises(ValueError, match="needs classes but the model has one real output"):
        TrainingTimePredictor(one, target_validation_accuracy=0.9)


def test_validation_loss_is_reached_when_real_training_reaches_it() -> None:
    real = train(validated_task(), LOSSES["cross-entropy"], 12, 300, 0.05, 0.5)
    losses = real["validation_loss"]
    for share in (0.9, 0.5, 0.1):
        goal = losses.min() + share * (losses[0] - losses.min())
        predictor = TrainingTimePredictor(
            spectrum_of(), target_validation_loss=goal, settings=PredictorSettings(exact=True)
        )
        expected = int(np.argmax(losses <= goal))
        assert predictor.target == Target("validation_loss", goal)
        assert predictor.predict(0.05, 12, 0.5).steps.item() == pytest.approx(expected, abs=1)
    below = TrainingTimePredictor(
        spectrum_of(), target_validation_loss=0.9 * losses.min(), max_steps=300
    )
    assert below.predict(0.05, 12, 0.5).outcome == "not_reached"


def test_validation_accuracy_is_reached_when_real_training_reaches_it() -> None:
    real = train(validated_task(), LOSSES["cross-entropy"], 12, 300, 0.05, 0.5)
    shares = real["validation_accuracy"]
    goals = [goal for goal in np.unique(shares) if goal > shares[0]]
    assert goals
    for goal in goals:
        predictor = TrainingTimePredictor(
            spectrum_of(),
            target_validation_accuracy=goal,
            max_steps=300,
            settings=PredictorSettings(exact=True),
        )
        expected = int(np.argmax(shares >= goal))
        steps = predictor.predict(0.05, 12, 0.5, full_curve=True).steps.item()
        assert steps == pytest.approx(expected, abs=1, rel=0.04)
        ended = predictor.predict(0.05, 12, 0.5)
        assert ended.steps.item() == pytest.approx(expected, abs=1, rel=0.04)


@pytest.mark.parametrize("batch_size", [3, 12])
def test_validation_targets_with_strides_are_close_to_the_exact_ones(batch_size: int) -> None:
    model = LinearisedModel.from_spectrum(spectrum_of())
    rate = 0.002 / float(model.curvatures[0])
    goal = 0.75 * float(model.validation.loss(model.validation.initial_outputs[None]))  # type: ignore[union-attr]
    exact, coarse = (
        TrainingTimePredictor(
            spectrum_of(), target_validation_loss=goal, settings=PredictorSettings(exact=e)
        ).predict(rate, batch_size)
        for e in (True, False)
    )
    assert exact.outcome == "converges"
    assert coarse.strides.item() > 1
    assert coarse.steps.item() == pytest.approx(exact.steps.item(), rel=0.03)


def test_score_ranks_by_validation_targets() -> None:
    predictor = TrainingTimePredictor(
        spectrum_of(),
        target_validation_loss=0.85,
        max_steps=1000,
        settings=PredictorSettings(n_seeds=1),
    )
    rates = [0.02, 0.05, 0.1]
    scores = predictor.score(rates, 12)
    np.testing.assert_allclose(scores, predictor.predict(rates, 12).steps, rtol=0.15)


@pytest.mark.parametrize("name", ["target_validation_loss", "target_validation_accuracy"])
def test_validation_target_without_validation_data_is_refused(name: str) -> None:
    arguments: dict[str, Any] = {name: 0.5}
    with pytest.raises(ValueError, match=f"{name} needs validation data: FineTuningTask"):
        predictor_with(linear_spectrum(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_validation_loss": 0.0}, "target_validation_loss must be positive and finite"),
        ({"target_validation_loss": math.nan}, "must be positive and finite but got nan"),
        ({"target_validation_loss": 99.0}, "must be below the initial validation loss .* 99.0"),
        ({"target_validation_accuracy": 0.0}, r"target_validation_accuracy must be in \(0, 1\]"),
        ({"target_validation_accuracy": 1.1}, r"target_validation_accuracy must be in \(0, 1\]"),
        ({"target_validation_accuracy": 0.01}, "above the initial validation accuracy"),
        (
            {"target_validation_loss": 0.5, "target_fraction": 0.5},
            "Exactly one of .* must be given but got 2",
        ),
    ],
    ids=str,
)
def test_bad_validation_targets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_with(spectrum_of(), **arguments)
